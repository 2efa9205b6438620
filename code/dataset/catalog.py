"""Catalog of data sets: kind of annotation file and paths in the data tree, by name.

Other data sets are described in the configuration (`config.schema.DatasetConfig`).
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nextgpt.common.errors import UserError
from nextgpt.common.modality import Modality
from nextgpt.common.paths import project_path
from nextgpt.common.registry import look_up
from nextgpt.config.schema import DatasetConfig
from nextgpt.conversation.messages import Conversation
from nextgpt.dataset.readers import PAIR_KINDS, Kind, Record, read_record
from nextgpt.dataset.shards import shards_of


@dataclass(frozen=True)
class DatasetEntry:
    """A data set with paths relative to the data root.

    Attributes:
        published: further names of the annotation file in the same folder, as downloaded; the first
            that exists of `annotation` and these is read.
    """

    kind: Kind
    annotation: str
    media: str
    published: tuple[str, ...] = ()

    def find_annotation(self, data_root: Path) -> Path:
        """The annotation file, which need not exist; of several, rank 0 prints which is read."""
        preferred = data_root / self.annotation
        files = [preferred, *(preferred.with_name(name) for name in self.published)]
        found = [file for file in files if file.is_file()]
        if len(found) > 1 and os.environ.get("RANK", "0") == "0":
            others = ", ".join(file.name for file in found[1:])
            print(f"{found[0]} is read, and not {others} in the same folder")
        return found[0] if found else preferred


@dataclass(frozen=True)
class DatasetSource:
    """A data set with absolute paths, and the folder of its caption embeddings.

    Attributes:
        limit: number of rows, from the first on; None: all.
    """

    name: str
    kind: Kind
    annotation: Path
    media: Path
    embeddings: Path
    limit: int | None = None

    def read(self, record: Record, row: int, notes: Counter[str] | None = None) -> Conversation:
        """Convert a record to a conversation; see `read_record`."""
        return read_record(record, self.kind, self.annotation, row, self.media, notes)


def _pairs(
    name: str, file: str, modality: Modality, *published_enc: str
) -> dict[str, DatasetEntry]:
    """Caption pairs, from medium to caption (`_enc`) and from caption to medium (`_dec`)."""
    later = [Path(file).stem + suffix for suffix in ("_comprehension.json", "_generation.json")]
    published = {"enc": (later[0], *published_enc), "dec": (later[1],)}
    kinds = zip(("enc", "dec"), PAIR_KINDS, strict=True)
    return {
        f"{name}_{way}": _entry(file, f"{modality}s", kind, published[way]) for way, kind in kinds
    }


def _entry(
    file: str, media: str = "", kind: Kind = "instruction", published: tuple[str, ...] = ()
) -> DatasetEntry:
    """A data set with media in `media`, relative to the folder of `file`."""
    return DatasetEntry(kind, file, str(Path(file).parent / media), published)


def _t2x(modality: Modality) -> DatasetEntry:
    published = f"{modality}_t2x.json", f"{modality}_instruction_tuning.json"
    return _entry(f"{_IT}/T-T+X_data/{modality}_instruction.json", published=published)


_IT, _MINI = "IT_data", "mini_world/IT_data"
_LLAVA_PRETRAINING = "blip_laion_cc_sbu_558k.json"

CATALOG: dict[str, DatasetEntry] = {
    **_pairs("cc3m", "T-X_pair_data/cc3m/cc3m.json", "image", _LLAVA_PRETRAINING),
    **_pairs("webvid", "T-X_pair_data/webvid/webvid.json", "video"),
    **_pairs("audiocap", "T-X_pair_data/audiocap/audiocap.json", "audio"),
    "llava_instruction": _entry(
        f"{_IT}/T+X-T_data/llava/llava.json",
        "images",
        published=("preprocessed_llava.json", "llava_instruct_150k.json", _LLAVA_PRETRAINING),
    ),
    "alpaca_instruction": _entry(
        f"{_IT}/T+X-T_data/alpaca/alpaca.json",
        published=("preprocessed_alpaca.json", "alpaca_data.json"),
    ),
    "videochat_instruction": _entry(
        f"{_IT}/T+X-T_data/videochat/videochat.json",
        "videos",
        published=("preprocessed_videochat.json", "videochat_instruct_11k.json"),
    ),
    "image_instruction": _t2x("image"),
    "video_instruction": _t2x("video"),
    "audio_instruction": _t2x("audio"),
    "mosit_instruction": _entry(
        f"{_IT}/MosIT_data/mosit.json",
        "media",
        "interleaved",
        ("mosit_instruction_tuning.json",),
    ),
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
    return look_up("data set", name, CATALOG)


DIRECTIONS: dict[str, Kind] = {  # of data sets in the configuration
    "medium_to_caption": "caption_in",
    "caption_to_medium": "caption_out",
    "instruction": "instruction",
}


def kind_of(entry: DatasetConfig) -> Kind:
    """The kind of a configured data set.

    Raises:
        UserError: it has neither a path nor a known name.
    """
    return DIRECTIONS[entry.direction] if entry.direction else find_entry(entry.name).kind


def resolve_entry(
    configured: DatasetConfig | str, data_root: Path, embed_root: Path
) -> DatasetSource:
    """Resolve the paths of a data set; caption pairs may be WebDataset shards instead.

    Of several annotation files in its folder, the first of the entry's names is read.

    Args:
        configured: an entry of `data.datasets`, or a name of the catalog.

    Raises:
        UserError: an unknown name (suggests the nearest known one), or missing annotations.
    """
    if isinstance(configured, str):
        configured = DatasetConfig(name=configured)
    name, limit = configured.name, configured.limit
    if configured.path is not None:
        annotation = project_path(configured.path).resolve()
        if not annotation.exists():
            raise UserError(f"data.datasets: path of {name!r}: {annotation} does not exist")
        media = annotation if annotation.is_dir() else annotation.parent
        if configured.media_dir is not None:
            media = project_path(configured.media_dir).resolve()
            if not media.is_dir():
                raise UserError(f"data.datasets: media_dir of {name!r}: {media} is no folder")
        kind = kind_of(configured)
        return DatasetSource(name, kind, annotation, media, embed_root.resolve(), limit)
    entry = find_entry(name)
    annotation = entry.find_annotation(data_root.resolve())
    media = data_root.resolve() / entry.media
    if not annotation.is_file() and entry.kind in PAIR_KINDS and shards_of(annotation.parent):
        annotation = media = annotation.parent
    if not annotation.exists():
        mini = "`python -m nextgpt.mini_world.write_data` writes it"
        hint = mini if name.startswith("mini_") else "see prepare.md in its folder"
        raise UserError(f"data set {name!r}: {annotation} is missing: {hint}")
    return DatasetSource(name, entry.kind, annotation, media, embed_root.resolve(), limit)
