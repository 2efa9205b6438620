"""The store of caption embeddings: one half-precision `.npy` a medium, found by its file name.

Beside them, for each modality, `embeddings.MODALITY.json` says what made them and
`captions.MODALITY.rankN.jsonl` which caption each was made from, letter by letter as the text
encoder read it: a line a medium, written after its array; of several for a medium the latest
counts. So an interrupted run goes on, a store never mixes models or captions, and training can
compare (`dataset.caption_records`). An image of Stable Diffusion costs 118 kB, a sound 1 kB.
Writing one of a batch of 32 takes 1 to 2 ms on a busy virtual machine's disk, the flush included.
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

_BLOCK = 1 << 16  # bytes of a list read at a time


def embedding_path(folder: Path, medium: str) -> Path:
    """Where the embedding of the caption of `medium` (a file name, folders ignored) lies."""
    return folder / f"{PurePosixPath(medium).name}.npy"


def read_embedding(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Read one embedding as float32.

    Raises:
        MediaError: the file is missing or is no array.
        UserError: its shape is not `shape`: it is another decoder's.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise MediaError(
            f"{path}: no caption embedding can be read (run process_embeddings.py): {error}"
        ) from error
    if array.shape != shape:
        raise UserError(
            f"{path}: shape {array.shape}, expected {shape}. Run process_embeddings.py with the "
            "decoder of the configuration, or set its prompt_embeds_shape"
        )
    return torch.from_numpy(array.astype(np.float32))


class EmbeddingMaker(NamedTuple):
    """What a modality's embeddings in a folder were made by.

    Attributes:
        model: name of the pipeline, for messages.
        fingerprint: of its text encoder's weights.
        tokenizer: fingerprint of its tokenizer; empty in records of older versions.
        shape: of one embedding.
    """

    model: str
    fingerprint: str
    tokenizer: str
    shape: tuple[int, ...]

    def differs_from(self, other: Self) -> bool:
        """Whether the two give other embeddings, as far as their records tell."""
        tokenizers = {self.tokenizer, other.tokenizer} - {""}
        ours, theirs = (self.fingerprint, self.shape), (other.fingerprint, other.shape)
        return ours != theirs or len(tokenizers) > 1


class CaptionRecord(NamedTuple):
    """One line of a store's lists.

    Attributes:
        name: the medium's file name.
        caption: that its embedding was made from; none: it is about to be made from another one.
        time_ns: when it was written, in ns since 1970; 0 in lists of older versions.
    """

    name: str
    caption: str | None
    time_ns: int


def read_maker(folder: Path, modality: Modality) -> EmbeddingMaker | None:
    """What made the embeddings in `folder`; none where there is no record of it.

    Raises:
        UserError: the record is damaged.
    """
    file = _maker_file(folder, modality)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        tokenizer = found.get("tokenizer", "")
        shape = tuple(found["shape"])
        return EmbeddingMaker(found["model"], found["fingerprint"], tokenizer, shape)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{file} is damaged: empty the folder") from error


def caption_lists(folder: Path, modality: Modality) -> list[Path]:
    """The files that say which caption each embedding was made from."""
    return sorted(folder.glob(f"captions.{modality}.rank*.jsonl"))


def iter_caption_records(folder: Path, modality: Modality) -> Iterator[CaptionRecord]:
    """All lines of all lists in `folder`, one list after the other; memory does not grow.

    Raises:
        UserError: a line is damaged.
    """
    for file in caption_lists(folder, modality):
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith("\n"):  # another process is still writing it
                    break
                try:
                    entry = json.loads(line)
                    yield CaptionRecord(entry["name"], entry["caption"], entry.get("time_ns", 0))
                except (ValueError, TypeError, LookupError, AttributeError) as error:
                    raise UserError(
                        f"{file}: line {number} is damaged: delete the line; process_embeddings.py "
                        "makes that embedding again"
                    ) from error


class EmbeddingStore:
    """One modality's embeddings in a folder, as one rank sees and extends it.

    To be closed after use: until then no other process can write the same rank's list.
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
        """Open the store, or begin it.

        Args:
            maker: of the embeddings that will be written.
            rank: of this process; each rank writes a list of captions of its own.
            replace: make embeddings of other captions again, instead of refusing them.

        Raises:
            UserError: what is there was made by another text encoder, or another process is
                writing the same list, or the folder cannot be written.
        """
        self.folder = folder
        self._replace = replace
        self._list = folder / f"captions.{modality}.rank{rank}.jsonl"
        with ExitStack() as opened:  # whatever goes wrong, the lock is let go
            try:
                opened.enter_context(hold_lock(folder / f".{self._list.name}.lock", blocking=False))
            except Timeout:
                raise UserError(
                    f"{self._list}: another process is writing {modality} embeddings there: wait "
                    "for its end, or give another folder"
                ) from None
            self._claim(modality, maker)
            _cut_torn_line(self._list)
            latest: dict[str, CaptionRecord] = {}
            for record in iter_caption_records(folder, modality):
                if record.time_ns >= latest.get(record.name, record).time_ns:
                    latest[record.name] = record
            self._captions = {name: record.caption for name, record in latest.items()}
            self._lock = opened.pop_all()

    def close(self) -> None:
        """Let other processes write."""
        self._lock.close()

    def _claim(self, modality: Modality, maker: EmbeddingMaker) -> None:
        """Record `maker`, or see that it is the one recorded."""
        file = _maker_file(self.folder, modality)
        with hold_lock(self.folder / f".{file.name}.lock"):
            found = read_maker(self.folder, modality)
            if found is None:
                with atomic_write(file) as aside:
                    aside.write_text(to_json(maker._asdict(), indent=2) + "\n", "utf-8")
            elif found.differs_from(maker):
                raise UserError(
                    f"{file}: the embeddings here are {found.model}'s, of shape "
                    f"{list(found.shape)}; {maker.model} differs. Give another folder, or empty "
                    "this one"
                )

    def has(self, name: str, caption: str) -> bool:
        """Whether the embedding of `caption` is there for the medium `name`.

        Raises:
            UserError: the one there is of another caption, which is not to be replaced.
        """
        known = self._captions.get(name)
        if known not in (None, caption) and not self._replace:
            raise UserError(
                f"{embedding_path(self.folder, name)} was made from the caption {known!r}, not "
                f"{caption!r}. Give another folder, or --replace to make it again"
            )
        return known == caption and embedding_path(self.folder, name).exists()

    def write(self, names: Sequence[str], captions: Sequence[str], embeddings: Tensor) -> None:
        """Store `embeddings` (B, *shape), one file each, and list them.

        Raises:
            UserError: a value is not finite in half precision, or the disk is full.
        """
        arrays = embeddings.to("cpu", torch.float16).numpy()
        for name, array in zip(names, arrays, strict=True):
            if not np.isfinite(array).all():
                raise UserError(f"{name}: its caption's embedding is not finite; try another dtype")
        # First the record goes, then the array: at no moment does a record speak of another array.
        self._append([(name, None) for name in names if self._captions.get(name) is not None])
        paths = [embedding_path(self.folder, name) for name in names]
        with atomic_write_many(paths) as asides:
            for aside, array in zip(asides, arrays, strict=True):
                np.save(aside, array, allow_pickle=False)
        self._append(list(zip(names, captions, strict=True)))

    def _append(self, entries: Sequence[tuple[str, str | None]]) -> None:
        """List which caption each medium's embedding was made from, on the disk at return."""
        if not entries:
            return
        now = time.time_ns()
        records = [CaptionRecord(name, caption, now) for name, caption in entries]
        try:
            with self._list.open("a", encoding="utf-8") as file:
                file.writelines(to_json(record._asdict()) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            fault = f"could not write {self._list} (is the disk full?): {error.strerror}"
            raise UserError(fault) from error
        self._captions.update(entries)


def _maker_file(folder: Path, modality: Modality) -> Path:
    return folder / f"embeddings.{modality}.json"


def _cut_torn_line(file: Path) -> None:
    """Drop a last line that a killed run left unfinished: its embedding is made again."""
    if not file.exists():
        return
    with file.open("rb+") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end > 0:  # from the end on: a list has a line a medium
            start = max(0, end - _BLOCK)
            stream.seek(start)
            newline = stream.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        stream.truncate(end)
