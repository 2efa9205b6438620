"""Catalog of data sets: kind of annotation file and paths in the data tree, by name."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from nextgpt.common.errors import UserError
from nextgpt.common.modality import Modality
from nextgpt.conversation.messages import Conversation
from nextgpt.dataset.readers import PAIR_KINDS, Kind, Record, read_record
from nextgpt.dataset.shards import shards_of


@dataclass(frozen=True)
class DatasetEntry:
    """A data set with paths relative to the data root."""

    kind: Kind
    annotation: str
    media: str


@dataclass(frozen=True)
class DatasetSource:
    """A data set with absolute paths, and the folder of its caption embeddings."""

    name: str
    kind: Kind
    annotation: Path
    media: Path
    embeddings: Path

    def read(self, record: Record, row: int) -> Conversation:
        """Convert a record to a conversation; see `read_record`."""
        return read_record(record, self.kind, self.annotation, row)


def _pairs(name: str, file: str, modality: Modality) -> dict[str, DatasetEntry]:
    """Caption pairs, from medium to caption (`_enc`) and from caption to medium (`_dec`)."""
    kinds = zip(("enc", "dec"), PAIR_KINDS, strict=True)
    return {f"{name}_{way}": _entry(file, f"{modality}s", kind) for way, kind in kinds}


def _entry(file: str, media: str = "", kind: Kind = "instruction") -> DatasetEntry:
    """A data set with media in `media`, relative to the folder of `file`."""
    return DatasetEntry(kind, file, str(Path(file).parent / media))


_IT, _MINI = "IT_data", "mini_world/IT_data"

CATALOG: dict[str, DatasetEntry] = {
    **_pairs("cc3m", "T-X_pair_data/cc3m/cc3m.json", "image"),
    **_pairs("webvid", "T-X_pair_data/webvid/webvid.json", "video"),
    **_pairs("audiocap", "T-X_pair_data/audiocap/audiocap.json", "audio"),
    "llava_instruction": _entry(f"{_IT}/T+X-T_data/llava/llava.json", "images"),
    "alpaca_instruction": _entry(f"{_IT}/T+X-T_data/alpaca/alpaca.json"),
    "videochat_instruction": _entry(f"{_IT}/T+X-T_data/videochat/videochat.json", "videos"),
    "image_instruction": _entry(f"{_IT}/T-T+X_data/image_instruction.json"),
    "video_instruction": _entry(f"{_IT}/T-T+X_data/video_instruction.json"),
    "audio_instruction": _entry(f"{_IT}/T-T+X_data/audio_instruction.json"),
    "mosit_instruction": _entry(f"{_IT}/MosIT_data/mosit.json", "media", "interleaved"),
    **_pairs("mini_image", "mini_world/T-X_pair_data/image/image.json", "image"),
    **_pairs("mini_video", "mini_world/T-X_pair_data/video/video.json", "video"),
    **_pairs("mini_audio", "mini_world/T-X_pair_data/audio/audio.json", "audio"),
    "mini_question": _entry(f"{_MINI}/T+X-T_data/mini_question/mini_question.json"),
    "mini_request": _entry(f"{_MINI}/T-T+X_data/mini_request/mini_request.json"),
    "mini_mosit": _entry(f"{_MINI}/MosIT_data/mini_mosit/mini_mosit.json", "", "interleaved"),
    "mini_text": _entry(f"{_MINI}/text/mini_text.json"),
}


def find_entry(name: str) -> DatasetEntry:
    """Look up the entry of `name`.

    Raises:
        UserError: an unknown name; suggests the nearest known one.
    """
    if name not in CATALOG:
        nearest = difflib.get_close_matches(name, CATALOG, n=1, cutoff=0)[0]
        raise UserError(
            f"data set {name!r} is unknown: is {nearest!r} meant? Known: {', '.join(CATALOG)}"
        )
    return CATALOG[name]


def resolve_entry(name: str, data_root: Path, embed_root: Path) -> DatasetSource:
    """Resolve the paths of data set `name`; caption pairs may be WebDataset shards instead.

    Raises:
        UserError: an unknown name (suggests the nearest known one), or missing annotations.
    """
    entry = find_entry(name)
    annotation = data_root.resolve() / entry.annotation
    media = data_root.resolve() / entry.media
    if not annotation.is_file() and entry.kind in PAIR_KINDS and shards_of(annotation.parent):
        annotation = media = annotation.parent
    if not annotation.exists():
        mini = "`python -m nextgpt.mini_world.write_data` writes it"
        hint = mini if name.startswith("mini_") else "see prepare.md in its folder"
        raise UserError(f"data set {name!r}: {annotation} is missing: {hint}")
    return DatasetSource(name, entry.kind, annotation, media, embed_root.resolve())
