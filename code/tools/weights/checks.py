"""Whether a part of the configuration is there and right, told without loading its weights.

Files are mapped, models laid out on the meta device, and the libraries' own loaders asked what
would be missing: seconds and no gigabytes for the 7B system. Of the weights' values only those of a
language model's layer norms are looked at.
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
from nextgpt.model.text_encoders import TextEncoder
from nextgpt.model.trainable import NEEDED_TO_ANSWER
from nextgpt.model.upstream_checkpoint import NEW_ROWS, is_newer
from nextgpt.tools.weights.detect import (
    LLAMA_ROWS,
    is_difference,
    is_llama_1,
    is_weight,
    norm_scale,
    say_vocabulary,
)
from nextgpt.tools.weights.registry import PartName

PUBLISHED_SYSTEM = "7b_tiva_v0"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Finding:
    """What was found of a part.

    Attributes:
        facts: in words, a line each.
        fault: what is wrong, or not there; empty if nothing.
        missing: whether the fault is that something is not there.
    """

    facts: tuple[str, ...]
    fault: str = ""
    missing: bool = False


def check_part(config: Config, part: PartName) -> Finding:
    """Look at `part` of the configuration; faults are told, not raised."""
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
    """What can be said of `part`, one after the other; ends with an UserError where it is wrong.

    That is a MissingFileError if something is not there.
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
    yield f"what sees and hears: {_describe(encoder.state_dict())}"
    yield f"names, shapes and a feature's width of {config.encoder.width} are right"


def _facts_of_language_model(config: Config) -> Iterator[str]:
    folder = find_folder(config.language_model.path, "config.json")
    tensors = {name: t for name, t in map_folder(folder).items() if is_weight(name)}
    yield f"{folder}: {_describe(tensors)}"
    if is_newer(tensors):
        raise UserError(
            f"{folder} holds a whole system of the newer generation of the published code "
            "(parameters mm_*): give the language model alone"
        )
    if is_difference(tensors):
        raise UserError(
            f"{folder} holds a delta that is not merged: its layer norms are at most "
            f"{norm_scale(tensors):.3f} on average, a model's reach 1 and more. It would load and "
            f"talk nonsense. Merge it: python merge_vicuna.py --base LLAMA_FOLDER --delta {folder}"
        )
    model = load_pretrained(AutoModelForCausalLM, str(folder), torch.float16, on_meta=True)
    rows, tokens = model.config.vocab_size, len(load_tokenizer(str(folder)))
    yield f"names and shapes are right; vocabulary of {say_vocabulary(rows)}; {tokens} tokens"
    if rows < tokens:
        raise UserError(f"{folder}: the tokenizer has {tokens} tokens, the model {rows} rows")
    if config.name == PUBLISHED_SYSTEM:
        yield _as_vicuna_v0(folder, model.config, tokens)


def _as_vicuna_v0(folder: Path, figures: PreTrainedConfig, tokens: int) -> str:
    """How far the folder can be told to be Vicuna v0, for which the published file was tuned.

    Raises:
        UserError: it is not.
    """
    if not is_llama_1(figures):
        positions = getattr(figures, "max_position_embeddings", "unknown")
        raise UserError(
            f"{folder}/config.json describes a {figures.model_type} of {positions} positions, and "
            "Vicuna v0 is a llama of 2048. 4096 are LLaMA-2's, so those of Vicuna v1.5 or later: "
            "good as a language model of your own, but not with the published tuned parameters. "
            "(Names and shapes are the same; config.json is all that says so.)"
        )
    if tokens != LLAMA_ROWS:
        raise UserError(
            f"{folder}: the tokenizer has {say_vocabulary(tokens)}. Published ids of the new "
            f"tokens begin at {LLAMA_ROWS}: save LLaMA's tokenizer into the folder"
        )
    if figures.vocab_size == LLAMA_ROWS + 1:
        return "LLaMA-1's figures and the row for padding: as Vicuna v0 is when merged"
    return (
        "LLaMA-1's figures: whether LLaMA itself or Vicuna v0, v1.1 or v1.3, names and shapes do "
        "not say; v0 as it is published has 32001 rows"
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
            f"{folder}: its caption embeddings have shape {list(captions.shape)}, but "
            f"decoders.{modality}.prompt_embeds_shape is {decoder.prompt_embeds_shape}: set it to "
            "match"
        )
    for name, network in adapter.networks.items():
        load_pretrained(resolve_name(network), str(folder), torch.float16, name, on_meta=True)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        raise MissingFileError(f"{scheduler} is missing")
    yield f"kind, names and shapes are right; captions have shape {decoder.prompt_embeds_shape}"


def _facts_of_tuned(config: Config) -> Iterator[str]:
    try:
        tuned = read_delta(find_delta(config))
    except MissingFileError:
        _refuse_newer(project_path(config.save_path))
        raise
    yield f"{tuned.source}: {_describe(tuned.tensors)}"
    if tuned.source.suffix == ".pt":
        yield f"vocabulary of {say_vocabulary(tuned.vocabulary_size + NEW_ROWS)}"
    known = language_model_figures(config)
    if known is None:
        yield "not compared with the language model, which is not there"
        return
    model = build_on_meta(config, *known, lora=tuned.holds("lora"))
    yield from load_delta(model, tuned, NEEDED_TO_ANSWER)


def _refuse_newer(folder: Path) -> None:
    """See that the files in `folder`, which has none that can be used, are not a newer system's.

    Raises:
        UserError: they are, or a file cannot be read.
    """
    for suffix in ("*.safetensors", "*.bin", "*.pt"):
        for file in folder.glob(suffix):
            if is_newer(map_tensors(file)):
                raise UserError(
                    f"{file} is of the newer generation of the published code (parameters mm_*), "
                    "another system than this: fetch those of 7b_tiva_v0"
                )


def language_model_figures(config: Config) -> tuple[PreTrainedConfig, int] | None:
    """The language model's figures, and how many tokens its tokenizer has; none if it is not there.

    For the published system they are known before it is there: transformers' defaults of LLaMA are
    the figures of LLaMA-1 7B.

    Raises:
        UserError: they cannot be read.
    """
    try:
        folder = str(find_folder(config.language_model.path, "config.json"))
    except MissingFileError:
        return (LlamaConfig(), LLAMA_ROWS) if config.name == PUBLISHED_SYSTEM else None
    with explain_load_errors(folder, "config.json"):
        figures = AutoConfig.from_pretrained(folder)
    return figures, len(load_tokenizer(folder))


def _describe(tensors: Mapping[str, Tensor]) -> str:
    """How many tensors and numbers, and of which dtype.

    Raises:
        UserError: weights that are not plain floating-point numbers.
    """
    dtypes = {tensor.dtype for name, tensor in tensors.items() if name.endswith("weight")}
    if strange := dtypes.difference(_FLOATS):
        raise UserError(
            f"weights of dtype {', '.join(map(str, strange))}: quantised, or not weights. Take the "
            "published ones in float16, bfloat16 or float32"
        )
    count = sum(tensor.numel() for tensor in tensors.values())
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return f"{len(tensors)} tensors, {count:,} numbers, {names}"
