"""Check the weights of a configuration's components without loading them.

Files are memory-mapped, models built on the meta device, and the libraries' loaders report missing
keys: seconds and no gigabytes for the 7B system. The only values read are those of a language
model's layer norms.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
)

from nextgpt.common.errors import MissingFileError, UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.decoders.text_encoders import TextEncoder
from nextgpt.generation.assistant import find_delta
from nextgpt.model.build import build_media_encoder, build_on_meta
from nextgpt.model.delta import load_delta, read_delta
from nextgpt.model.language_model import load_tokenizer
from nextgpt.model.loading import (
    explain_load_errors,
    find_folder,
    load_pretrained,
    map_folder,
    map_tensors,
)
from nextgpt.model.trainable import NEEDED_TO_ANSWER
from nextgpt.model.upstream_checkpoint import NEW_ROWS, is_newer
from nextgpt.tools.weights.detect import (
    LLAMA_ROWS,
    describe_vocabulary,
    is_llama_1,
    is_unmerged_delta,
    is_weight,
    max_norm_weight,
)
from nextgpt.tools.weights.parts import PartName

PUBLISHED_SYSTEM = "7b_tiva_v0"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Finding:
    """Result of checking a component.

    Attributes:
        facts: lines of text.
        fault: what is wrong or missing; empty if nothing.
        missing: whether the fault is a missing file.
    """

    facts: tuple[str, ...]
    fault: str = ""
    missing: bool = False


def check_part(config: Config, part: PartName) -> Finding:
    """Check one component; faults are returned, not raised."""
    facts: list[str] = []
    try:
        for fact in _facts_of(config, part):
            facts.append(fact)
    except MissingFileError as error:
        return Finding(tuple(facts), str(error), missing=True)
    except UserError as error:
        return Finding(tuple(facts), str(error))
    return Finding(tuple(facts))


def _facts_of(config: Config, part: PartName) -> Iterator[str]:
    """Yield facts about `part`.

    Raises:
        UserError: it is wrong; a MissingFileError if a file is missing.
    """
    if part == "encoder":
        return _facts_of_encoder(config)
    if part == "language_model":
        return _facts_of_language_model(config)
    if part == "tuned":
        return _facts_of_tuned(config)
    return _facts_of_decoder(config, part)


def _facts_of_encoder(config: Config) -> Iterator[str]:
    encoder = build_media_encoder(config, dtype=None)
    yield f"media encoder: {_describe(encoder.state_dict())}"
    yield f"names, shapes and the feature dimension of {config.encoder.width} are right"


def _facts_of_language_model(config: Config) -> Iterator[str]:
    folder = find_folder(config.language_model.path, "config.json")
    tensors = {name: t for name, t in map_folder(folder).items() if is_weight(name)}
    yield f"{folder}: {_describe(tensors)}"
    if is_newer(tensors):
        raise UserError(
            f"{folder} holds a complete system of the newer generation of the published code "
            "(parameters mm_*): give the language model alone"
        )
    if is_unmerged_delta(tensors):
        raise UserError(
            f"{folder} holds a delta that is not merged: its layer norms average at most "
            f"{max_norm_weight(tensors):.3f}, a model's 1 or more. It would load and generate "
            f"nonsense. Merge it: python merge_vicuna.py --base LLAMA_FOLDER --delta {folder}"
        )
    model = load_pretrained(AutoModelForCausalLM, str(folder), torch.float16, on_meta=True)
    rows, tokens = model.config.vocab_size, len(load_tokenizer(str(folder)))
    yield f"names and shapes are right; vocabulary of {describe_vocabulary(rows)}; {tokens} tokens"
    if rows < tokens:
        raise UserError(f"{folder}: the tokenizer has {tokens} tokens, the model {rows} rows")
    if config.name == PUBLISHED_SYSTEM:
        yield _check_vicuna_v0(folder, model.config, tokens)


def _check_vicuna_v0(folder: Path, config: PreTrainedConfig, tokens: int) -> str:
    """Check that the folder can be Vicuna v0, for which the published file was tuned.

    Raises:
        UserError: it is another model.
    """
    if not is_llama_1(config):
        positions = getattr(config, "max_position_embeddings", "unknown")
        raise UserError(
            f"{folder}/config.json describes a {config.model_type} of {positions} positions; "
            "Vicuna v0 is a llama of 2048. LLaMA-2 and so Vicuna v1.5 or later have 4096: "
            "usable as a language model, but not with the published tuned parameters. "
            "(Names and shapes are equal; only config.json differs.)"
        )
    if tokens != LLAMA_ROWS:
        raise UserError(
            f"{folder}: the tokenizer has {describe_vocabulary(tokens)}. The published ids of new "
            f"tokens start at {LLAMA_ROWS}: save LLaMA's tokenizer into the folder"
        )
    if config.vocab_size == LLAMA_ROWS + 1:
        return "LLaMA-1's dimensions and a padding row, as merged Vicuna v0 has"
    return (
        "LLaMA-1's dimensions: names and shapes do not tell LLaMA from Vicuna v0, v1.1 or v1.3; "
        "v0 as published has 32001 rows"
    )


def _facts_of_decoder(config: Config, modality: Modality) -> Iterator[str]:
    decoder = config.decoders[modality]
    folder = find_folder(decoder.path, "model_index.json")
    yield f"{folder}"
    if not (folder / "model_index.json").is_file():
        raise MissingFileError(f"{folder}: model_index.json is missing: not a diffusers folder")
    adapter = MODALITIES[modality].decoder_class
    adapter.check_pipeline(str(folder), modality)
    for name in ("text_encoder", *adapter.networks):
        yield f"{name}: {_describe(map_folder(folder / name))}"
    captions = TextEncoder(modality, str(folder), torch.device("meta"))
    if list(captions.shape) != decoder.prompt_embeds_shape:
        raise UserError(
            f"{folder}: its prompt embeddings have shape {list(captions.shape)}, but "
            f"decoders.{modality}.prompt_embeds_shape is {decoder.prompt_embeds_shape}: set it to "
            "match"
        )
    for name, network in adapter.networks.items():
        load_pretrained(resolve_name(network), str(folder), torch.float16, name, on_meta=True)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        raise MissingFileError(f"{scheduler} is missing")
    yield f"class, names and shapes are right; prompt embeddings: {decoder.prompt_embeds_shape}"


def _facts_of_tuned(config: Config) -> Iterator[str]:
    try:
        tuned = read_delta(find_delta(config))
    except MissingFileError:
        _refuse_newer(project_path(config.save_path))
        raise
    yield f"{tuned.source}: {_describe(tuned.tensors)}"
    if tuned.source.suffix == ".pt":
        yield f"vocabulary of {describe_vocabulary(tuned.vocabulary_size + NEW_ROWS)}"
    known = load_language_model_config(config)
    if known is None:
        yield "not compared with the language model, which is missing"
        return
    model = build_on_meta(config, *known, lora=tuned.holds("lora"))
    yield from load_delta(model, tuned, NEEDED_TO_ANSWER)


def _refuse_newer(folder: Path) -> None:
    """Reject files of the newer generation of the published code in `folder`.

    Raises:
        UserError: there are such files, or a file is unreadable.
    """
    for suffix in ("*.safetensors", "*.bin", "*.pt"):
        for file in folder.glob(suffix):
            if is_newer(map_tensors(file)):
                raise UserError(
                    f"{file} is of the newer generation of the published code (parameters mm_*), "
                    "a different system: download 7b_tiva_v0"
                )


def load_language_model_config(config: Config) -> tuple[PreTrainedConfig, int] | None:
    """Load the language model's config and its tokenizer's size; None if it is missing.

    The published system's are known without its files: transformers' defaults of LLaMA are those
    of LLaMA-1 7B.

    Raises:
        UserError: a file is unreadable.
    """
    try:
        folder = str(find_folder(config.language_model.path, "config.json"))
    except MissingFileError:
        return (LlamaConfig(), LLAMA_ROWS) if config.name == PUBLISHED_SYSTEM else None
    with explain_load_errors(folder, "config.json"):
        model_config = AutoConfig.from_pretrained(folder)
    return model_config, len(load_tokenizer(folder))


def _describe(tensors: Mapping[str, Tensor]) -> str:
    """Format the number of tensors and parameters and their dtypes.

    Raises:
        UserError: weights that are not floating-point.
    """
    dtypes = {tensor.dtype for name, tensor in tensors.items() if name.endswith("weight")}
    if unsupported := dtypes.difference(_FLOATS):
        raise UserError(
            f"weights of dtype {', '.join(map(str, unsupported))}: quantized, or not weights. Use "
            "the published ones in float16, bfloat16 or float32"
        )
    count = sum(tensor.numel() for tensor in tensors.values())
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return f"{len(tensors)} tensors, {count:,} parameters, {names}"
