"""Estimates a stage's memory on every GPU before a weight is loaded: `train.py --plan`.

The model is built on the meta device, and its largest micro batch passed through it as fake
tensors, which have shapes but no contents; live bytes are counted. What DeepSpeed holds is computed
(its ZeRO stages, arXiv 1910.02054). Takes seconds and next to no memory, for the 7B system too.
CUDA itself and fragmentation come on top; Python takes 0.5 GB of CPU memory or more per process.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nextgpt.callbacks.hidden_state_cache import (
    ROWS_PER_PASS,
    caches_hidden_states,
    hidden_state_cache_bytes,
)
from nextgpt.common.device import autocast_to, choose_dtype
from nextgpt.common.errors import MissingFileError, UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config, Quantization
from nextgpt.conversation.batch import Batch, TargetMedium
from nextgpt.dataset.catalog import kind_of
from nextgpt.decoders.denoising import LatentDenoiser, freeze_unet, load_noise_schedule
from nextgpt.decoders.latents import LatentSpace, network_on_meta
from nextgpt.media.decode_worker import MAX_PEAK_MEMORY
from nextgpt.model.build import build_on_meta
from nextgpt.model.imagebind import ImageBind, read_imagebind_config
from nextgpt.model.loading import find_folder, map_folder
from nextgpt.model.nextgpt import LanguageModelOutput, NextGPT
from nextgpt.model.quantization import check_zero_stage
from nextgpt.model.trainable import count_parameters, group_of, is_base_vocabulary
from nextgpt.tools.memory_meter import MemoryMeter
from nextgpt.tools.weights.checks import load_language_model_config
from nextgpt.tools.weights.published_decoders import configurations_of
from nextgpt.tools.weights.registry import source_of
from nextgpt.training.denoising import DenoisingLoss, denoising_settings, latent_space
from nextgpt.training.engine import micro_batch_size, read_deepspeed_config
from nextgpt.training.trainer import TRAINED_BEFORE, configure_trainable

_FLOAT = 4  # bytes: of trainable parameters, their gradients and Adam's moments
# DeepSpeed's defaults of what its JSON leaves out.
_BUCKET = 500_000_000  # numbers
_MAX_LIVE = 1_000_000_000  # numbers gathered by ZeRO 3
_VIDEO_VIEWS = 18_063_360  # bytes: 15 of two frames, 3 x 224 x 224 float32; the largest medium
_PREFETCHED = 2  # batches per loader process, torch's default
# Bytes of one quantized number: 8 bits; 4 bits and, for every 64 numbers, a scale of 8 bits.
_QUANTIZED_BYTES: dict[Quantization, float] = {"8bit": 1.0, "4bit": 0.5 + 1 / 64}
# Kernels of GPUs that need no mask of packed rows keep what SDPA does without one.
_UNMASKED = "unmasked"
AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
AttentionMaskInterface.register(_UNMASKED, lambda *_, **__: None)


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of one process.

    Attributes:
        processes: how many there are.
        summary: the settings that decide, in a line.
        groups: by trainable group its parameters and how many of them train.
        on_device, in_memory: bytes on the GPU and in CPU memory, by use.
        loading: bytes of the weights in CPU memory while they are loaded, before the first step.
        peak: most bytes on the GPU at once; less than the sum of uses that do not coincide.
        serving: bytes of each component of the served system.
    """

    processes: int
    summary: str
    groups: dict[str, tuple[int, int]]
    on_device: dict[str, float]
    in_memory: dict[str, float]
    loading: float
    peak: float
    serving: dict[str, float]

    @property
    def memory_peak(self) -> float:
        """Most bytes in CPU memory at once: while loading, or in a step."""
        return max(self.loading, sum(self.in_memory.values()))


