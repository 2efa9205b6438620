"""Checks by content of what a run is built from, at its start and when it is resumed.

- Inputs are identified when a run starts and compared when it is resumed: the predecessor's delta,
  the rows of the data sets, the caption embeddings, the frozen models; not the media files. Costs
  1 s per GiB of weights the first time they are seen (`DigestCache`).
- Caption embeddings must belong to the run's captions and to its decoders' text encoders.
"""

import hashlib
import shlex
from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from nextgpt.common.errors import MissingFileError, UserError
from nextgpt.common.file_digests import DigestCache
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import read_json, to_json
from nextgpt.common.modality import Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.dataset.caption_embeddings import read_maker
from nextgpt.dataset.caption_records import (
    CaptionFinding,
    compare_captions,
    output_modalities,
    sample_outputs,
)
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.dataset.left_out import MAX_SKIPPED_SHARE
from nextgpt.decoders.denoising import denoiser_files
from nextgpt.decoders.text_encoders import TextEncoder
from nextgpt.model.imagebind import fingerprint
from nextgpt.model.loading import find_folder, tokenizer_files, weight_files

RunInputs = dict[str, Any]  # as in the file: by section, by name, the identity
_Identity = dict[str, Any]  # digests, and the `file`, which may differ

_SAMPLED_ROWS = 8  # of a data set, whose embeddings are hashed


def identify_inputs(
    config: Config, dataset: ConversationDataset, predecessor: Path | None
) -> RunInputs:
    """Identify by content what a run with this configuration is built from.

    Args:
        predecessor: file of the delta that the run starts from.

    Raises:
        UserError: a file cannot be read, or changes meanwhile.
    """
    cache_dir = project_path(config.data.cache_dir)
    digests, outputs = DigestCache(cache_dir), output_modalities(dataset)
    online = config.data.caption_embeddings == "online"
    return {
        "predecessor": predecessor
        and {"file": str(predecessor), "digest": digests.digest(predecessor)},
        "datasets": identify_datasets(dataset),
        "caption_embeddings": {} if online else _identify_embeddings(config, dataset, outputs),
        "frozen": _identify_frozen(config, dataset, outputs if online else set(), digests),
    }


def identify_datasets(dataset: ConversationDataset) -> dict[str, _Identity]:
    """By name the rows of the data sets."""
    files = {name: str(source.annotation) for name, source in dataset.sources.items()}
    return {
        name: {"file": files[name], "rows": len(index), "digest": index.digest}
        for name, index in dataset.indexes.items()
    }


def write_inputs(inputs: RunInputs, file: Path) -> None:
    """Write the result of `identify_inputs`."""
    with atomic_write(file) as partial:
        partial.write_text(to_json(inputs, indent=1) + "\n", encoding="utf-8")


