"""The store of caption embeddings: one half-precision `.npy` a medium, found by its file name.

Beside them, for each modality, `embeddings.MODALITY.json` says what made them and
`captions.MODALITY.rankN.jsonl` which caption each was made from, a line a medium written after its
array. So an interrupted run goes on, and a store never mixes models or captions. An image of
Stable Diffusion costs 118 kB, a sound 1 kB.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from config.atomic import written_aside
from config.errors import InputError, MediaError
from config.json_text import to_json
from conversation.parts import Modality


def embedding_path(folder: Path, medium: str) -> Path:
    """Where the embedding of the caption of `medium` (a file name, folders ignored) lies."""
    return folder / f"{PurePosixPath(medium).name}.npy"


def read_embedding(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Read one embedding as float32.

    Raises:
        MediaError: the file is missing or is no array.
        InputError: its shape is not `shape`: it is another decoder's.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise MediaError(
            f"{path}: no caption embedding can be read (run process_embeddings.py): {error}"
        ) from error
    if array.shape != shape:
        raise InputError(
            f"{path}: shape {array.shape}, expected {shape}. Run process_embeddings.py with the "
            "decoder of the configuration, or set its caption_shape"
        )
    return torch.from_numpy(array.astype(np.float32))


class EmbeddingStore:
    """One modality's embeddings in a folder, as one rank sees and extends it."""

    def __init__(
        self,
        folder: Path,
        modality: Modality,
        *,
        model: str,
        fingerprint: str,
        shape: tuple[int, ...],
        rank: int = 0,
    ) -> None:
        """Open the store, or begin it.

        Args:
            model: name of the pipeline, for messages.
            fingerprint: of the text encoder's weights.
            shape: of one embedding.
            rank: of this process; each rank writes a list of captions of its own.

        Raises:
            InputError: what is there was made by another text encoder.
        """
        self.folder = folder
        self.shape = shape
        self._list = folder / f"captions.{modality}.rank{rank}.jsonl"
        about = {"model": model, "fingerprint": fingerprint, "shape": list(shape)}
        about_file = folder / f"embeddings.{modality}.json"
        if about_file.exists():
            try:
                found = json.loads(about_file.read_text(encoding="utf-8"))
                same = (found["fingerprint"], found["shape"]) == (fingerprint, list(shape))
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{about_file} is damaged: empty the folder") from error
            if not same:
                raise InputError(
                    f"{about_file}: the embeddings here are {found['model']}'s, of shape "
                    f"{found['shape']}; {model} differs. Give another folder, or empty this one"
                )
        else:
            with written_aside(about_file) as aside:
                aside.write_text(to_json(about, indent=2) + "\n", encoding="utf-8")
        _cut_torn_line(self._list)
        self._captions: dict[str, str] = {}
        for file in sorted(folder.glob(f"captions.{modality}.rank*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # else another rank is still writing it
                    entry = json.loads(line)
                    self._captions[entry["name"]] = entry["caption"]

    def has(self, name: str, caption: str) -> bool:
        """Whether the embedding of `caption` is there for the medium `name`.

        Raises:
            InputError: the one there is of another caption.
        """
        known = self._captions.get(name)
        if known is not None and known != caption:
            raise InputError(
                f"{embedding_path(self.folder, name)} was made from the caption {known!r}, not "
                f"{caption!r}. Give another folder, or empty this one"
            )
        return known is not None and embedding_path(self.folder, name).exists()

    def write(self, names: Sequence[str], captions: Sequence[str], embeddings: Tensor) -> None:
        """Store `embeddings` (B, *shape), one file each, and list them.

        Raises:
            InputError: a value is not finite in half precision, or the disk is full.
        """
        arrays = embeddings.to("cpu", torch.float16).numpy()
        for name, array in zip(names, arrays, strict=True):
            if not np.isfinite(array).all():
                raise InputError(
                    f"{name}: its caption's embedding is not finite; try another dtype"
                )
            with written_aside(embedding_path(self.folder, name)) as aside:
                np.save(aside, array, allow_pickle=False)
        entries = zip(names, captions, strict=True)
        try:
            with self._list.open("a", encoding="utf-8") as file:
                file.writelines(to_json({"name": n, "caption": c}) + "\n" for n, c in entries)
        except OSError as error:
            fault = f"could not write {self._list} (is the disk full?): {error.strerror}"
            raise InputError(fault) from error
        self._captions.update(zip(names, captions, strict=True))


def _cut_torn_line(file: Path) -> None:
    """Drop a last line that a killed run left unfinished: its embedding is made again."""
    if file.exists():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