def estimate_memory(config: Config, stage: int, processes: int) -> MemoryEstimate:
    """Estimate the memory of stage `stage` of `config` on `processes` GPUs.

    Raises:
        UserError: the configuration is contradictory or does not fit the number of processes.
        MissingFileError: the language model's config.json is missing.
    """
    if processes < 1:
        raise UserError(f"--plan {processes}: give the number of processes, 1 or more")
    training, quantization = config.training, config.language_model.quantization
    settings = read_deepspeed_config(training)
    check_zero_stage(training.deepspeed_config, settings, quantization)
    zero = settings.get("zero_optimization", {})
    zero_stage = zero.get("stage", 0)
    # What ZeRO leaves of each in a process: optimizer from stage 1 on, gradients 2, weights 3.
    optimizer_shard, gradient_shard, weight_shard = (
        1 / processes if zero_stage >= sharded_from else 1.0 for sharded_from in (1, 2, 3)
    )
    dtype = _dtype(config)
    language_model = _language_model_config(config)
    model = _build_model(config, stage, language_model, dtype)
    micro = micro_batch_size(training, processes)
    accumulation = training.global_batch_size // processes // micro
    targets = _describe_targets(config, dtype)
    passes = min(accumulation, 2)
    meter = _measure_step(model, config, targets, dtype, micro, passes, gradient_shard)

    frozen = [p for p in model.parameters() if not p.requires_grad]
    num_frozen = sum(p.numel() for p in frozen)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen_bytes = sum(p.numel() * p.itemsize for p in frozen)
    frozen_bytes -= memory_saved(model.language_model, quantization)
    weights = {
        "weights that stay frozen": weight_shard * frozen_bytes,
        "weights that train": weight_shard * num_trained * _FLOAT,
    }
    loading = sum(weights.values()) / weight_shard if quantization == "none" else 0.0
    in_memory = _cpu_buffers(config, targets, processes)
    on_device: dict[str, float] = {}
    (in_memory if zero_stage == 3 and _offloads(zero, "offload_param") else on_device).update(
        weights
    )
    on_device |= _communication_buffers(zero, zero_stage, num_trained, num_frozen, dtype)
    optimizer = {"optimizer (Adam's two moments)": 2 * num_trained * _FLOAT * optimizer_shard}
    if zero_stage:
        copy = num_trained * _FLOAT * optimizer_shard
        optimizer = {"copy of the weights, for the update": copy} | optimizer
    if _offloads(zero, "offload_optimizer"):
        copied = num_trained * _FLOAT * gradient_shard
        in_memory |= optimizer | {"gradients, for the update": copied}
    else:
        on_device |= optimizer
    on_device |= _frozen_encoders(config) | _dequantized(model.language_model, quantization)
    for modality, target in targets.items():
        on_device[f"UNet, {modality}"] = _num_parameters(target.unet) * dtype.itemsize
        vae = f"VAE, {modality}, until all latents are cached"
        on_device[vae] = _num_parameters(target.vae) * _FLOAT
    peak = sum(on_device.values()) + meter.peak
    on_device["gradients"] = num_trained * _FLOAT * gradient_shard
    on_device["activations"] = meter.peak_besides
    summary = (
        f"stage {stage}: {processes} processes, each {accumulation} x {micro} of "
        f"{training.global_batch_size} conversations a step, up to "
        f"{config.data.max_seq_length} tokens each, {str(dtype).removeprefix('torch.')}, "
        f"ZeRO {zero_stage}"
    )
    groups = count_parameters(model)
    serving = _serving(config, language_model, dtype)
    return MemoryEstimate(processes, summary, groups, on_device, in_memory, loading, peak, serving)


@dataclass(frozen=True)
class _Target:
    """What a modality's denoising loss takes, on the meta device."""

    modality: Modality
    space: LatentSpace
    unet: nn.Module
    vae: nn.Module
    scheduler: Any

    def fake_denoiser(self, config: Config) -> LatentDenoiser:
        """The denoiser, made of fake tensors where those are on."""
        _replace_by_fakes(self.unet)
        scheduler = self.scheduler.from_config(self.scheduler.config)
        settings = denoising_settings(config, self.modality)
        return LatentDenoiser(self.modality, self.unet, scheduler, settings)


def _describe_targets(config: Config, dtype: torch.dtype) -> dict[Modality, _Target]:
    """By modality with a denoising loss what it takes; reads configurations alone.

    Raises:
        MissingFileError: a decoder that is not a published one is missing.
    """
    targets: dict[Modality, _Target] = {}
    for modality in config.training.denoised_modalities:
        decoder, network = config.decoders[modality], MODALITIES[modality].decoder_class.networks
        with configurations_of(decoder.path) as folder:
            unet, vae = (network_on_meta(network[name], folder, name) for name in ("unet", "vae"))
            checkpoints = config.training.activation_checkpointing
            freeze_unet(unet.to(dtype), activation_checkpointing=checkpoints)
            space = latent_space(modality, folder, decoder)
            targets[modality] = _Target(modality, space, unet, vae, load_noise_schedule(folder))
    return targets


def _offloads(zero: dict[str, Any], what: str) -> bool:
    return zero.get(what, {}).get("device", "none") != "none"


def _language_model_config(config: Config) -> tuple[PreTrainedConfig, int]:
    """The language model's configuration, and the number of tokens of its tokenizer."""
    found = load_language_model_config(config)
    if found is None:
        raise MissingFileError(
            f"language_model.path {config.language_model.path}: not there, and its config.json is "
            "needed to estimate memory: fetch it, see python prepare_checkpoints.py"
        )
    return found


