"""Every key of the configuration, with its type, unit and meaning; the YAML files fill it.

Paths are relative to the project's root unless absolute.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nextgpt.common.modality import KnownModality

TrainableGroup = Literal["input_projection", "output_projections", "lora", "vocabulary"]
Quantization = Literal["none", "8bit", "4bit"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
AboveZero = Annotated[float, Field(gt=0)]
Pixels = Annotated[int, Field(gt=0, le=4096, multiple_of=8)]


class Section(BaseModel):
    """A group of keys: unknown ones are errors, and it does not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EncoderConfig(Section):
    """ImageBind, frozen: one vector per picture, video or sound."""

    path: str  # folder of the mini encoder, or the published imagebind_huge.pth
    width: Positive  # length of a feature


class LanguageModelConfig(Section):
    """The language model and its low-rank adapters (LoRA, arXiv 2106.09685)."""

    path: str  # Hugging Face folder, or a hub name
    # How turns are written: "### Human:" as published, <|im_start|>, or by the tokenizer's own chat
    # template.
    prompt_format: Literal["vicuna_v0", "chatml", "tokenizer"]
    # Eager is faster on the CPU, for short conversations.
    attn_implementation: Literal["sdpa", "eager"]
    lora_rank: Positive
    lora_alpha: Positive
    lora_dropout: Fraction
    lora_target_modules: list[str]  # names of the linear layers that get an adapter
    # Rows of the new tokens only, or both whole matrices.
    trainable_embeddings: Literal["new_tokens", "full"]
    # Of the layers' frozen matrices, by bitsandbytes: see model/quantization.py.
    quantization: Quantization


class InputProjectionConfig(Section):
    """The linear layer between an encoder's vector and the language model."""

    tokens_per_medium: Positive  # input embeddings that a medium becomes; 1 as published
    # Least squares: a new one starts where it puts media among the words of their captions.
    init: Literal["random", "least_squares"]


class OutputProjectionConfig(Section):
    """The transformer between signal tokens and a decoder's caption embedding."""

    d_model: Positive  # model dimension
    encoder_layers: Positive
    decoder_layers: Positive
    heads: Positive
    dim_feedforward: Positive  # hidden width of the feed-forward layers
    whiten_inputs: bool  # begin with what varies in what comes in: see callbacks/warm_start.py

    @model_validator(mode="after")
    def _heads_divide_d_model(self) -> Self:
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is to be a multiple of heads {self.heads}")
        return self


class DecoderConfig(Section):
    """A diffusion pipeline, frozen, and how many signal tokens call it."""

    path: str  # diffusers folder, or a hub name
    signal_tokens: Positive
    # Of one caption embedding: [tokens, width], or [width] for sound.
    prompt_embeds_shape: Annotated[list[Positive], Field(min_length=1, max_length=2)]
    # Denoising steps; the schedulers know 1000.
    num_inference_steps: Annotated[int, Field(gt=0, le=1000)]
    guidance_scale: Annotated[float, Field(ge=0)]
    height: Pixels | None = None  # none: the pipeline's own
    width: Pixels | None = None
    num_frames: Annotated[int, Field(gt=0, le=1000)] | None = None  # video only
    fps: Annotated[int, Field(gt=0, le=240)] | None = None  # video only, frames per second
    shared_noise: Annotated[float, Field(ge=0, le=1)] = 0.0  # video only, see model/decoders.py
    audio_length_in_s: Annotated[float, Field(gt=0, le=600)] | None = None  # sound only


class DataConfig(Section):
    """Where samples come from and how batches are made of them."""

    data_dir: str  # folder of the course's data tree
    caption_embedding_dir: str  # folder of the .npy caption embeddings
    cache_dir: str  # folder of the row indexes and media features
    datasets: list[str] = []  # names from dataset/catalog.py
    batching: Literal["mixed", "round_robin"]
    caption_embeddings: Literal["precomputed", "online"]
    max_seq_length: Positive  # tokens of one conversation
    # Tokens of a row that conversations are packed into, for little padding; none: a row each.
    packed_seq_length: Positive | None
    num_workers: Annotated[int, Field(ge=0)]  # loader processes a rank


class TrainingConfig(Section):
    """One stage: what trains, for how long, how fast."""

    trainable: list[TrainableGroup] = []
    learning_rate: AboveZero  # peak
    # Peaks of parts that differ. `lora_B` are the adapters' second matrices, which begin at 0: they
    # gain from a higher rate than the first ones (LoRA+, Hayou et al. 2024).
    group_learning_rates: dict[TrainableGroup | Literal["lora_B"], AboveZero] = {}
    betas: tuple[Decay, Decay]
    adam_epsilon: AboveZero
    weight_decay: Annotated[float, Field(ge=0)]
    warmup_ratio: Fraction  # share of the steps with a rising rate; then linear decay to 0
    # How it rises: log as published, over 10 steps or more, from 0 in the first; or linear.
    warmup_type: Literal["log", "linear"]
    max_grad_norm: AboveZero  # of the global L2 norm
    epochs: Positive
    max_steps: Positive | None = None  # ends earlier
    global_batch_size: Positive  # samples an optimizer step over all processes
    micro_batch_size: Positive  # samples a forward pass of one process
    precision: Literal["auto", "fp32", "bf16", "fp16"]  # auto: bf16 where the hardware has it
    activation_checkpointing: bool
    alignment_loss_weights: dict[KnownModality, float]
    # Where output projections alone train, the language model always says the same of a caption:
    # it reads each caption once, and passes after the first cost it nothing.
    cache_hidden_states: bool
    # GB (1e9 bytes) of the machine's memory that states may take in every process. What has no room
    # is computed again; with one epoch nothing is read again, and nothing kept.
    hidden_state_cache_gb: AboveZero
    save_steps: Positive  # steps between resumable checkpoints
    save_total_limit: Positive
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    deepspeed_config: str = ""  # DeepSpeed's own JSON: ZeRO stage, offload


class GenerationConfig(Section):
    """How answers are sampled."""

    top_k: Annotated[int, Field(ge=0)]  # of the likeliest tokens are sampled from; 0: of all
    top_p: Annotated[float, Field(gt=0, le=1)]
    temperature: Annotated[float, Field(ge=0)]  # 0: always the likeliest token
    max_new_tokens: Positive


class ServingConfig(Section):
    """Answering, and the page."""

    # Between uses, keep the decoders in the machine's memory instead of on the GPU, for cards that
    # cannot hold all at once.
    offload_decoders: bool
    # JSON file of captions by modality, of which the page shows the nearest; none: it shows none.
    caption_bank: str | None
    examples: str | None  # folder with a cases.json and its media, for the page's buttons


class Config(Section):
    """The whole configuration."""

    name: str  # of the system: the folder of its tuned parameters
    save_path: str  # stage N is written to save_path/stage_N
    encoder: EncoderConfig
    language_model: LanguageModelConfig
    input_projection: InputProjectionConfig
    output_projection: OutputProjectionConfig
    decoders: dict[KnownModality, DecoderConfig]
    data: DataConfig
    training: TrainingConfig
    generation: GenerationConfig
    serving: ServingConfig
