"""Configuration schema: every key with its type, allowed values and meaning.

The string below a key is its description; `tools/config_reference.py` collects them into
docs/configuration.md. Relative paths are resolved against the project root.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from nextgpt.common.modality import KnownModality, Modality

TrainableGroup = Literal["input_projection", "output_projections", "lora", "vocabulary"]
Quantization = Literal["none", "8bit", "4bit"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
AboveZero = Annotated[float, Field(gt=0)]
Pixels = Annotated[int, Field(gt=0, le=4096, multiple_of=8)]


class Section(BaseModel):
    """A section of keys; unknown keys are errors, and it is immutable after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class EncoderConfig(Section):
    """The frozen media encoder (ImageBind): one feature vector per image, video or audio clip."""

    path: str
    """folder of the mini encoder, or the published imagebind_huge.pth"""
    width: Positive
    """dimension of a feature vector"""


class LanguageModelConfig(Section):
    """The language model and its LoRA adapters (arXiv 2106.09685)."""

    path: str
    """Hugging Face folder or hub name"""
    prompt_format: Literal["vicuna_v0", "chatml", "tokenizer"]
    """how turns are delimited: `### Human:` as published, `<|im_start|>`, or the tokenizer's chat
    template"""
    attn_implementation: Literal[
        "auto", "varlen", "flash_attention_2", "flex_attention", "sdpa", "eager"
    ]
    """attention kernel of transformers in training; auto: the first that is available of varlen
    (PyTorch's own FlashAttention, from compute capability 8.0 on), flash_attention_2 (with the
    package flash-attn), flex_attention and sdpa; eager is faster on CPU for short conversations;
    answers are always generated with SDPA"""
    lora_rank: Positive
    """rank of the adapters"""
    lora_alpha: Positive
    """scale of the adapters: alpha / rank"""
    lora_dropout: Fraction
    """dropout on the adapters' inputs"""
    lora_target_modules: list[str]
    """names of the linear layers that get an adapter"""
    trainable_embeddings: Literal["new_tokens", "full"]
    """what the group `vocabulary` trains: embedding and LM-head rows of the new tokens, or both
    full matrices"""
    quantization: Quantization
    """bitsandbytes quantization of the frozen linear layers"""


class InputProjectionConfig(Section):
    """The linear projector from media features to language-model input embeddings."""

    tokens_per_medium: Positive
    """input embeddings per medium; 1 as published"""
    init: Literal["random", "least_squares"]
    """initialization; least_squares is a warm start: media are mapped near the embeddings of their
    captions' words"""


class OutputProjectionConfig(Section):
    """The transformer projector from signal-token hidden states to decoder prompt embeddings."""

    d_model: Positive
    """model dimension"""
    encoder_layers: Positive
    """encoder layers"""
    decoder_layers: Positive
    """decoder layers"""
    heads: Positive
    """attention heads; must divide d_model"""
    dim_feedforward: Positive
    """hidden dimension of the feed-forward layers"""
    whiten_inputs: bool
    """start from centred, whitened hidden states, measured before training"""

    @model_validator(mode="after")
    def _heads_divide_d_model(self) -> Self:
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} must be a multiple of heads {self.heads}")
        return self


class DecoderConfig(Section):
    """A frozen diffusion pipeline of one modality, and its signal tokens."""

    path: str
    """diffusers folder or hub name"""
    signal_tokens: Positive
    """signal tokens that trigger the decoder"""
    prompt_embeds_shape: Annotated[list[Positive], Field(min_length=1, max_length=2)]
    """shape of a prompt embedding: [tokens, width], or [width] for audio"""
    num_inference_steps: Annotated[int, Field(gt=0, le=1000)]
    """denoising steps"""
    guidance_scale: Annotated[float, Field(ge=0)]
    """classifier-free guidance scale"""
    height: Pixels | None = None
    """pixels; null: the pipeline's default"""
    width: Pixels | None = None
    """pixels; null: the pipeline's default"""
    num_frames: Annotated[int, Field(gt=0, le=1000)] | None = None
    """frames of a video"""
    fps: Annotated[int, Field(gt=0, le=240)] | None = None
    """frames per second of a video"""
    shared_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """share of the initial noise's variance that all frames of a video have in common"""
    audio_length_in_s: Annotated[float, Field(gt=0, le=600)] | None = None
    """seconds of audio"""


