"""WebDataset shards, as written by img2dataset and video2dataset, listed as caption pairs.

Adjacent files of one key are a sample: a medium and its caption, in `.txt` or under `caption` in
`.json`. Nothing is unpacked: a medium has the path `SHARD.tar/OFFSET+SIZE/NAME`, and its bytes are
read from there. Listing a shard of 10 000 samples takes about a second, once.
"""

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from nextgpt.common.errors import UserError
from nextgpt.common.json_io import to_json
from nextgpt.common.modality import MODALITIES
from nextgpt.dataset.json_stream import iter_rows


def shards_of(folder: Path) -> list[Path]:
    """The shards in a folder, sorted by name."""
    return sorted(folder.glob("*.tar"))


def annotation_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (record, its JSON text) of an annotation file, or caption pairs of a folder of shards.

    Samples without a medium or a caption are skipped; their count is printed at the end.

    Raises:
        UserError: the file is not a JSON array of objects, or a shard is broken.
    """
    if not path.is_dir():
        yield from iter_rows(path)
        return
    skipped = 0
    for shard in shards_of(path):
        for files in _samples(shard):
            pair = _caption_pair(shard, files)
            if pair:
                yield pair, to_json(pair, ensure_ascii=False)
            skipped += pair is None
    if skipped:
        print(f"{path}: skipped {skipped} samples without a medium or a caption")


_Files = dict[str, tuple[tarfile.TarInfo, bytes]]  # by suffix; content of text files only


def _samples(shard: Path) -> Iterator[_Files]:
    """Group the files of a shard by key."""
    try:
        with tarfile.open(shard, "r:") as tar:
            entries = (entry for entry in tar if entry.isfile())
            for _, files in groupby(entries, key=lambda entry: _key_and_suffix(entry.name)[0]):
                sample: _Files = {}
                for entry in files:
                    suffix = _key_and_suffix(entry.name)[1]
                    text = suffix in (".txt", ".json")
                    content = tar.extractfile(entry).read() if text else b""
                    sample[suffix] = entry, content
                yield sample
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{shard}: not a complete tar file ({error}): download it again or remove it"
        ) from error


def _key_and_suffix(name: str) -> tuple[str, str]:
    """Split at the first dot of the file name, as WebDataset does."""
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    return str(path.with_name(stem)), f".{suffix.lower()}"


def _caption_pair(shard: Path, files: _Files) -> dict[str, str] | None:
    caption = _caption(shard, files)
    for spec in sorted(MODALITIES.values(), key=lambda spec: -spec.shard_priority):
        for suffix in spec.shard_suffixes:
            if suffix in files and caption:
                entry, _ = files[suffix]
                name = PurePosixPath(entry.name).name
                member = f"{shard.name}/{entry.offset_data}+{entry.size}/{name}"
                return {f"{spec.name}_name": member, "caption": caption}
    return None


def _caption(shard: Path, files: _Files) -> str:
    try:
        if ".txt" in files:
            return files[".txt"][1].decode().strip()
        if ".json" in files:
            return str(json.loads(files[".json"][1])["caption"] or "").strip()
    except (ValueError, TypeError, KeyError) as error:
        (entry, _) = files.get(".txt") or files[".json"]
        raise UserError(f"{shard}: {entry.name} has no caption: {error}") from error
    return ""
