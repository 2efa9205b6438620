"""Loads the language model: any Hugging Face causal model of the LLaMA family, frozen, grown by the
new tokens and, where it is tuned, fitted with low-rank adapters."""

from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from config.errors import InputError
from config.schema import LanguageModelConfig
from model.vocabulary import grow_vocabulary


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of the model in folder `path`, or of that hub name.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(_missing(path, error)) from error
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer of {path} has no fast version, which offsets need")
    return tokenizer


def load_language_model(
    config: LanguageModelConfig,
    path: str,
    own_tokens: int,
    new_tokens: int,
    dtype: torch.dtype,
    *,
    lora: bool,
) -> PreTrainedModel:
    """The frozen language model in `dtype`, with `new_tokens` new rows (float32).

    Args:
        config: template, adapters and what of the vocabulary trains.
        path: the folder or hub name, resolved.
        own_tokens: how many its tokenizer has.
        new_tokens: how many rows to add.
        dtype: of the frozen weights.
        lora: whether to fit the adapters (float32).

    Raises:
        InputError: the model cannot be read, has fewer rows than its tokenizer tokens, or lacks an
            adapter's target.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise InputError(_missing(path, error)) from error
    rows = len(model.get_input_embeddings().weight)
    if rows < own_tokens:
        raise InputError(f"{path}: the tokenizer has {own_tokens} tokens, the model {rows}")
    fit_language_model(model, config, own_tokens, new_tokens, lora=lora)
    return model


def fit_language_model(
    model: PreTrainedModel,
    config: LanguageModelConfig,
    own_tokens: int,
    new_tokens: int,
    *,
    lora: bool,
) -> None:
    """Freeze `model`, grow its vocabulary and fit the adapters, in place."""
    model.requires_grad_(False)
    grow_vocabulary(model, own_tokens, new_tokens)
    if lora:
        _add_adapters(model, config)


def _add_adapters(model: PreTrainedModel, config: LanguageModelConfig) -> None:
    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets),
    )
    try:
        inject_adapter_in_model(adapters, model)
    except ValueError as error:
        raise InputError(f"language_model.lora_targets {config.lora_targets}: {error}") from error
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def _missing(path: str, error: Exception) -> str:
    hint = "run scripts/quickstart.sh for the mini model, or see ckpt/pretrained_ckpt/README.md"
    what = "cannot be read" if Path(path).exists() else "is neither a folder here nor on the hub"
    return f"the language model {path} {what} ({hint}): {error}"
