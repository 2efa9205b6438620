"""Whether a run's caption embeddings are those of its captions and of its decoders."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
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

_SAMPLED_ROWS = 8  # of a data set, whose embeddings are computed again
# Relative distance of two embeddings. Half precision moves one by 0.0006, in the mini parts; the
# nearest other caption tried, one of another colour as a sound, is 0.058 away.
_NEAR = 0.03


class CaptionCheck(NamedTuple):
    """What a run is to know of its caption embeddings.

    Attributes:
        lines: what could not be checked, and which rows will be skipped, for the user.
        wrong_rows: by data set the rows whose embeddings are of other captions, (N,) int64,
            ascending; data sets without any are left out.
    """

    lines: list[str]
    wrong_rows: dict[str, np.ndarray]


def check_caption_embeddings(config: Config, dataset: ConversationDataset) -> CaptionCheck:
    """See that the embeddings are of the captions and of the text encoders configured.

    A few embeddings of other captions are samples to be skipped, like other broken ones.

    Raises:
        UserError: more than `MAX_SKIPPED_SHARE` of a data set's embeddings are of other captions
            (names the first, both captions and the command that makes it again), or all are of
            another text encoder.
    """
    findings = find_wrong_captions(config, dataset)
    wrong = {name: one.wrong_rows for name, one in findings.items() if len(one.wrong_rows)}
    lines = []
    for name, rows in wrong.items():
        size, fault = dataset.sizes[name], min(findings[name].faults.items())[1]
        counted = f"{name}: {len(rows):,} of {size:,} rows have embeddings of other captions"
        if len(rows) > MAX_SKIPPED_SHARE * size:
            raise UserError(f"{fault} ({counted}; check_data.py lists the first)")
        lines.append(f"{counted} and are skipped, first: {fault}")
    lines += [
        f"{name}: {count:,} of {finding.outputs[modality]:,} {modality} caption embeddings have no "
        f"record in {dataset.sources[name].embeddings} of the caption they were made from: they "
        "could not be checked"
        for name, finding in findings.items()
        for modality, count in finding.unrecorded.items()
        if count
    ]
    return CaptionCheck(lines + check_makers(config, dataset), wrong)


def find_wrong_captions(config: Config, dataset: ConversationDataset) -> dict[str, CaptionFinding]:
    """By data set, what of its captions is not what its embeddings were made from."""

    def command(annotation: Path, modality: Modality, folder: Path) -> str:
        path = config.decoders[modality].path
        words = [str(annotation), modality, str(folder), path, "--replace"]
        return shlex.join(["python", "process_embeddings.py", *words])

    return compare_captions(dataset, project_path(config.data.cache_dir), command)


def compare_unrecorded(
    config: Config, dataset: ConversationDataset, findings: Mapping[str, CaptionFinding]
) -> None:
    """Compare embeddings without records with what the text encoder gives, a few of each data set.

    Those that differ are added to `findings`; nothing is compared where the decoder is not on this
    machine.
    """
    for name, finding in findings.items():
        for modality in [modality for modality, count in finding.unrecorded.items() if count]:
            try:
                folder = find_folder(config.decoders[modality].path, "model_index.json")
            except MissingFileError:
                continue
            encoder = TextEncoder(modality, str(folder), choose_device())
            for row, medium in sample_outputs(dataset, name, _SAMPLED_ROWS):
                there = Path(medium.embedding or "").is_file()
                if medium.modality == modality and there and (fault := _compare(encoder, medium)):
                    finding.add_wrong_rows(np.array([row]))
                    finding.faults[row] = f"{fault} (row {row}; the first is 0)"


def _compare(encoder: TextEncoder, medium: Media) -> str | None:
    """What is wrong with the stored embedding of a medium's caption."""
    expected = encoder.encode([medium.caption or ""])[0].float().cpu()
    try:
        found = read_embedding(Path(medium.embedding or ""), tuple(expected.shape))
    except UserError as error:
        return str(error)
    distance = ((found - expected).norm() / expected.norm()).item()
    if distance < _NEAR:
        return None
    return (
        f"{medium.embedding} is not what the text encoder of decoders.{medium.modality}.path makes "
        f"of its caption {medium.caption!r} (relative distance {distance:.2g})"
    )


def check_makers(config: Config, dataset: ConversationDataset) -> list[str]:
    """See that the embeddings are of the text encoders of the configured decoders.

    Returns:
        what could not be checked, a line each.

    Raises:
        UserError: they are of another one.
    """
    folder = project_path(config.data.caption_embedding_dir).resolve()
    used = output_modalities(dataset, project_path(config.data.cache_dir))
    return [line for modality in sorted(used) for line in _check_maker(config, folder, modality)]


def _check_maker(config: Config, folder: Path, modality: Modality) -> list[str]:
    """Compare the text encoder that made a folder's embeddings with the configured decoder's."""
    made_by = read_maker(folder, modality)
    if made_by is None:
        return []  # no record of the captions, either: said already
    path = config.decoders[modality].path
    try:
        weights, tokenizer = text_encoder_fingerprints(config, modality)
    except UserError as fault:  # a stage that reads embeddings does without the decoders
        return [
            f"{folder}: it could not be checked that the {modality} embeddings are of the text "
            f"encoder of decoders.{modality}.path: {fault}"
        ]
    configured = made_by._replace(fingerprint=weights, tokenizer=tokenizer)
    if made_by.differs_from(configured):
        raise UserError(
            f"the {modality} embeddings in {folder} were made by {made_by.model}, whose text "
            f"encoder is another than that of decoders.{modality}.path {path}: set it to the one "
            "that made them, or run process_embeddings.py with it and an empty folder, and set "
            "data.caption_embedding_dir to that"
        )
    return []


def text_encoder_fingerprints(config: Config, modality: Modality) -> tuple[str, str]:
    """Fingerprints of weights and tokenizer of the text encoder of a configured decoder.

    The text encoder is loaded once for each state of its files: 2 s for Stable Diffusion's.

    Raises:
        UserError: it is not on this machine, or cannot be loaded.
    """
    folder = find_folder(config.decoders[modality].path, "model_index.json")
    inner = folder / "text_encoder"
    small = [*tokenizer_files(folder / "tokenizer"), *inner.glob("config.json")]
    files = sorted([*weight_files(inner), *small])

    def compute() -> str:
        # A run's random numbers must not depend on what was cached.
        with torch.random.fork_rng(devices=[]):
            encoder = TextEncoder(modality, str(folder), torch.device("cpu"), torch.float32)
        return " ".join(encoder.fingerprints())

    digests = DigestCache(project_path(config.data.cache_dir))
    weights, tokenizer = digests.get_or_compute("text encoder", files, compute).split()
    return weights, tokenizer
