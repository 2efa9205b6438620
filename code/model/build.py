"""Puts the model together from the configuration: what a run uses, and nothing else."""

from pathlib import Path

import torch
from huggingface_hub import constants, try_to_load_from_cache
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nextgpt.common.errors import MissingFileError, UserError
from nextgpt.common.modality import Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.conversation.prompt import PromptBuilder
from nextgpt.conversation.signal_tokens import SignalTokens
from nextgpt.conversation.templates import TEMPLATES, template_from_tokenizer
from nextgpt.model.imagebind import ImageBind, load_imagebind
from nextgpt.model.language_model import load_language_model, load_tokenizer, prepare_language_model
from nextgpt.model.nextgpt import NextGPT
from nextgpt.model.output_projection import OutputProjection
from nextgpt.model.pretrained_folder import resolve_model_name


def resolve_model_path(path: str) -> str:
    """The folder `path` under the project's root if it exists, else `path` as a hub name."""
    local = project_path(path)
    return str(local) if local.exists() else path


def find_folder(path: str, file: str) -> Path:
    """The local folder behind a configured path: itself, or the hub's snapshot in the cache.

    Args:
        file: that the hub's repository has.

    Raises:
        MissingFileError: there is no such folder, and none in the cache.
    """
    name = resolve_model_name(resolve_model_path(path))
    if Path(name).is_dir():
        return Path(name)
    cached = try_to_load_from_cache(name, file)
    if not isinstance(cached, str):
        raise MissingFileError(f"{name} is not in the hub's cache ({constants.HF_HUB_CACHE})")
    return Path(cached).parent


def build_prompt_builder(config: Config) -> PromptBuilder:
    """The encoder of conversations; loads the tokenizer but no weights."""
    path = resolve_model_path(config.language_model.path)
    tokenizer = load_tokenizer(path)
    signals = SignalTokens(signal_counts(config), first_id=len(tokenizer))
    name = config.language_model.prompt_format
    template = template_from_tokenizer(tokenizer) if name == "tokenizer" else TEMPLATES[name]
    return PromptBuilder(tokenizer, signals, template, config.input_projection.tokens_per_medium)


def signal_counts(config: Config) -> dict[Modality, int]:
    """Signal tokens of each modality."""
    return {modality: decoder.signal_tokens for modality, decoder in config.decoders.items()}


def build_media_encoder(config: Config, dtype: torch.dtype | None = torch.float32) -> ImageBind:
    """ImageBind in float32, as in training and so in answering.

    Args:
        dtype: of the weights; none: the file's own, and they stay on disk until they are used.

    Raises:
        UserError: it is not there, is broken, or gives features of another width.
    """
    path, width = project_path(config.encoder.path), config.encoder.width
    imagebind = load_imagebind(path, dtype)
    if imagebind.config.output_dim != width:
        raise UserError(
            f"{path} gives features of {imagebind.config.output_dim} numbers, but encoder.width is "
            f"{width}: set it to match"
        )
    return imagebind


def build_model(
    config: Config, dtype: torch.dtype, *, lora: bool, output_projections: bool
) -> NextGPT:
    """The model with new weights in the tuned parts; load a delta over it.

    Args:
        config: the whole configuration.
        dtype: of the frozen weights.
        lora: whether the run uses the adapters.
        output_projections: whether the run uses them.
    """
    path = resolve_model_path(config.language_model.path)
    signals = build_prompt_builder(config).signals
    language_model = load_language_model(config.language_model, path, signals, dtype, lora=lora)
    return _join(config, language_model, signals, output_projections=output_projections)


def build_on_meta(
    config: Config,
    figures: PreTrainedConfig,
    own_tokens: int,
    *,
    lora: bool,
    output_projections: bool = True,
) -> NextGPT:
    """The model without weights, on the meta device: its names and shapes cost no memory.

    Args:
        config: the whole configuration.
        figures: of the language model, whose folder is not asked.
        own_tokens: of the language model's tokenizer.
        lora: whether it has the adapters.
        output_projections: whether it has them.
    """
    signals = SignalTokens(signal_counts(config), first_id=own_tokens)
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(figures)
        prepare_language_model(
            language_model, config.language_model, own_tokens, len(signals), lora=lora
        )
        return _join(config, language_model, signals, output_projections=output_projections)


def _join(
    config: Config,
    language_model: PreTrainedModel,
    signals: SignalTokens,
    *,
    output_projections: bool,
) -> NextGPT:
    """A language model that is fitted already, and new projections."""
    hidden_size = language_model.config.hidden_size
    projections = build_output_projections(config, hidden_size) if output_projections else {}
    return NextGPT(
        language_model,
        config.encoder.width,
        projections,
        signals.counts,
        config.input_projection.tokens_per_medium,
    )


def build_output_projections(config: Config, hidden_size: int) -> dict[Modality, OutputProjection]:
    """One output projection for each decoder."""
    return {
        modality: OutputProjection(
            hidden_size,
            prompt_embeds_shape=tuple(decoder.prompt_embeds_shape),
            **config.output_projection.model_dump(),
        )
        for modality, decoder in config.decoders.items()
    }