class DatasetConfig(Section):
    """An entry of `data.datasets` that is more than a name: own data, a weight or a limit."""

    name: str
    """name of the dataset; without path, one in dataset/catalog.py"""
    path: str | None = None
    """JSON, JSON lines, CSV, TSV or Parquet file, folder of WebDataset shards, or folder of media
    with captions in .txt files"""
    media_dir: str | None = None
    """folder of the media that path names; null: the folder of path"""
    direction: Literal["medium_to_caption", "caption_to_medium", "instruction"] | None = None
    """what a sample of path learns: to describe a medium, to call a decoder, or a conversation"""
    weight: AboveZero = 1.0
    """share of the samples, relative to the other datasets, with `batching: weighted`"""
    limit: Positive | None = None
    """use the first rows only; null: all"""

    @model_validator(mode="after")
    def _own_data_has_a_direction(self) -> Self:
        if self.path is not None and self.direction is None:
            raise ValueError(
                "path needs a direction: medium_to_caption, caption_to_medium or instruction"
            )
        if self.path is None and (self.media_dir or self.direction):
            raise ValueError("media_dir and direction need a path")
        return self


def _dataset_tag(value: Any) -> str:
    return DATASET_TAGS[0] if isinstance(value, str) else DATASET_TAGS[1]


DATASET_TAGS = ("dataset name", "dataset entry")  # in the locations of pydantic's errors


DatasetList = list[
    Annotated[
        Annotated[str, Tag(DATASET_TAGS[0])] | Annotated[DatasetConfig, Tag(DATASET_TAGS[1])],
        Discriminator(_dataset_tag),
    ]
]


