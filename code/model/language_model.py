"""The language model: a frozen causal model of transformers, its vocabulary extended by the signal
tokens and, where it is tuned, with LoRA adapters."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nextgpt.common.device import choose_device
from nextgpt.common.errors import UserError
from nextgpt.config.schema import LanguageModelConfig
from nextgpt.conversation.signal_tokens import SignalTokens
from nextgpt.model.acceleration import choose_attention
from nextgpt.model.loading import explain_load_errors, load_pretrained
from nextgpt.model.quantization import quantization_config
from nextgpt.model.vocabulary import extend_vocabulary


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of the model in folder `path`, or of that hub name.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    with explain_load_errors(path, "config.json", "tokenizer.json|tokenizer.model|vocab.json"):
        tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {path} has no fast version, which offsets need")
    return tokenizer


def load_language_model(
    config: LanguageModelConfig, path: str, signals: SignalTokens, dtype: torch.dtype, *, lora: bool
) -> PreTrainedModel:
    """Load the frozen language model in `dtype` and prepare it (`prepare_language_model`).

    Raises:
        UserError: it cannot be read, or has fewer rows than its tokenizer tokens.
    """
    quantization = quantization_config(config.quantization, dtype)
    model = load_pretrained(AutoModelForCausalLM, path, dtype, quantization=quantization)
    rows = len(model.get_input_embeddings().weight)
    if rows < signals.first_id:
        raise UserError(f"{path}: the tokenizer has {signals.first_id} tokens, the model {rows}")
    model.set_attn_implementation(
        choose_attention(config.attn_implementation, choose_device(), dtype)
    )
    prepare_language_model(model, config, signals, lora=lora)
    return model


def prepare_language_model(
    model: PreTrainedModel, config: LanguageModelConfig, signals: SignalTokens, *, lora: bool
) -> None:
    """Freeze `model`, add rows of the `signals` and LoRA adapters (both float32), in place.

    Raises:
        UserError: the model lacks a target module of the adapters.
    """
    model.requires_grad_(False)
    extend_vocabulary(model, signals.first_id, len(signals))
    model.register_state_dict_post_hook(_keep_unique_parameters)
    if not lora:
        return
    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_target_modules),
    )
    try:
        inject_adapter_in_model(adapters, model)
    except ValueError as error:
        key = "language_model.lora_target_modules"
        raise UserError(f"{key} {config.lora_target_modules}: {error}") from error
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def _keep_unique_parameters(model: nn.Module, state: dict, prefix: str, _: dict) -> None:
    """Leave a tied head and bitsandbytes' scales of frozen matrices out of checkpoints."""
    kept = {f"{prefix}{name}" for name, _ in model.named_parameters()}
    for name in [name for name in state if name.startswith(prefix) and name not in kept]:
        del state[name]


def merge_lora(model: nn.Module) -> None:
    """Merge the adapters into the base weights for inference, in place, where those are float32.

    They stay in the model, to be saved; SmolLM2's forward pass then takes half the time. In half
    precision nothing is merged: most of the small difference would be rounded away.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and module.get_base_layer().weight.dtype == torch.float32:
            module.merge()
