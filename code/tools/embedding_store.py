"""Writes stores of caption embeddings; `dataset.caption_embeddings` describes and reads them."""

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nextgpt.common.errors import UserError, write_error
from nextgpt.common.io import atomic_write, atomic_write_many
from nextgpt.common.json_io import to_json
from nextgpt.common.locks import hold_lock
from nextgpt.common.modality import Modality
from nextgpt.dataset.caption_embeddings import (
    EmbeddingMaker,
    embedding_path,
    maker_file,
    read_captions,
    read_maker,
    record_file,
)


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
        self._records = record_file(folder, modality, rank)
        lock = folder / f".{self._records.name}.lock"
        with ExitStack() as stack:  # releases the lock on any error
            busy = (
                f"{self._records}: another process is writing {modality} embeddings there: wait "
                "until it ends, or use another folder"
            )
            stack.enter_context(hold_lock(lock, busy=busy))
            self._check_maker(modality, maker)
            _drop_partial_line(self._records)
            self._captions = read_captions(folder, modality)
            self._lock = stack.pop_all()

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def _check_maker(self, modality: Modality, maker: EmbeddingMaker) -> None:
        """Record `maker` in a new store; compare it with the record of an existing one."""
        file = maker_file(self.folder, modality)
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
        records = [{"name": name, "caption": text, "time_ns": now} for name, text in entries]
        try:
            with self._records.open("a", encoding="utf-8") as file:
                file.writelines(to_json(record) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(self._records, error) from error
        self._captions.update(entries)


def _drop_partial_line(file: Path) -> None:
    """Truncate an unfinished last line, left by a killed run."""
    if file.exists():
        with file.open("rb+") as stream:
            stream.truncate(stream.read().rfind(b"\n") + 1)
