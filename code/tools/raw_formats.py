"""Data sets as their publishers hand them out, and the record that is made of each row.

The file of a row is looked for under the names that downloaders give it, by asking the file system
for each, the pattern of the last one found first (4,800 rows of cc3m a second if none exists):

- cc3m, rows `caption TAB url` without a header: img2dataset's `00000/000000012.jpg`, 10,000 rows a
  folder; the row's number from 0, plain or with nine digits; the CRC-32 of the address, alone or
  after the row's number and `_`, also in `training/` and `validation/`;
- webvid, columns videoid, page_dir, name: `PAGE_DIR/VIDEOID.mp4`, `VIDEOID.mp4`;
- audiocap, columns audiocap_id, youtube_id, start_time, caption: `AUDIOCAP_ID.wav`,
  `YOUTUBE_ID.wav`, `YYOUTUBE_ID.wav`; the latter two also with `_START` or `_START_END` appended,
  in seconds or milliseconds.

Other suffixes of the modality are found too. A `.txt` file next to an image, as img2dataset writes
it, must have the row's caption.
"""

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.dataset.json_stream import iter_rows
from nextgpt.dataset.left_out import UnusableRow
from nextgpt.dataset.readers import Kind
from nextgpt.dataset.record_fields import Record, clean_caption
from nextgpt.dataset.tables import iter_delimited


class MediaFolder:
    """Finds the file of a row among the names that it may have.

    Args:
        path: the folder.
        modality: decides the suffixes; none at all is one of them.
    """

    def __init__(self, path: Path, modality: Modality) -> None:
        self._path = path
        self._suffixes = (*MODALITIES[modality].shard_suffixes, "")
        self._last = ("", "")  # pattern and suffix of the last one found

    def find(self, names: Mapping[str, str]) -> tuple[str, str]:
        """The pattern and the name of the file, relative to the folder.

        Args:
            names: without suffix, by pattern.

        Raises:
            UnusableRow: there is no such file.
        """
        pairs = [pair for pair in product(names, self._suffixes) if pair != self._last]
        for pattern, suffix in [self._last, *pairs] if self._last[0] in names else pairs:
            name = names[pattern] + suffix
            if os.path.isfile(f"{self._path}/{name}"):  # noqa: PTH113, called dozens of times a row
                self._last = (pattern, suffix)
                return pattern, name
        raise _dropped("no file")

    def check_caption(self, name: str, caption: str) -> None:
        """Compare with the `.txt` file next to the file, if there is one.

        Raises:
            UnusableRow: it has another caption: the file belongs to another row.
        """
        text = (self._path / name).with_suffix(".txt")
        if text.is_file():
            found = text.read_text(encoding="utf-8-sig", errors="replace")
            if clean_caption(found) != clean_caption(caption):
                raise _dropped("the .txt next to the file has another caption")

    def check(self, name: str) -> None:
        """Look for the file `name`.

        Raises:
            UnusableRow: it does not exist.
        """
        if not (self._path / name).is_file():
            raise _dropped("no file")


Convert = Callable[[int, Record, MediaFolder | None], tuple[Record, str]]


@dataclass(frozen=True)
class RawFormat:
    """How a publisher's file is read.

    Attributes:
        rows: yields the rows of a file.
        convert: from row number, row and media folder to a record and the pattern of its file's
            name; raises `UnusableRow`.
        kind: of the records.
        modality: of the media, if there is one.
        needs_media: whether a row's file must be looked for.
    """

    rows: Callable[[Path], Iterator[Record]]
    convert: Convert
    kind: Kind
    modality: Modality | None = None
    needs_media: bool = False


def _json_rows(raw: Path) -> Iterator[Record]:
    return (record for record, _ in iter_rows(raw))


def _tsv_rows(raw: Path) -> Iterator[Record]:
    """Rows of a TSV without quotes; a header, which some downloaders need, is left out."""
    try:
        with raw.open(encoding="utf-8-sig", newline="\n") as stream:
            for number, line in enumerate(stream):
                fields = line.rstrip("\r\n").split("\t")
                if number or [field.strip().lower() for field in fields[:2]] != ["caption", "url"]:
                    yield dict(zip(("caption", "url"), fields, strict=False))
    except UnicodeDecodeError as error:
        raise UserError(f"{raw}: not UTF-8 text: {error}") from None
    except OSError as error:
        raise UserError(f"{raw} cannot be read: {error.strerror}") from None


def _csv_rows(*columns: str) -> Callable[[Path], Iterator[Record]]:
    """A reader of CSV files with a header that has `columns`."""

    def rows(raw: Path) -> Iterator[Record]:
        for record in iter_delimited(raw):
            if missing := [column for column in columns if column not in record]:
                found = ", ".join(map(str, record))
                raise UserError(f"{raw}: no column {', '.join(missing)}: found {found}")
            yield record

    return rows


def _cc3m(row: int, record: Record, media: MediaFolder | None) -> tuple[Record, str]:
    assert media
    caption, url = _text(record, "caption"), _text(record, "url")
    key, crc = f"{row:09d}", zlib.crc32(url.encode())
    names = {"img2dataset": f"{key[:5]}/{key}", "row number": f"{row}", "padded row number": key}
    for folder in ("", "training/", "validation/"):
        names[f"{folder}ROW_CRC32"] = f"{folder}{row}_{crc}"
        names[f"{folder}CRC32"] = f"{folder}{crc}"
    pattern, name = media.find(names)
    media.check_caption(name, caption)
    return {"image_name": name, "caption": caption}, pattern