def _build_model(
    config: Config, stage: int, language_model: tuple[PreTrainedConfig, int], dtype: torch.dtype
) -> NextGPT:
    """The run's model on the meta device: frozen weights in `dtype`, the rest in float32."""
    trainable = config.training.trainable
    model = build_on_meta(
        config,
        *language_model,
        lora="lora" in trainable or "lora" in TRAINED_BEFORE[stage],
        output_projections="output_projections" in trainable,
    )
    attention = config.language_model.attn_implementation
    masked = attention in ("sdpa", "eager")
    model.language_model.set_attn_implementation(attention if masked else _UNMASKED)
    for name, parameter in model.named_parameters():
        if group_of(name) is None or is_base_vocabulary(name):
            parameter.data = parameter.data.to(dtype)
    configure_trainable(model, config)
    return model


def _dtype(config: Config) -> torch.dtype:
    """The run's precision on this machine's GPUs; without a GPU `auto` is bf16."""
    if torch.cuda.is_available():
        return choose_dtype(config.training.precision, torch.device("cuda"))
    known = {"fp32": torch.float32, "fp16": torch.float16}
    return known.get(config.training.precision, torch.bfloat16)


def _measure_step(
    model: NextGPT,
    config: Config,
    targets: dict[Modality, _Target],
    dtype: torch.dtype,
    micro: int,
    passes: int,
    gradient_shard: float,
) -> MemoryMeter:
    """Live bytes over `passes` micro batches, and over filling the hidden-state cache."""
    with FakeTensorMode():
        _replace_by_fakes(model)
        denoisers = {m: target.fake_denoiser(config) for m, target in targets.items()}
        denoising = DenoisingLoss(0, denoisers)
        spaces = {modality: target.space for modality, target in targets.items()}
        batch = full_batch(config, model, micro, spaces)
        products = autocast_to(dtype, torch.device("cpu"))
        cached = caches_hidden_states(config.training)
        if cached:
            use_cached_states(config, model, batch)
        held = nn.ModuleList([model, *(target.unet for target in targets.values())])
        with MemoryMeter(held, gradient_shard) as meter:
            if cached:
                with torch.no_grad(), products:
                    rows = slice(min(micro, ROWS_PER_PASS))
                    ids, mask = batch.input_ids[rows], batch.attention_mask[rows]
                    model.last_hidden_states(
                        model.embed(ids, batch.media_positions[rows], batch.features[rows]), mask
                    )
            for _ in range(passes):
                with products:
                    losses = model(batch)
                denoising.add_to(losses, batch, step=0)
                terms = [*losses.alignment.values(), *losses.denoising.values()]
                (losses.text + sum(terms) + losses.unused).backward()
                del losses
    return meter


def _replace_by_fakes(model: nn.Module) -> None:
    """Replace meta tensors by fake ones on the CPU: attention then runs the kernels of a run."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    fakes[id(tensor)] = fake
                tensors[name] = fakes[id(tensor)]


def full_batch(
    config: Config,
    model: NextGPT,
    micro: int,
    spaces: Mapping[Modality, LatentSpace] | None = None,
) -> Batch:
    """The largest micro batch: full conversations, each with an input medium and all outputs.

    Args:
        spaces: of the latents of the modalities with a denoising loss.
    """
    length, packed = config.data.max_seq_length, config.data.packed_seq_length
    rows = -(-micro * length // packed) if packed else micro
    ids = torch.zeros(rows, packed or length, dtype=torch.int64)
    position_ids = torch.arange(packed or length).remainder(length).expand_as(ids)
    positions = torch.zeros(micro, 2, dtype=torch.int64)
    outputs: list[Modality] = list(model.output_projections)
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=torch.zeros_like(ids),
        media_positions=positions,
        features=torch.empty(micro, config.encoder.width),
        signal_spans=dict.fromkeys(outputs, positions),
        caption_embeds={
            m: torch.empty(micro, *config.decoders[m].prompt_embeds_shape) for m in outputs
        },
        targets={
            modality: [
                TargetMedium(n, torch.ones(2, *space.shape, dtype=torch.float16), str(n))
                for n in range(micro)
            ]
            for modality, space in (spaces or {}).items()
        },
        position_ids=position_ids if packed else None,
    )


def use_cached_states(config: Config, model: NextGPT, batch: Batch) -> None:
    """Replace the language model's forward pass by signal states of `batch`, as the cache does."""
    hidden_size = model.language_model.config.hidden_size
    states = {
        modality: torch.empty(2, len(spans), config.decoders[modality].signal_tokens, hidden_size)
        for modality, spans in batch.signal_spans.items()
    }
    output = LanguageModelOutput(torch.zeros(()), 0, states)
    model.forward_language_model = lambda _: output


