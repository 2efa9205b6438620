"""Build the components that a run uses from the configuration, and load no others."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nextgpt.common.errors import UserError
from nextgpt.common.modality import Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.conversation.prompt import PromptBuilder
from nextgpt.conversation.signal_tokens import SignalTokens
from nextgpt.conversation.templates import TEMPLATES, template_from_tokenizer
from nextgpt.model.imagebind import ImageBind, load_imagebind
from nextgpt.model.language_model import load_language_model, load_tokenizer, prepare_language_model
from nextgpt.model.loading import resolve_model_path
from nextgpt.model.nextgpt import NextGPT
from nextgpt.model.output_projection import OutputProjection


def build_prompt_builder(config: Config) -> PromptBuilder:
    """Build the prompt builder; loads the tokenizer but no weights."""
    tokenizer = load_tokenizer(resolve_model_path(config.language_model.path))
    signals = SignalTokens(signal_counts(config), first_id=len(tokenizer))
    name = config.language_model.prompt_format
    template = template_from_tokenizer(tokenizer) if name == "tokenizer" else TEMPLATES[name]
    return PromptBuilder(tokenizer, signals, template, config.input_projection.tokens_per_medium)


def signal_counts(config: Config) -> dict[Modality, int]:
    """Return the number of signal tokens by modality."""
    return {modality: decoder.signal_tokens for modality, decoder in config.decoders.items()}


def build_media_encoder(config: Config, dtype: torch.dtype | None = torch.float32) -> ImageBind:
    """Load ImageBind; `dtype` None: the file's own, memory-mapped until they are used.

    Raises:
        UserError: it is missing, broken, or gives features of another width.
    """
    path, width = project_path(config.encoder.path), config.encoder.width
    imagebind = load_imagebind(path, dtype)
    found = imagebind.config.output_dim
    if found != width:
        raise UserError(
            f"{path} gives {found} features, but encoder.width is {width}: set it to match"
        )
    return imagebind


def build_model(
    config: Config, dtype: torch.dtype, *, lora: bool, output_projections: bool
) -> NextGPT:
    """Load the language model in `dtype` and initialise the trainable groups that the run uses."""
    path = resolve_model_path(config.language_model.path)
    signals = build_prompt_builder(config).signals
    language_model = load_language_model(config.language_model, path, signals, dtype, lora=lora)
    return _add_projections(config, language_model, output_projections=output_projections)


def build_on_meta(
    config: Config,
    language_model_config: PreTrainedConfig,
    base_tokens: int,
    *,
    lora: bool,
    output_projections: bool = True,
) -> NextGPT:
    """Build the model on the meta device: names and shapes without memory for weights.

    `base_tokens` is the tokenizer's number; the configured folder is not read.
    """
    signals = SignalTokens(signal_counts(config), first_id=base_tokens)
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(language_model_config)
        prepare_language_model(language_model, config.language_model, signals, lora=lora)
        return _add_projections(config, language_model, output_projections=output_projections)


def _add_projections(
    config: Config, language_model: PreTrainedModel, *, output_projections: bool
) -> NextGPT:
    hidden_size = language_model.config.hidden_size
    projections = {
        modality: OutputProjection(
            hidden_size,
            prompt_embeds_shape=tuple(decoder.prompt_embeds_shape),
            **config.output_projection.model_dump(),
        )
        for modality, decoder in config.decoders.items()
        if output_projections
    }
    media_tokens, width = config.input_projection.tokens_per_medium, config.encoder.width
    return NextGPT(language_model, width, projections, signal_counts(config), media_tokens)
