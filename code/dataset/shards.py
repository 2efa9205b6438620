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
from nextgpt.common.modality import MODALITIES
from nextgpt.dataset.left_out import UnusableRow


def shards_of(folder: Path) -> list[Path]:
    """The shards in a folder, sorted by name."""
    return sorted(folder.glob("*.tar"))


def iter_shard_pairs(folder: Path) -> Iterator[dict[str, Any] | UnusableRow]:
    """Yield the caption pair of each sample of a folder's shards, or what is wrong with it.

    Raises:
        UserError: a shard is broken.
    """
    for shard in shards_of(folder):
        yield from _caption_pairs(shard)


def _caption_pairs(shard: Path) -> Iterator[dict[str, Any] | UnusableRow]:
    specs = sorted(MODALITIES.values(), key=lambda spec: -spec.shard_priority)
    try:
        with tarfile.open(shard, "r:") as tar:
            entries = (entry for entry in tar if entry.isfile() and not _is_hidden(entry.name))
            for key, sample in groupby(entries, key=lambda entry: _key_and_suffix(entry.name)[0]):
                files = {_key_and_suffix(entry.name)[1]: entry for entry in sample}
                media = [(s, files[x]) for s in specs for x in s.shard_suffixes if x in files]
                if not media:
                    yield UnusableRow("sample without a medium", f"{shard}: {key} has no medium")
                    continue
                spec, entry = media[0]
                name = PurePosixPath(entry.name).name
                member = f"{shard.name}/{entry.offset_data}+{entry.size}/{name}"
                try:
                    yield {f"{spec.name}_name": member, "caption": _caption(shard, tar, files)}
                except UnusableRow as fault:
                    yield fault
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{shard}: not a complete tar file ({error}): download it again or remove it"
        ) from error


def _is_hidden(name: str) -> bool:
    """Whether a member has no name before its first dot, such as macOS's `._1.png`."""
    return not PurePosixPath(name).name.partition(".")[0]


def _key_and_suffix(name: str) -> tuple[str, str]:
    """Split at the first dot of the file name, as WebDataset does."""
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    return str(path.with_name(stem)), f".{suffix.lower()}"


def _caption(shard: Path, tar: tarfile.TarFile, files: dict[str, tarfile.TarInfo]) -> Any:
    """The caption of a sample; None without one.

    Raises:
        UnusableRow: its file is broken.
    """
    if not (entry := files.get(".txt") or files.get(".json")):
        return None
    content = tar.extractfile(entry).read()  # type: ignore[union-attr]
    try:
        caption = content.decode("utf-8-sig") if ".txt" in files else json.loads(content)["caption"]
    except UnicodeDecodeError as error:
        fault = UnusableRow("caption not UTF-8", f"{shard}: {entry.name} is not UTF-8: {error}")
        raise fault from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        fault = UnusableRow("no caption", f"{shard}: {entry.name} has no caption: {error!r}")
        raise fault from None
    return caption.strip() if isinstance(caption, str) else caption