def read_inputs(file: Path) -> RunInputs | None:
    """The inputs in `file`; None if it does not exist.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return read_json(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{file} is damaged: give --restart") from error


def compare_inputs(before: RunInputs, now: RunInputs) -> list[str]:
    """Lines on what differs from the start of the run.

    What was missing either time is not compared: a run that needs it fails by itself.
    """
    lines = _compare("predecessor", before["predecessor"], now["predecessor"])
    for section in ("datasets", "frozen"):
        for name, identity in before[section].items():
            if name in now[section]:
                lines += _compare(name, identity, now[section][name])
    for modality in before["caption_embeddings"].keys() & now["caption_embeddings"].keys():
        old, new = (inputs["caption_embeddings"][modality] for inputs in (before, now))
        name = f"{modality} caption embeddings in {new['folder']}"
        other_maker = _compare(name, old["maker"], new["maker"]) if old["maker"] else []
        both = old["arrays"].keys() & new["arrays"].keys()
        changed = [file for file in both if old["arrays"][file] != new["arrays"][file]]
        if changed and not other_maker:
            lines.append(
                f"{name}: of {len(both)} looked at {len(changed)} are others than then, first "
                f"{min(changed)}"
            )
        lines += other_maker
    return sorted(lines)


def _compare(name: str, before: _Identity | None, now: _Identity | None) -> list[str]:
    """A line if the content differs."""
    old, new = ({**(one or {}), "file": None} for one in (before, now))
    return [f"{name}: {_format(before)} then, {_format(now)} now"] if old != new else []


def _format(identity: _Identity | None) -> str:
    formats = {"file": "{}", "rows": "{:,} rows"}
    words = [
        formats[key].format(value) if key in formats else f"{key} {str(value)[:12]}"
        for key, value in (identity or {}).items()
    ]
    return ", ".join(words) or "nothing"


def _identify_embeddings(
    config: Config, dataset: ConversationDataset, modalities: Set[Modality]
) -> dict[str, _Identity]:
    """By modality what computed the embeddings, and digests of a few."""
    folder = project_path(config.data.caption_embedding_dir).resolve()
    identities: dict[str, _Identity] = {}
    for modality in modalities:
        made_by = None
        if maker := read_maker(folder, modality):
            made_by = {
                "file": maker.model, "fingerprint": maker.fingerprint, "tokenizer": maker.tokenizer,
                "shape": list(maker.shape),
            }  # fmt: skip
        identities[modality] = {"folder": str(folder), "maker": made_by, "arrays": {}}
    for name in dataset.sources:
        for _, medium in sample_outputs(dataset, name, _SAMPLED_ROWS):
            file = Path(medium.embedding or "")
            if file.is_file():  # samples without one are skipped
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                identities[medium.modality]["arrays"][file.name] = digest
    return identities


def _identify_frozen(
    config: Config, dataset: ConversationDataset, encoded: Set[Modality], digests: DigestCache
) -> dict[str, _Identity]:
    """By name the frozen models on this machine; text encoders of the modalities `encoded`."""
    folder = find_folder(config.language_model.path, "config.json")
    files = [*weight_files(folder), folder / "config.json", *tokenizer_files(folder)]
    digest = digests.digest_files({str(file.relative_to(folder)): file for file in files})
    identities: dict[str, _Identity] = {"language model": {"file": str(folder), "digest": digest}}
    if any(source.kind != "caption_out" for source in dataset.sources.values()):
        path = project_path(config.encoder.path)
        with suppress(MissingFileError):  # conversations without media need none
            digest = fingerprint(path, digests)
            identities["media encoder"] = {"file": str(path), "digest": digest}
    for modality in encoded:
        weights, tokenizer = text_encoder_fingerprints(config, modality)
        identities[f"text encoder of the {modality} decoder"] = {
            "file": config.decoders[modality].path, "weights": weights, "tokenizer": tokenizer
        }  # fmt: skip
    for modality in config.training.denoised_modalities:
        folder = find_folder(config.decoders[modality].path, "model_index.json")
        identities[f"{modality} decoder, for the denoising loss"] = {
            "file": str(folder), "digest": digests.digest_files(denoiser_files(folder))
        }  # fmt: skip
    return identities


def check_caption_embeddings(
    config: Config, dataset: ConversationDataset
) -> tuple[list[str], dict[str, set[int]]]:
    """Check that the embeddings belong to the captions and to the configured text encoders.

    A few embeddings of other captions are skipped like other unusable samples.

    Returns:
        Lines on what could not be checked and what is skipped; by data set with any, the rows whose
        embeddings are of other captions.

    Raises:
        UserError: more than `MAX_SKIPPED_SHARE` of a data set's embeddings are of other captions
            (names the first, both captions and the command that recomputes it), or all are of
            another text encoder.
    """
    lines, wrong_rows = [], {}
    for name, finding in find_wrong_captions(config, dataset).items():
        if count := len(finding.wrong_rows):
            wrong_rows[name] = finding.wrong_rows
            fault, size = finding.faults[min(finding.faults)], dataset.sizes[name]
            counted = f"{name}: {count:,} of {size:,} rows have embeddings of other captions"
            if count > MAX_SKIPPED_SHARE * size:
                raise UserError(f"{fault} ({counted}; check_data.py lists the first)")
            lines.append(f"{counted} and are skipped, first: {fault}")
        lines += [
            f"{name}: {count:,} of {finding.outputs[modality]:,} {modality} caption embeddings "
            f"have no record of their captions in {dataset.sources[name].embeddings}: they could "
            "not be checked"
            for modality, count in finding.unrecorded.items()
            if count
        ]
    return lines + check_makers(config, dataset), wrong_rows


def find_wrong_captions(config: Config, dataset: ConversationDataset) -> dict[str, CaptionFinding]:
    """By data set, which captions differ from those their embeddings were computed from."""

    def command(annotation: Path, modality: Modality, folder: Path) -> str:
        words = [str(annotation), modality, str(folder), config.decoders[modality].path]
        return shlex.join(["python", "process_embeddings.py", *words, "--replace"])

    return compare_captions(dataset, command)


def check_makers(config: Config, dataset: ConversationDataset) -> list[str]:
    """Check that the embeddings come from the configured decoders' text encoders.

    Returns:
        Lines on what could not be checked.

    Raises:
        UserError: they come from another one.
    """
    folder = project_path(config.data.caption_embedding_dir).resolve()
    lines = []
    for modality in sorted(output_modalities(dataset)):
        maker = read_maker(folder, modality)
        if maker is None:
            continue  # then the captions have no record either, which is reported
        path = config.decoders[modality].path
        try:
            weights, tokenizer = text_encoder_fingerprints(config, modality)
        except UserError as fault:  # a stage that reads embeddings does without the decoders
            lines.append(
                f"{folder}: whether the {modality} embeddings are of the text encoder of "
                f"decoders.{modality}.path could not be checked: {fault}"
            )
            continue
        if maker.differs_from(maker._replace(fingerprint=weights, tokenizer=tokenizer)):
            raise UserError(
                f"the {modality} embeddings in {folder} were made by {maker.model}, whose text "
                f"encoder is another than that of decoders.{modality}.path {path}: set it to the "
                "one that made them, or run process_embeddings.py with it and an empty folder, and "
                "set data.caption_embedding_dir to that"
            )
    return lines


def text_encoder_fingerprints(config: Config, modality: Modality) -> tuple[str, str]:
    """Fingerprints of weights and tokenizer of a configured decoder's text encoder.

    The text encoder is loaded once per state of its files: 2 s for Stable Diffusion's.

    Raises:
        UserError: it is not on this machine, or cannot be loaded.
    """
    folder = find_folder(config.decoders[modality].path, "model_index.json")
    inner = folder / "text_encoder"
    small = [*tokenizer_files(folder / "tokenizer"), *inner.glob("config.json")]

    def compute() -> str:
        # A run's random state must not depend on what was cached.
        with torch.random.fork_rng(devices=[]):
            encoder = TextEncoder(modality, str(folder), torch.device("cpu"), torch.float32)
        return " ".join(encoder.fingerprints())

    digests = DigestCache(project_path(config.data.cache_dir))
    files = sorted([*weight_files(inner), *small])
    weights, tokenizer = digests.get_or_compute("text encoder", files, compute).split()
    return weights, tokenizer
