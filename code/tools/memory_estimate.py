"""What a stage will need of every GPU, reckoned before a weight is loaded: `train.py --plan`.

The model is laid out on the meta device, and one micro batch, as full as it may be, taken through
it with fake tensors, which have shapes and no contents: what is alive at the worst moment is
counted. The rest is arithmetic on what DeepSpeed keeps (its ZeRO stages, arXiv 1910.02054). It
takes seconds, and next to no memory, for the 7B system too. CUDA itself, and the gaps between its
blocks, come on top; in the machine's memory Python and its libraries, half a GB a process and
more with CUDA.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from nextgpt.callbacks.hidden_state_cache import (
    READ_TOGETHER,
    caches_hidden_states,
    hidden_state_cache_bytes,
)
from nextgpt.common.device import autocast_to, choose_dtype
from nextgpt.common.errors import MissingFileError, UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config, Quantization
from nextgpt.conversation.batch import Batch
from nextgpt.dataset.catalog import find_entry
from nextgpt.media.decode_worker import MAX_PEAK_MEMORY
from nextgpt.model.build import build_on_meta
from nextgpt.model.imagebind import ImageBind, read_imagebind_config
from nextgpt.model.loading import find_folder, map_folder
from nextgpt.model.nextgpt import NextGPT
from nextgpt.model.quantization import check_zero_stage, memory_saved, quantizable_matrices
from nextgpt.model.trainable import count_parameters, group_of, is_base_vocabulary
from nextgpt.tools.memory_meter import MemoryMeter
from nextgpt.tools.weights.checks import load_language_model_config
from nextgpt.tools.weights.registry import source_of
from nextgpt.training.engine import micro_batch_size, read_deepspeed_config
from nextgpt.training.trainer import TRAINED_BEFORE, configure_trainable

_FLOAT = 4  # bytes: of what trains, its gradients and Adam's moments
# DeepSpeed's own defaults of what its JSON leaves out.
_BUCKET = 500_000_000  # numbers
_MOST_GATHERED = 1_000_000_000  # numbers, by ZeRO 3
_VIDEO_VIEWS = 18_063_360  # bytes: 15 of two frames, 3 x 224 x 224 float32; the largest medium
_AHEAD = 2  # batches that each loader process has ready, by default


@dataclass(frozen=True)
class Plan:
    """What one of the processes needs.

    Attributes:
        processes: how many they are.
        facts: the run's figures, in words.
        parts: by part its parameters and how many of them train.
        on_device, in_memory: bytes on the GPU, and beside it in the machine's memory, by use.
        loading: bytes of the weights in the machine's memory at the start; over before a step.
        peak: bytes on the GPU at the worst moment; uses that do not meet count once.
        serving: bytes of each part of the served system.
    """

    processes: int
    facts: str
    parts: dict[str, tuple[int, int]]
    on_device: dict[str, float]
    in_memory: dict[str, float]
    loading: float
    peak: float
    serving: dict[str, float]

    @property
    def memory_peak(self) -> float:
        """Bytes in the machine's memory at the worst moment: at the start, or in the steps."""
        return max(self.loading, sum(self.in_memory.values()))


def estimate_memory(config: Config, stage: int, processes: int) -> Plan:
    """Reckon what stage `stage` of `config` needs with so many `processes`, a GPU each.

    Raises:
        UserError: the configuration does not fit together or the processes.
        MissingFileError: the language model's configuration is not there to be asked.
    """
    if processes < 1:
        raise UserError(f"--plan {processes}: give the number of processes, 1 or more")
    training = config.training
    settings = read_deepspeed_config(training)
    zero = settings.get("zero_optimization", {})
    zero_stage = zero.get("stage", 0)
    quantization = config.language_model.quantization
    check_zero_stage(training.deepspeed_config, settings, quantization)
    dtype = _planned_dtype(config)
    known = _figures(config)
    model = _lay_out(config, stage, known, dtype)
    micro = micro_batch_size(training, processes)
    passes = training.global_batch_size // processes // micro
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    gradients_kept = 1 / processes if zero_stage >= 2 else 1.0
    meter = _take_through(model, config, dtype, micro, min(passes, 2), gradients_kept)
    weights_kept = 1 / processes if zero_stage >= 3 else 1.0
    whole = sum(p.numel() * p.itemsize for p in frozen)
    stored = whole - memory_saved(model.language_model, quantization)
    weights = {
        "weights that stay frozen": weights_kept * stored,
        "weights that train": weights_kept * trained * _FLOAT,
    }
    loading = sum(weights.values()) / weights_kept if quantization == "none" else 0.0
    beside = zero_stage == 3 and _offloads(zero, "offload_param")
    on_device, in_memory = ({}, weights) if beside else (weights, {})
    on_device |= _reducing(zero, zero_stage, trained, sum(p.numel() for p in frozen), dtype)
    updating = _updating(zero_stage, trained, processes)
    if _offloads(zero, "offload_optimizer"):
        copied = {"gradients, for the update": trained * _FLOAT * gradients_kept}
        in_memory = in_memory | updating | copied
    else:
        on_device |= updating
    in_memory = in_memory | _keeping(config, processes)
    on_device |= _reading(config) | _unpacking(model.language_model, quantization)
    peak = sum(on_device.values()) + meter.peak
    on_device["gradients"] = trained * _FLOAT * gradients_kept
    on_device["activations"] = meter.peak_besides
    facts = (
        f"stage {stage}: {processes} processes, each {passes} x {micro} of "
        f"{training.global_batch_size} conversations a step, up to "
        f"{config.data.max_seq_length} tokens each, {str(dtype).removeprefix('torch.')}, "
        f"ZeRO {zero_stage}"
    )
    return Plan(
        processes,
        facts,
        count_parameters(model),
        on_device,
        in_memory,
        loading,
        peak,
        _serving(config, known, dtype),
    )


