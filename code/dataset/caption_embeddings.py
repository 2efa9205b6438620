"""Store of precomputed caption embeddings: a half-precision `.npy` for each medium, by file name.

For each modality, `embeddings.MODALITY.json` identifies the text encoder (`EmbeddingMaker`) and
`captions.MODALITY.rankN.jsonl` records the exact caption of each embedding: one JSON line a medium,
appended after its array is written, with `name` (the medium's file name), `caption` (null while the
embedding is being replaced) and `time_ns` (time of writing since 1970; missing in stores of older
versions). Of several lines for a medium the latest counts. So an interrupted run resumes, a store
never mixes models or captions, and training can compare (`dataset.caption_records`).
`tools.embedding_store` writes it. An image of Stable Diffusion costs 118 kB, an audio clip 1 kB.
"""

import json
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.json_io import read_json
from nextgpt.common.modality import Modality

_DAMAGED = (ValueError, TypeError, LookupError, AttributeError)  # raised by unexpected JSON


def read_embedding(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Load one embedding as float32.

    Raises:
        MediaError: the file is missing or not an array.
        UserError: its shape is not `shape`: it belongs to another decoder.
    """
    try:
        # A map: a header may claim more than the file holds, or than fits in memory.
        array = np.lib.format.open_memmap(path, mode="r")
        if array.shape != shape:
            raise UserError(
                f"{path}: shape {array.shape}, expected {shape}. Run process_embeddings.py with "
                "the decoder of the configuration, or set its prompt_embeds_shape"
            )
        return torch.from_numpy(np.array(array, dtype=np.float32))
    except (OSError, ValueError, EOFError) as error:
        raise MediaError(
            f"{path}: cannot load the caption embedding (run process_embeddings.py): {error}"
        ) from error


class EmbeddingMaker(NamedTuple):
    """The text encoder of a modality's embeddings.

    Attributes:
        model: name of the pipeline, for messages.
        fingerprint: of the text encoder's weights.
        tokenizer: fingerprint of its tokenizer; empty in stores of older versions.
        shape: of one embedding.
    """

    model: str
    fingerprint: str
    tokenizer: str
    shape: tuple[int, ...]

    def differs_from(self, other: Self) -> bool:
        """Whether the two give different embeddings; an unknown tokenizer matches any."""
        tokenizers = {self.tokenizer, other.tokenizer} - {""}
        same_model = (self.fingerprint, self.shape) == (other.fingerprint, other.shape)
        return not same_model or len(tokenizers) > 1


def read_maker(folder: Path, modality: Modality) -> EmbeddingMaker | None:
    """Load the record of the text encoder of the embeddings in `folder`; None if there is none.

    Raises:
        UserError: the record is damaged.
    """
    file = maker_file(folder, modality)
    try:
        found = read_json(file)
        tokenizer, shape = found.get("tokenizer", ""), tuple(found["shape"])
        return EmbeddingMaker(found["model"], found["fingerprint"], tokenizer, shape)
    except FileNotFoundError:
        return None
    except _DAMAGED as error:
        raise UserError(f"{file} is damaged: empty the folder") from error


def read_captions(folder: Path, modality: Modality) -> dict[str, str | None]:
    """The latest recorded caption by file name; None while an embedding is being replaced.

    Raises:
        UserError: a line is damaged.
    """
    latest: dict[str, tuple[int, str | None]] = {}
    for file in sorted(folder.glob(record_file(folder, modality, "*").name)):
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith("\n"):  # another process is writing it
                    break
                try:
                    entry = json.loads(line)
                    name, caption, time = entry["name"], entry["caption"], entry.get("time_ns", 0)
                    if name not in latest or time >= latest[name][0]:
                        latest[name] = time, caption
                except _DAMAGED as error:
                    raise UserError(
                        f"{file}: line {number} is damaged: delete it and run "
                        "process_embeddings.py, which makes that embedding again"
                    ) from error
    return {name: caption for name, (_, caption) in latest.items()}


def embedding_path(folder: Path, medium: str) -> Path:
    """Path of the caption embedding of `medium`, a file name whose folders are ignored."""
    return folder / f"{PurePosixPath(medium).name}.npy"


def maker_file(folder: Path, modality: Modality) -> Path:
    """Path of the record of the text encoder."""
    return folder / f"embeddings.{modality}.json"


def record_file(folder: Path, modality: Modality, rank: int | str) -> Path:
    """Path of the caption records of one rank, or their pattern."""
    return folder / f"captions.{modality}.rank{rank}.jsonl"