def _communication_buffers(
    zero: dict[str, Any], zero_stage: int, num_trained: int, num_frozen: int, dtype: torch.dtype
) -> dict[str, float]:
    """DeepSpeed's buffers to reduce gradients and, in ZeRO 3, to gather weights."""
    uses: dict[str, float] = {}
    if zero_stage and zero.get("contiguous_gradients", True):
        buffers = 2 if zero.get("overlap_comm", zero_stage == 3) else 1
        numbers = int(zero.get("reduce_bucket_size", _BUCKET))
        uses["buffer for gradients (reduce_bucket_size)"] = buffers * numbers * _FLOAT
    if zero_stage == 3:
        max_live = int(zero.get("stage3_max_live_parameters", _MAX_LIVE))
        gathered = min(max_live, num_frozen + num_trained)
        uses["gathered weights (stage3_max_live_parameters)"] = gathered * dtype.itemsize
    return uses


def _frozen_encoders(config: Config) -> dict[str, float]:
    """The media encoder, until all features are cached, and text encoders of online captions."""
    uses: dict[str, float] = {}
    if _may_show_media(config):
        uses["encoder, until all features are cached"] = _media_encoder_bytes(config)
    aligned = "output_projections" in config.training.trainable
    if aligned and config.data.caption_embeddings == "online":
        for modality, decoder in config.decoders.items():
            folder = find_folder(decoder.path, "model_index.json")
            numbers = sum(t.numel() for t in map_folder(folder / "text_encoder").values())
            uses[f"text encoder, {modality}"] = numbers * 2  # half precision on a GPU
    return uses


def _may_show_media(config: Config) -> bool:
    """Whether a conversation may show a medium: in all kinds of data sets but `caption_out`."""
    return any(kind_of(entry) != "caption_out" for entry in config.data.dataset_entries)


def _cpu_buffers(
    config: Config, targets: dict[Modality, _Target], processes: int
) -> dict[str, float]:
    """The hidden-state cache and what the loader processes hold."""
    uses: dict[str, float] = {}
    if capacity := hidden_state_cache_bytes(config.training):
        uses["hidden-state cache (hidden_state_cache_gb)"] = capacity
    per_rank = config.training.global_batch_size // processes
    prefetched = max(1, _PREFETCHED * config.data.num_workers)
    if _may_show_media(config):
        uses["media, decoded for the encoder"] = float(prefetched * per_rank * _VIDEO_VIEWS)
    if targets:
        largest = max(target.space.format.num_bytes for target in targets.values())
        uses["target media, decoded for the VAEs"] = float(prefetched * per_rank * largest)
    if targets or _may_show_media(config):
        uses["decoding processes, at most"] = float(
            max(1, config.data.num_workers) * MAX_PEAK_MEMORY
        )
    return uses


def _quantizable_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the matrices of a prepared language model that quantization would round."""
    return [
        layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and ".lora_" not in name
    ]


def memory_saved(model: nn.Module, kind: Quantization) -> float:
    """Return the bytes that quantization saves of a prepared language model's weights."""
    if kind == "none":
        return 0.0
    return sum(
        m.numel() * (m.itemsize - _QUANTIZED_BYTES[kind]) for m in _quantizable_matrices(model)
    )


def _dequantized(language_model: nn.Module, quantization: Quantization) -> dict[str, float]:
    """A quantized matrix is dequantized whenever it is used, one at a time."""
    if quantization == "none":
        return {}
    largest = max(m.numel() * m.itemsize for m in _quantizable_matrices(language_model))
    return {"largest matrix, unpacked": largest}


def _num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _media_encoder_bytes(config: Config) -> float:
    with torch.device("meta"):
        encoder = ImageBind(read_imagebind_config(project_path(config.encoder.path)))
    return float(_num_parameters(encoder) * _FLOAT)


def _serving(
    config: Config, language_model: tuple[PreTrainedConfig, int], dtype: torch.dtype
) -> dict[str, float]:
    """Bytes of the served components; decoders in half precision, as on a GPU."""
    model = build_on_meta(config, *language_model, lora=True).to(dtype)
    numbers = {group: size for group, (size, _) in count_parameters(model).items()}
    base_bytes = numbers.pop("language_model") * dtype.itemsize
    base_bytes -= memory_saved(model.language_model, config.language_model.quantization)
    sizes = {
        "language model": base_bytes,
        "projections, adapters, new rows": float(sum(numbers.values()) * _FLOAT),
        "encoder": _media_encoder_bytes(config),
    }
    for modality, decoder in config.decoders.items():
        try:
            folder = find_folder(decoder.path, "model_index.json")
        except MissingFileError:
            source = source_of(modality, decoder.path)
            published = source.num_parameters if source else 0
            counted = "as published" if published else "not counted"
            sizes[f"decoder, {modality}: not here, {counted}"] = 2.0 * published
            continue
        names = ("text_encoder", *MODALITIES[modality].decoder_class.networks)
        networks = [map_folder(folder / name) for name in names]
        total = sum(tensor.numel() for network in networks for tensor in network.values())
        sizes[f"decoder, {modality}"] = 2.0 * total
    return sizes