def _offloads(zero: dict[str, Any], what: str) -> bool:
    return zero.get(what, {}).get("device", "none") != "none"


def _figures(config: Config) -> tuple[PreTrainedConfig, int]:
    """The language model's figures, and how many tokens its tokenizer has."""
    known = load_language_model_config(config)
    if known is None:
        raise MissingFileError(
            f"language_model.path {config.language_model.path}: not there, and its config.json "
            "decides the plan: fetch it, see python prepare_checkpoints.py"
        )
    return known


def _lay_out(
    config: Config, stage: int, known: tuple[PreTrainedConfig, int], dtype: torch.dtype
) -> NextGPT:
    """The model of a run on the meta device: the language model in `dtype`, the rest in float32.

    With what the stage trains, and the adapters that its predecessor brings.
    """
    trains = config.training.trainable
    model = build_on_meta(
        config,
        *known,
        lora="lora" in trains or "lora" in TRAINED_BEFORE[stage],
        output_projections="output_projections" in trains,
    )
    model.language_model.set_attn_implementation(config.language_model.attn_implementation)
    for name, parameter in model.named_parameters():
        if group_of(name) is None or is_base_vocabulary(name):
            parameter.data = parameter.data.to(dtype)
    configure_trainable(model, config)
    return model


def _planned_dtype(config: Config) -> torch.dtype:
    """The run's precision on the GPUs at hand; without any `auto` is bf16, as on those of today."""
    if torch.cuda.is_available():
        return choose_dtype(config.training.precision, torch.device("cuda"))
    known = {"fp32": torch.float32, "fp16": torch.float16}
    return known.get(config.training.precision, torch.bfloat16)


def _take_through(
    model: NextGPT,
    config: Config,
    dtype: torch.dtype,
    micro: int,
    passes: int,
    gradients_kept: float,
) -> MemoryMeter:
    """What `passes` micro batches, one after the other, hold on to, and before that a reading."""
    with FakeTensorMode():
        _replace_by_fakes(model)
        batch = full_batch(config, model, micro)
        products = autocast_to(dtype, torch.device("cpu"))
        with MemoryMeter(model, gradients_kept) as meter:
            if batch.states is not None:
                with torch.no_grad(), products:
                    rows = slice(min(micro, READ_TOGETHER))
                    ids, mask = batch.input_ids[rows], batch.attention_mask[rows]
                    model.read(
                        model.embed(ids, batch.media_positions[rows], batch.features[rows]), mask
                    )
            for _ in range(passes):
                with products:
                    losses = model(batch)
                (losses.text + sum(losses.alignment.values()) + losses.unused).backward()
                del losses
    return meter


def _replace_by_fakes(model: nn.Module) -> None:
    """Put fake tensors on the CPU in the place of meta ones: attention then runs as it will."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    trains = isinstance(tensor, nn.Parameter)
                    fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if trains else fake
                if tensor is not None:
                    tensors[name] = fakes[id(tensor)]


def full_batch(config: Config, model: NextGPT, micro: int) -> Batch:
    """Conversations as long as they may be; each shows one medium, and one of each kind is made."""
    length, packed = config.data.max_seq_length, config.data.packed_seq_length
    rows = -(-micro * length // packed) if packed else micro
    columns = packed or length
    ids = torch.zeros(rows, columns, dtype=torch.int64)
    places = torch.zeros(micro, 2, dtype=torch.int64)
    made: list[Modality] = list(model.output_projections)
    hidden = model.language_model.config.hidden_size
    states = {
        modality: torch.empty(2, micro, config.decoders[modality].signal_tokens, hidden)
        for modality in made
    }
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=torch.zeros_like(ids),
        media_positions=places,
        features=torch.empty(micro, config.encoder.width),
        signal_spans=dict.fromkeys(made, places),
        caption_embeds={
            m: torch.empty(micro, *config.decoders[m].prompt_embeds_shape) for m in made
        },
        states=states if caches_hidden_states(config.training) else None,
        position_ids=torch.zeros_like(ids) if packed else None,
    )


def _updating(zero_stage: int, trained: int, processes: int) -> dict[str, float]:
    """The optimizer's share: from ZeRO 1 on divided, with a copy of the weights that train."""
    kept = 1 / processes if zero_stage else 1.0
    copy = {"copy of the weights, for the update": trained * _FLOAT * kept} if zero_stage else {}
    return copy | {"optimizer (Adam's two moments)": 2 * trained * _FLOAT * kept}