class ValidationConfig(Section):
    """Held-out samples: a proportion of the training rows, or data sets that do not train."""

    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """proportion of each dataset's rows that is drawn at random and never trains"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """random seed of that draw"""
    datasets: DatasetList = []
    """names or entries as in data.datasets, instead of a share"""
    max_samples: Positive | None = None
    """samples at most, evenly spaced; null: all"""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.share is None) == (not self.datasets):
            raise ValueError("give either share or datasets")
        return self


class DataConfig(Section):
    """Datasets, caches and batching."""

    data_dir: str
    """root of the dataset folders"""
    caption_embedding_dir: str
    """folder of precomputed caption embeddings (.npy)"""
    cache_dir: str
    """folder of row indexes and cached media features"""
    datasets: DatasetList = []
    """names in dataset/catalog.py, or entries with the keys below"""
    validation: ValidationConfig | None = None
    """held-out samples; null: none"""
    batching: Literal["mixed", "round_robin", "weighted"]
    """a batch mixes all datasets, or batches take datasets in turn, or samples are drawn from the
    datasets in proportion to their weights"""
    caption_embeddings: Literal["precomputed", "online"]
    """read caption embeddings from caption_embedding_dir, or compute them while training"""
    feature_precision: Literal["bf16", "fp16"] | None
    """half precision of the media encoder's products for training; features of each precision are
    cached apart; null: float32. Answers always use float32"""
    max_seq_length: Positive
    """maximum tokens of a conversation"""
    packed_seq_length: Positive | None
    """pack conversations into rows of this many tokens; null: one conversation per row"""
    num_workers: Annotated[int, Field(ge=0)]
    """data loader processes per rank"""

    @property
    def dataset_entries(self) -> list[DatasetConfig]:
        """All data sets as entries."""
        return [DatasetConfig(name=one) if isinstance(one, str) else one for one in self.datasets]

    @model_validator(mode="after")
    def _datasets_fit_together(self) -> Self:
        names = [entry.name for entry in self.dataset_entries]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"datasets: {', '.join(repeated)} is named twice")
        weighted = [entry.name for entry in self.dataset_entries if entry.weight != 1]
        if weighted and self.batching != "weighted":
            raise ValueError(
                f"datasets: the weight of {', '.join(weighted)} needs batching: weighted"
            )
        return self


class TrainingConfig(Section):
    """Optimization of one stage."""

    trainable: list[TrainableGroup] = []
    """parameter groups to train; everything else is frozen"""
    learning_rate: AboveZero
    """peak learning rate"""
    group_learning_rates: dict[Literal[TrainableGroup, "lora_B"], AboveZero] = {}
    """peak learning rates of single groups; `lora_B`: the adapters' B matrices (LoRA+, arXiv
    2402.12354)"""
    betas: tuple[Decay, Decay]
    """AdamW betas"""
    adam_epsilon: AboveZero
    """AdamW epsilon"""
    weight_decay: Annotated[float, Field(ge=0)]
    """AdamW weight decay"""
    warmup_ratio: Fraction
    """share of the steps with a rising learning rate; linear decay to 0 follows"""
    warmup_type: Literal["log", "linear"]
    """shape of the warm-up; log as published: at least 10 steps, from 0"""
    max_grad_norm: AboveZero
    """gradient clipping by global L2 norm"""
    epochs: Positive
    """passes over the data"""
    max_steps: Positive | None = None
    """optimizer steps after which the run ends early; null: all epochs"""
    global_batch_size: Positive
    """samples per optimizer step over all processes"""
    micro_batch_size: Positive
    """samples per forward pass of one process"""
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    """training precision; auto: bf16 where the hardware supports it"""
    activation_checkpointing: bool
    """recompute activations in the backward pass to save memory"""
    compile: bool = False
    """compile the language model's blocks (torch.compile) for rows of data.packed_seq_length
    tokens, to which rows are then padded"""
    fused_kernels: bool = False
    """fused norms, rotary embedding and SwiGLU of liger-kernel, on a GPU: pip install -r
    requirements-gpu.txt"""
    alignment_loss_weights: dict[KnownModality, float]
    """weights of the alignment losses between predicted prompt embeddings and caption embeddings"""
    denoising_loss_weights: dict[KnownModality, Annotated[float, Field(ge=0)]] = {
        "image": 0.0,
        "video": 0.0,
        "audio": 0.0,
    }
    """weights of the denoising losses of target media through the frozen decoders, given the
    predicted prompt embeddings; absent or 0: no decoder is loaded"""
    denoising_min_snr_gamma: dict[KnownModality, AboveZero | None] = {"image": 5.0}
    """gamma of the min-SNR weighting of timesteps (arXiv 2303.09556); absent or null: all timesteps
    weigh 1"""
    denoising_condition_dropout: Decay = 0.0
    """probability that the empty caption's embedding takes the place of a predicted one in the
    denoising loss; it then has no gradient"""
    denoising_latents: Literal["sample", "mean"] = "sample"
    """latents of target media: sampled from the VAE's distribution, or its mean; as the decoders
    were trained"""
    cache_hidden_states: bool
    """cache the frozen language model's hidden states when output projections alone train: epochs
    after the first skip its forward pass"""
    hidden_state_cache_gb: AboveZero
    """memory limit of that cache per process, in GB (1e9 bytes); what exceeds it is recomputed"""
    save_steps: Positive
    """optimizer steps between resumable checkpoints"""
    save_total_limit: Positive
    """resumable checkpoints kept; older ones are deleted"""
    validate_steps: Positive | None = None
    """optimizer steps between validations on data.validation, and one at the end; null: none"""
    save_best: bool = False
    """keep the parameters with the lowest validation loss in best.safetensors"""
    validation_samples: Annotated[int, Field(ge=0)] = 0
    """held-out samples that are answered at each validation, with media, for TensorBoard"""
    evaluate_every: Positive | None = None
    """optimizer steps between evaluations of evaluation.protocol, logged with the losses, and one
    at the end; null: none"""
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """random seed"""
    deepspeed_config: str = ""
    """DeepSpeed JSON file: ZeRO stage, offload"""

    @property
    def denoised_modalities(self) -> list[Modality]:
        """The modalities with a denoising loss: none where no output projection trains."""
        weights = self.denoising_loss_weights if "output_projections" in self.trainable else {}
        return [modality for modality, weight in weights.items() if weight]


class GenerationConfig(Section):
    """Sampling of answers."""

    top_k: Annotated[int, Field(ge=0)]
    """sample from the k most likely tokens; 0: from all"""
    top_p: Annotated[float, Field(gt=0, le=1)]
    """nucleus sampling: smallest set of tokens with this total probability"""
    temperature: Annotated[float, Field(ge=0)]
    """sampling temperature; 0: greedy"""
    max_new_tokens: Positive
    """maximum tokens of an answer"""


class ServingConfig(Section):
    """Answering, and the page of the demo."""

    offload_decoders: bool
    """keep idle decoders in CPU memory instead of on the GPU, for small cards"""
    max_batch_size: Positive
    """answers that the server generates together; others wait"""
    media_batch_size: Positive
    """media of one modality that the server denoises together; each takes memory"""
    caption_bank: str | None
    """JSON file of captions by modality, of which the page shows the nearest; null: shows none"""
    examples: str | None
    """folder with a cases.json and its media, for the example buttons; null: no buttons"""
    max_event_bytes: Annotated[int, Field(ge=4000)]
    """longest line of a streamed answer; larger media are sent as a URL, sound also in pieces"""
    media_url_seconds: Annotated[int, Field(gt=0, le=3600)]
    """time after which the URL of a generated medium expires"""
    max_media_pixels: Positive
    """largest size, width times height, that a request for an image or a video may give"""
    task_prompts: dict[KnownModality, Annotated[str, Field(pattern=r"\{prompt\}")]]
    """how the routes for a single medium ask the language model for it"""


class EvaluationConfig(Section):
    """Protocols of `evaluate.py` (docs/evaluation.md), and the networks of their metrics.

    A network is a folder or hub name; null: metrics that need it are left out."""

    protocol: str | None = None
    """protocol that training.evaluate_every runs"""
    data: str | None = None
    """its data: a folder in the published layout, or a file of caption pairs; null: the protocol's
    folder in data_dir/evaluation"""
    samples: Positive = 16
    """samples of the protocol that training.evaluate_every runs"""
    batch_size: Positive = 8
    """answers that are generated together, and media of one modality that are decoded together"""
    caption_passing: bool = True
    """decode the written and the true captions too, through the decoder's own text encoder"""
    inception: str | None = None
    """network of FID: pt_inception-2015-12-05-6726825d.pth, or a vision model of transformers"""
    clip: str | None = None
    """CLIP of CLIPScore and CLIPSIM"""
    clap: str | None = None
    """CLAP of the CLAP score"""
    audio_tagger: str | None = None
    """network of FD, KL and IS: PANNs' Cnn14_16k_mAP=0.438.pth, or an audio classifier of
    transformers"""
    sentence_encoder: str | None = None
    """Sentence-BERT of the similarity of audio captions"""


class Config(Section):
    """Top-level keys."""

    name: str
    """name of the system"""
    save_path: str
    """folder of the tuned parameters; stage N is written to save_path/stage_N"""
    encoder: EncoderConfig
    language_model: LanguageModelConfig
    input_projection: InputProjectionConfig
    output_projection: OutputProjectionConfig
    decoders: dict[KnownModality, DecoderConfig]
    data: DataConfig
    training: TrainingConfig
    generation: GenerationConfig
    serving: ServingConfig
    evaluation: EvaluationConfig