def _webvid(_: int, record: Record, media: MediaFolder | None) -> tuple[Record, str]:
    assert media
    caption, video = _text(record, "name"), _name(record, "videoid")
    names = {"videoid": video}
    if record["page_dir"]:
        names = {"page_dir/videoid": f"{_name(record, 'page_dir')}/{video}"} | names
    pattern, name = media.find(names)
    return {"video_name": name, "caption": caption}, pattern


def _audiocap(_: int, record: Record, media: MediaFolder | None) -> tuple[Record, str]:
    """A sound has up to five captions: without the row's own id, its name is no unique one."""
    assert media
    caption, own, video = (
        _text(record, "caption"), _name(record, "audiocap_id"), _name(record, "youtube_id"),
    )  # fmt: skip
    names = {"audiocap_id": own, "youtube_id": video, "Yyoutube_id": f"Y{video}"}
    if (start := str(record["start_time"] or "").removesuffix(".0")).isdecimal():
        end = int(start) + 10
        for key, stem in [*names.items()][1:]:
            names[f"{key}_start"] = f"{stem}_{start}"
            names[f"{key}_start_end"] = f"{stem}_{start}_{end}"
            names[f"{key}_start_end in ms"] = f"{stem}_{start}000_{end}000"
    pattern, name = media.find(names)
    pair = {"audio_name": name, "caption": caption}
    unique = {} if pattern == "audiocap_id" else {"embedding_name": f"{Path(name).name}.{own}"}
    return pair | unique, pattern


def _alpaca(_: int, record: Record, __: MediaFolder | None) -> tuple[Record, str]:
    question = f"{_text(record, 'instruction')}\n{record.get('input') or ''}".strip()
    return _conversation([question, _text(record, "output")]), ""


def _llava(_: int, record: Record, media: MediaFolder | None) -> tuple[Record, str]:
    texts, shown = _llava_turns(record, media)
    return _conversation(texts, "image", shown), ""


def _llava_pretrain(_: int, record: Record, media: MediaFolder | None) -> tuple[Record, str]:
    texts, shown = _llava_turns(record, media)
    if len(texts) != 2 or shown is None:
        raise _dropped("not one image with one caption")
    return {"image_name": shown, "caption": texts[1]}, ""


def _videochat(_: int, record: Record, media: MediaFolder | None) -> tuple[Record, str]:
    """VideoChat, and VideoChat2-IT, in which a question may be an instruction alone."""
    if record.get("start") is not None or record.get("end") is not None:
        raise _dropped("a section of a video (start, end), not a file")
    texts = []
    for entry in _list(record, "QA"):
        question = f"{entry.get('i') or ''}\n{entry.get('q') or ''}".strip()
        texts += [_text({"question": question}, "question"), _text(entry, "a")]
    modality = "image" if "image" in record else "video"
    name = _name(record, modality)
    if media:
        media.check(name)
    return _conversation(texts, modality, name), ""


def _llava_turns(record: Record, media: MediaFolder | None) -> tuple[list[str], str | None]:
    """The turns' texts without the placeholder, and the image's name."""
    turns = _list(record, "conversations")
    if [turn.get("from") for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise _dropped("human and gpt do not take turns")
    texts = [_text(turn, "value") for turn in turns]
    shown = _name(record, "image") if "image" in record else None
    if [text.count("<image>") for text in texts] != [int(shown is not None)] + [0] * len(texts[1:]):
        raise _dropped("not one <image>, in the first question, for the one image")
    if media and shown:
        media.check(shown)
    texts[0] = texts[0].replace("<image>", "").strip()
    return texts, shown


def _conversation(texts: list[str], modality: str = "text", name: str | None = None) -> Record:
    """A record of alternating questions and answers; a medium belongs to the first question."""
    turns = []
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        shown = modality if name and not turns else "text"
        turns.append({"from": "human", "value": question, "input_modality": shown})
        turns.append({"from": "gpt", "value": answer, "caption": "", "output_modality": "text"})
    return ({f"{modality}_name": name} if name else {}) | {"conversation": turns}


def _dropped(cause: str) -> UnusableRow:
    return UnusableRow(cause, cause)


def _text(record: Record, key: str) -> str:
    if None in record:
        raise _dropped("more fields than the header")
    if not isinstance(text := record.get(key), str) or not text.strip():
        raise _dropped(f"no {key}")
    return text.strip()


def _name(record: Record, key: str) -> str:
    if (name := _text(record, key)).startswith("/") or ".." in name.split("/"):
        raise _dropped(f"{key} outside the media folder")
    return name


def _list(record: Record, key: str) -> list[Record]:
    entries = record.get(key)
    is_list = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    if not is_list or not entries:
        raise _dropped(f"no {key}")
    return entries


_WEBVID_ROWS = _csv_rows("videoid", "page_dir", "name")
_AUDIOCAP_ROWS = _csv_rows("audiocap_id", "youtube_id", "start_time", "caption")

RAW_FORMATS = {
    "alpaca": RawFormat(_json_rows, _alpaca, "instruction"),
    "llava": RawFormat(_json_rows, _llava, "instruction", "image"),
    "llava_pretrain": RawFormat(_json_rows, _llava_pretrain, "caption_out", "image"),
    "videochat": RawFormat(_json_rows, _videochat, "instruction", "video"),
    "videochat2": RawFormat(_json_rows, _videochat, "instruction", "video"),
    "cc3m": RawFormat(_tsv_rows, _cc3m, "caption_out", "image", needs_media=True),
    "webvid": RawFormat(_WEBVID_ROWS, _webvid, "caption_out", "video", needs_media=True),
    "audiocap": RawFormat(_AUDIOCAP_ROWS, _audiocap, "caption_out", "audio", needs_media=True),
}