def _reducing(
    zero: dict[str, Any], zero_stage: int, trained: int, frozen: int, dtype: torch.dtype
) -> dict[str, float]:
    """What DeepSpeed needs to bring gradients and, in ZeRO 3, weights together."""
    needs: dict[str, float] = {}
    if zero_stage and zero.get("contiguous_gradients", True):
        buffers = 2 if zero.get("overlap_comm", zero_stage == 3) else 1
        numbers = int(zero.get("reduce_bucket_size", _BUCKET))
        needs["buffer for gradients (reduce_bucket_size)"] = buffers * numbers * _FLOAT
    if zero_stage == 3:
        most = int(zero.get("stage3_max_live_parameters", _MOST_GATHERED))
        gathered = min(most, frozen + trained)
        needs["gathered weights (stage3_max_live_parameters)"] = gathered * dtype.itemsize
    return needs


def _reading(config: Config) -> dict[str, float]:
    """What makes batches ready: until all features are kept the encoder, and text encoders."""
    needs: dict[str, float] = {}
    if _may_show_media(config):
        needs["encoder, until all features are kept"] = _encoder_size(config)
    aligned = "output_projections" in config.training.trainable
    if aligned and config.data.caption_embeddings == "online":
        for modality, decoder in config.decoders.items():
            folder = find_folder(decoder.path, "model_index.json")
            numbers = sum(t.numel() for t in map_folder(folder / "text_encoder").values())
            needs[f"text encoder, {modality}"] = numbers * 2  # half precision on a GPU
    return needs


def _may_show_media(config: Config) -> bool:
    """Whether a conversation of the data sets may show a medium: all kinds but captions alone."""
    return any(find_entry(name).kind != "caption_out" for name in config.data.datasets)


def _keeping(config: Config, processes: int) -> dict[str, float]:
    """What grows or waits in the machine's memory while the steps are taken."""
    needs: dict[str, float] = {}
    if most := hidden_state_cache_bytes(config.training):
        needs["hidden states, kept (hidden_state_cache_gb)"] = most
    if _may_show_media(config):
        share = config.training.global_batch_size // processes
        ready = max(1, _AHEAD * config.data.num_workers)
        needs["media, decoded for the encoder"] = float(ready * share * _VIDEO_VIEWS)
        needs["decoding processes, at most"] = float(
            max(1, config.data.num_workers) * MAX_PEAK_MEMORY
        )
    return needs


def _unpacking(language_model: nn.Module, quantization: Quantization) -> dict[str, float]:
    """A quantized matrix is made whole whenever it is used: one at a time."""
    if quantization == "none":
        return {}
    largest = max(m.numel() * m.itemsize for m in quantizable_matrices(language_model))
    return {"largest matrix, unpacked": largest}


def _encoder_size(config: Config) -> float:
    with torch.device("meta"):
        encoder = ImageBind(read_imagebind_config(project_path(config.encoder.path)))
    return sum(p.numel() for p in encoder.parameters()) * _FLOAT


def _serving(
    config: Config, known: tuple[PreTrainedConfig, int], dtype: torch.dtype
) -> dict[str, float]:
    """Bytes of the served parts; decoders in half precision, as on a GPU, if they are there."""
    model = build_on_meta(config, *known, lora=True).to(dtype)
    numbers = {part: size for part, (size, _) in count_parameters(model).items()}
    whole = numbers.pop("language_model") * dtype.itemsize
    saved = memory_saved(model.language_model, config.language_model.quantization)
    sizes = {
        "language model": whole - saved,
        "projections, adapters, new rows": float(sum(numbers.values()) * _FLOAT),
        "encoder": _encoder_size(config),
    }
    for modality, decoder in config.decoders.items():
        try:
            folder = find_folder(decoder.path, "model_index.json")
        except MissingFileError:
            source = source_of(modality, decoder.path)
            known_numbers = source.num_parameters if source else 0
            counted = "as published" if known_numbers else "not counted"
            sizes[f"decoder, {modality}: not here, {counted}"] = 2.0 * known_numbers
            continue
        networks = ("text_encoder", *MODALITIES[modality].decoder_class.networks)
        parts = [map_folder(folder / name) for name in networks]
        numbers = sum(tensor.numel() for part in parts for tensor in part.values())
        sizes[f"decoder, {modality}"] = 2.0 * numbers
    return sizes
