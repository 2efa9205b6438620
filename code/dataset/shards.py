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
        for pair in _caption_pairs(shard):
            if pair:
                yield pair, to_json(pair, ensure_ascii=False)
            skipped += pair is None
    if skipped:
        print(f"{path}: skipped {skipped} samples without a medium or a caption")


def _caption_pairs(shard: Path) -> Iterator[dict[str, str] | None]:
    """The caption pair of each sample; None without a medium or a caption."""
    specs = sorted(MODALITIES.values(), key=lambda spec: -spec.shard_priority)
    try:
        with tarfile.open(shard, "r:") as tar:
            entries = (entry for entry in tar if entry.isfile())
            for _, sample in groupby(entries, key=lambda entry: _key_and_suffix(entry.name)[0]):
                files = {_key_and_suffix(entry.name)[1]: entry for entry in sample}
                media = [(s, files[x]) for s in specs for x in s.shard_suffixes if x in files]
                caption = _caption(shard, tar, files)
                if not media or not caption:
                    yield None
                    continue
                spec, entry = media[0]
                name = PurePosixPath(entry.name).name
                member = f"{shard.name}/{entry.offset_data}+{entry.size}/{name}"
                yield {f"{spec.name}_name": member, "caption": caption}
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{shard}: not a complete tar file ({error}): download it again or remove it"
        ) from error


def _key_and_suffix(name: str) -> tuple[str, str]:
    """Split at the first dot of the file name, as WebDataset does."""
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    return str(path.with_name(stem)), f".{suffix.lower()}"


def _caption(shard: Path, tar: tarfile.TarFile, files: dict[str, tarfile.TarInfo]) -> str:
    if not (entry := files.get(".txt") or files.get(".json")):
        return ""
    content = tar.extractfile(entry).read()  # type: ignore[union-attr]
    try:
        is_text = ".txt" in files
        return (content.decode() if is_text else str(json.loads(content)["caption"] or "")).strip()
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{shard}: {entry.name} has no caption: {error}") from error
