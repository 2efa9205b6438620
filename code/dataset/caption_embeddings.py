"""Store of precomputed caption embeddings: a half-precision `.npy` for each medium, by file name.

For each modality, `embeddings.MODALITY.json` identifies the text encoder and
`captions.MODALITY.rankN.jsonl` records the exact caption of each embedding: one line a medium,
appended after its array is written; of several lines for a medium the latest counts. So an
interrupted run resumes, a store never mixes models or captions, and training can compare
(`dataset.caption_records`). An image of Stable Diffusion costs 118 kB, an audio clip 1 kB; writing
one of a batch of 32 takes 1 to 2 ms on a busy virtual machine's disk, fsync included.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Self

import numpy as np
import torch
from filelock import Timeout
from torch import Tensor

from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.io import atomic_write, atomic_write_many
from nextgpt.common.json_io import to_json
from nextgpt.common.locks import hold_lock
from nextgpt.common.modality import Modality

_BLOCK = 1 << 16  # bytes read at a time from the end of a record file
_DAMAGED = (ValueError, TypeError, LookupError, AttributeError)  # raised by unexpected JSON


def embedding_path(folder: Path, medium: str) -> Path:
    """Path of the caption embedding of `medium`, a file name whose folders are ignored."""
    return folder / f"{PurePosixPath(medium).name}.npy"


def read_embedding(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Load one embedding as float32.

    Raises:
        MediaError: the file is missing or not an array.
        UserError: its shape is not `shape`: it belongs to another decoder.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise MediaError(
            f"{path}: cannot load the caption embedding (run process_embeddings.py): {error}"
        ) from error
    if array.shape != shape:
        raise UserError(
            f"{path}: shape {array.shape}, expected {shape}. Run process_embeddings.py with the "
            "decoder of the configuration, or set its prompt_embeds_shape"
        )
    return torch.from_numpy(array.astype(np.float32))


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


class CaptionRecord(NamedTuple):
    """One line of a record file.

    Attributes:
        name: the medium's file name.
        caption: of its embedding; None while the embedding is being replaced.
        time_ns: time of writing, in ns since 1970; 0 in stores of older versions.
    """

    name: str
    caption: str | None
    time_ns: int


def read_maker(folder: Path, modality: Modality) -> EmbeddingMaker | None:
    """Load the record of the text encoder of the embeddings in `folder`; None if there is none.

    Raises:
        UserError: the record is damaged.
    """
    file = _maker_file(folder, modality)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        tokenizer, shape = found.get("tokenizer", ""), tuple(found["shape"])
        return EmbeddingMaker(found["model"], found["fingerprint"], tokenizer, shape)
    except FileNotFoundError:
        return None
    except _DAMAGED as error:
        raise UserError(f"{file} is damaged: empty the folder") from error


def caption_record_files(folder: Path, modality: Modality) -> list[Path]:
    """The caption record files of all ranks."""
    return sorted(folder.glob(f"captions.{modality}.rank*.jsonl"))


def iter_caption_records(folder: Path, modality: Modality) -> Iterator[CaptionRecord]:
    """Stream the records of all ranks, file by file, in constant memory.

    Raises:
        UserError: a line is damaged.
    """
    for file in caption_record_files(folder, modality):
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith("\n"):  # another process is writing it
                    break
                try:
                    entry = json.loads(line)
                    yield CaptionRecord(entry["name"], entry["caption"], entry.get("time_ns", 0))
                except _DAMAGED as error:
                    raise UserError(
                        f"{file}: line {number} is damaged: delete it and run "
                        "process_embeddings.py, which makes that embedding again"
                    ) from error


class EmbeddingStore:
    """One modality's embeddings in a folder, extended by one rank; close it after use.

    Args:
        maker: text encoder of the embeddings that will be written.
        rank: of this process; each rank writes its own record file, under a lock.
        replace: overwrite embeddings of other captions instead of raising.

    Raises:
        UserError: the store has embeddings of another text encoder, another process writes the
            same record file, or the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        modality: Modality,
        maker: EmbeddingMaker,
        *,
        rank: int = 0,
        replace: bool = False,
    ) -> None:
        self.folder = folder
        self._replace = replace
        self._records = folder / f"captions.{modality}.rank{rank}.jsonl"
        lock = folder / f".{self._records.name}.lock"
        with ExitStack() as stack:  # releases the lock on any error
            try:
                stack.enter_context(hold_lock(lock, blocking=False))
            except Timeout:
                raise UserError(
                    f"{self._records}: another process is writing {modality} embeddings there: "
                    "wait until it ends, or use another folder"
                ) from None
            self._check_maker(modality, maker)
            _drop_partial_line(self._records)
            latest: dict[str, CaptionRecord] = {}
            for record in iter_caption_records(folder, modality):
                if record.time_ns >= latest.get(record.name, record).time_ns:
                    latest[record.name] = record
            self._captions = {name: record.caption for name, record in latest.items()}
            self._lock = stack.pop_all()

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def _check_maker(self, modality: Modality, maker: EmbeddingMaker) -> None:
        """Record `maker` in a new store; compare it with the record of an existing one."""
        file = _maker_file(self.folder, modality)
        with hold_lock(self.folder / f".{file.name}.lock"):
            found = read_maker(self.folder, modality)
            if found is None:
                with atomic_write(file) as partial:
                    partial.write_text(to_json(maker._asdict(), indent=2) + "\n", "utf-8")
            elif found.differs_from(maker):
                raise UserError(
                    f"{file}: the embeddings are {found.model}'s, of shape {list(found.shape)}; "
                    f"{maker.model} differs. Use another folder, or empty this one"
                )

    def has(self, name: str, caption: str) -> bool:
        """Whether the embedding of `caption` for the medium `name` is stored.

        Raises:
            UserError: the stored one is of another caption and may not be replaced.
        """
        known = self._captions.get(name)
        if known not in (None, caption) and not self._replace:
            raise UserError(
                f"{embedding_path(self.folder, name)} was made from the caption {known!r}, not "
                f"{caption!r}. Use another folder, or --replace to make it again"
            )
        return known == caption and embedding_path(self.folder, name).exists()

    def write(self, names: Sequence[str], captions: Sequence[str], embeddings: Tensor) -> None:
        """Store `embeddings` (B, *shape), one file each, and record their captions.

        Raises:
            UserError: a value is not finite in half precision, or the disk is full.
        """
        arrays = embeddings.to("cpu", torch.float16).numpy()
        for name, array in zip(names, arrays, strict=True):
            if not np.isfinite(array).all():
                raise UserError(f"{name}: its caption's embedding is not finite; try another dtype")
        # Invalidate records before replacing arrays: a record never refers to another array.
        self._append([(name, None) for name in names if self._captions.get(name) is not None])
        with atomic_write_many([embedding_path(self.folder, name) for name in names]) as partials:
            for partial, array in zip(partials, arrays, strict=True):
                np.save(partial, array, allow_pickle=False)
        self._append(list(zip(names, captions, strict=True)))

    def _append(self, entries: Sequence[tuple[str, str | None]]) -> None:
        """Append (name, caption) records and flush them to the disk."""
        if not entries:
            return
        now = time.time_ns()
        lines = [to_json(CaptionRecord(*entry, now)._asdict()) + "\n" for entry in entries]
        try:
            with self._records.open("a", encoding="utf-8") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self._records} (is the disk full?): {error.strerror}"
            ) from error
        self._captions.update(entries)


def _maker_file(folder: Path, modality: Modality) -> Path:
    return folder / f"embeddings.{modality}.json"


def _drop_partial_line(file: Path) -> None:
    """Truncate an unfinished last line, left by a killed run."""
    if not file.exists():
        return
    with file.open("rb+") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end > 0:  # backwards: the file has a line a medium
            start = max(0, end - _BLOCK)
            stream.seek(start)
            newline = stream.read(end - start).rfind(b"\n")
            end = start + newline + 1
            if newline >= 0:
                break
        stream.truncate(end)
