"""Checks that a run's caption embeddings belong to its captions and to its decoders."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from nextgpt.common.device import choose_device
from nextgpt.common.errors import MissingFileError, UserError
from nextgpt.common.file_digests import DigestCache
from nextgpt.common.modality import Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.conversation.messages import Media
from nextgpt.dataset.caption_embeddings import read_embedding, read_maker
from nextgpt.dataset.caption_records import (
    CaptionFinding,
    compare_captions,
    output_modalities,
    sample_outputs,
)
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.model.loading import find_folder, tokenizer_files, weight_files
from nextgpt.model.text_encoders import TextEncoder
from nextgpt.training.data import MAX_SKIPPED_SHARE

_SAMPLED_ROWS = 8  # of a data set, whose embeddings are recomputed
# Relative distance of two embeddings. Half precision changes one by 0.0006 in the mini components;
# the nearest caption tried, an audio caption with another colour, is 0.058 away.
_TOLERANCE = 0.03


class CaptionCheck(NamedTuple):
    """Result of `check_caption_embeddings`.

    Attributes:
        lines: what could not be checked, and which rows will be skipped.
        wrong_rows: by data set the rows whose embeddings are of other captions; data sets without
            any are left out.
    """

    lines: list[str]
    wrong_rows: dict[str, set[int]]


def check_caption_embeddings(config: Config, dataset: ConversationDataset) -> CaptionCheck:
    """Check that the embeddings belong to the captions and to the configured text encoders.

    A few embeddings of other captions are skipped like other unusable samples.

    Raises:
        UserError: more than `MAX_SKIPPED_SHARE` of a data set's embeddings are of other captions
            (names the first, both captions and the command that recomputes it), or all are of
            another text encoder.
    """
    findings = find_wrong_captions(config, dataset)
    lines, wrong_rows = [], {}
    for name, finding in findings.items():
        if not finding.wrong_rows:
            continue
        wrong_rows[name] = finding.wrong_rows
        count, size = len(finding.wrong_rows), dataset.sizes[name]
        fault = min(finding.faults.items())[1]
        counted = f"{name}: {count:,} of {size:,} rows have embeddings of other captions"
        if count > MAX_SKIPPED_SHARE * size:
            raise UserError(f"{fault} ({counted}; check_data.py lists the first)")
        lines.append(f"{counted} and are skipped, first: {fault}")
    lines += [
        f"{name}: {count:,} of {finding.outputs[modality]:,} {modality} caption embeddings have no "
        f"record of their captions in {dataset.sources[name].embeddings}: they could not be checked"
        for name, finding in findings.items()
        for modality, count in finding.unrecorded.items()
        if count
    ]
    return CaptionCheck(lines + check_makers(config, dataset), wrong_rows)


def find_wrong_captions(config: Config, dataset: ConversationDataset) -> dict[str, CaptionFinding]:
    """By data set, which captions differ from those their embeddings were computed from."""

    def command(annotation: Path, modality: Modality, folder: Path) -> str:
        path = config.decoders[modality].path
        words = [str(annotation), modality, str(folder), path, "--replace"]
        return shlex.join(["python", "process_embeddings.py", *words])

    return compare_captions(dataset, command)


def compare_unrecorded(
    config: Config, dataset: ConversationDataset, findings: Mapping[str, CaptionFinding]
) -> None:
    """Recompute a few embeddings of each data set that have no record, and add to `findings`.

    Modalities whose decoder is not on this machine are left out.
    """
    for name, finding in findings.items():
        for modality in [modality for modality, count in finding.unrecorded.items() if count]:
            try:
                folder = find_folder(config.decoders[modality].path, "model_index.json")
            except MissingFileError:
                continue
            encoder = TextEncoder(modality, str(folder), choose_device())
            for row, medium in sample_outputs(dataset, name, _SAMPLED_ROWS):
                if medium.modality != modality or not Path(medium.embedding or "").is_file():
                    continue
                if fault := _compare_with_encoder(encoder, medium):
                    finding.wrong_rows.add(row)
                    finding.faults[row] = f"{fault} (row {row}; the first is 0)"


def _compare_with_encoder(encoder: TextEncoder, medium: Media) -> str | None:
    """What is wrong with the stored embedding of a medium's caption."""
    expected = encoder.encode([medium.caption or ""])[0].float().cpu()
    try:
        stored = read_embedding(Path(medium.embedding or ""), tuple(expected.shape))
    except UserError as error:
        return str(error)
    distance = ((stored - expected).norm() / expected.norm()).item()
    if distance < _TOLERANCE:
        return None
    return (
        f"{medium.embedding} is not what the text encoder of decoders.{medium.modality}.path makes "
        f"of its caption {medium.caption!r} (relative distance {distance:.2g})"
    )


def check_makers(config: Config, dataset: ConversationDataset) -> list[str]:
    """Check that the embeddings come from the text encoders of the configured decoders.

    Returns:
        lines on what could not be checked.

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
    files = sorted([*weight_files(inner), *small])

    def compute() -> str:
        # A run's random state must not depend on what was cached.
        with torch.random.fork_rng(devices=[]):
            encoder = TextEncoder(modality, str(folder), torch.device("cpu"), torch.float32)
        return " ".join(encoder.fingerprints())

    digests = DigestCache(project_path(config.data.cache_dir))
    weights, tokenizer = digests.get_or_compute("text encoder", files, compute).split()
    return weights, tokenizer
