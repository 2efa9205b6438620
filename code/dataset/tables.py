"""Rows of annotation files of every form, as records for `dataset.readers`, in constant memory.

- `.json`: an array of objects, or JSON lines; `.jsonl`, `.ndjson`: JSON lines;
- `.csv`, `.tsv`: with a header; `.parquet`;
- a folder of WebDataset shards (`dataset.shards`);
- a folder of media, each with its caption in a `.txt` file of the same name.

A row with a caption and a file name becomes a caption pair, `{"image_name": .., "caption": ..}`;
the columns are found by their usual names. Rows of the published forms stay as they are.
"""

import csv
import mimetypes
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nextgpt.common.errors import UserError, shorten, shown
from nextgpt.common.file_digests import FileState
from nextgpt.common.json_io import to_json
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.dataset.json_stream import iter_lines, iter_rows
from nextgpt.dataset.left_out import UnusableRow
from nextgpt.dataset.shards import iter_shard_pairs, shards_of

Row = dict[str, Any]

_CAPTIONS = ("caption", "text", "description", "title", "prompt")  # the first that is there
_FILES = ("file_name", "filename", "file", "filepath", "file_path", "path", "media")
_MEDIUM = ("{}_name", "{}_file", "{}_file_name", "{}_filename", "{}_path", "{}")  # of a modality
_KEPT = ("conversation", "conversations", "QA", "instruction")  # of the published forms
_BATCH = 1024  # rows of a Parquet file in memory


def annotation_rows(path: Path) -> Iterator[tuple[Row | UnusableRow, str]]:
    """Yield (record, its JSON text) of an annotation file or folder.

    A row that cannot become a record is an `UnusableRow` instead.

    Raises:
        UserError: another form, a broken file, or no column of captions or of file names.
    """
    if path.is_dir():
        records = iter_shard_pairs(path) if shards_of(path) else _captioned_media(path)
    elif read := _TABLES.get(path.suffix.lower()):
        rows = enumerate(read(path))
        records = (_to_record(values, path, row, is_table=True) for row, values in rows)
    else:
        lines = iter_lines(path) if _form(path) == "JSON lines" else iter_rows(path)
        for row, (values, text) in enumerate(lines):
            record = _to_record(values, path, row)
            yield record, text if record is values else _as_text(record)
        return
    for record in records:
        yield record, _as_text(record)


def annotation_state(path: Path) -> Iterator[object]:
    """Yield what changes when the rows of `path` do: states of its files; media count by name."""
    if not path.is_dir():
        yield path.name, *FileState.of(path)
    elif shards := shards_of(path):
        yield from ((shard.name, *FileState.of(shard)) for shard in shards)
    else:
        for file in _files_below(path):
            is_caption = file.suffix == ".txt"
            yield str(file.relative_to(path)), *(FileState.of(file) if is_caption else ())


def describe_form(path: Path) -> str:
    """Name the form of an annotation file or folder, with the columns of a table."""
    if not path.is_dir() and path.suffix.lower() in _TABLES:
        first = next(_TABLES[path.suffix.lower()](path), {})
        return f"{path.suffix[1:].upper()} with the columns {', '.join(map(str, first))}"
    return _form(path)


def modality_of_file(name: str) -> Modality | None:
    """The modality of a media file by its name's suffix; None for other files."""
    suffix = Path(name).suffix.lower()
    kind = (mimetypes.guess_type(f"a{suffix}")[0] or "").partition("/")[0]
    specs = MODALITIES.values()
    by_suffix = (spec.name for spec in specs if suffix in spec.shard_suffixes)
    by_type = (spec.name for spec in specs if spec.media_type == kind)
    return next(by_suffix, None) or next(by_type, None)


def _as_text(record: Row | UnusableRow) -> str:
    return "" if isinstance(record, UnusableRow) else to_json(record, ensure_ascii=False)


def _form(path: Path) -> str:
    if path.is_dir():
        return "WebDataset shards" if shards_of(path) else "folder of media with .txt captions"
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return "JSON lines"
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as stream:
            is_lines = stream.read(4096).lstrip().startswith("{")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return "JSON lines" if is_lines else "JSON array"


def _to_record(values: Row, path: Path, row: int, *, is_table: bool = False) -> Row | UnusableRow:
    """The caption pair of a row, or what is wrong with it; rows of another form stay as they are.

    Raises:
        UserError: a table without the columns.
    """
    where = f"{path}: row {row} (the first is 0)"
    if None in values:
        return UnusableRow(
            "more fields than the header",
            f"{where} has more fields than the header: put fields with a delimiter into quotes",
        )
    caption, file, modality = _find_columns(tuple(values))
    if not caption or not file:
        if is_table and not any(key in values for key in _KEPT):
            raise UserError(
                f"{path}: no column of {'captions' if not caption else 'file names'}: found "
                f"{shorten(', '.join(map(str, values)))}; name it "
                f"{'caption' if not caption else 'file_name, image, video or audio'}"
            )
        return values
    name = values[file]
    modality = modality or (modality_of_file(name) if isinstance(name, str) else None)
    if modality is None:
        return UnusableRow(
            "unknown kind of file",
            f"{where}: {file} {shown(name)} is no name of an image, video or audio file: name "
            "the column image, video or audio if it is one",
        )
    if (file, caption) == (f"{modality}_name", "caption") and not is_table:
        return values
    extra = {key: values[key] for key in ("embedding_name",) if values.get(key)}
    return {f"{modality}_name": name, "caption": values[caption], **extra}


@lru_cache(maxsize=256)
def _find_columns(names: tuple[str, ...]) -> tuple[str | None, str | None, Modality | None]:
    """The columns of captions and of file names, and the modality if the latter's name tells it.

    All are None for rows of the published forms.
    """
    if any(name in _KEPT for name in names):
        return None, None, None
    lower = {str(name).lower(): name for name in reversed(names)}
    caption = next((lower[name] for name in _CAPTIONS if name in lower), None)
    for pattern in _MEDIUM:
        for modality in MODALITIES:
            if (key := pattern.format(modality)) in lower:
                return caption, lower[key], modality
    return caption, next((lower[name] for name in _FILES if name in lower), None), None


def iter_delimited(path: Path) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file with a header.

    Missing fields are None, surplus ones a list under the key None.

    Raises:
        UserError: it cannot be read, is not UTF-8, or its quotes are broken.
    """
    delimiter, reader = "\t" if path.suffix.lower() == ".tsv" else ",", None
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
            yield from reader
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: broken after line {reader and reader.line_num}: {error}"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _parquet(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file, without columns that JSON has no type for, as bytes and dates."""
    try:
        with pq.ParquetFile(path) as file:
            names = [field.name for field in file.schema_arrow if _is_json(field.type)]
            if not names:
                found = shown(file.schema_arrow.names)
                raise UserError(f"{path}: no column of text, numbers or lists: found {found}")
            for batch in file.iter_batches(_BATCH, columns=names):
                yield from batch.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a Parquet file, or broken: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _is_json(kind: pa.DataType) -> bool:
    """Whether JSON has values of this type."""
    if any(is_kind(kind) for is_kind in _JSON_HOLDERS):
        return _is_json(kind.value_type)
    if pa.types.is_struct(kind):
        return all(_is_json(field.type) for field in kind)
    return any(is_kind(kind) for is_kind in _JSON_TYPES)


_JSON_TYPES = (
    pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating,
    pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
)  # fmt: skip
_JSON_HOLDERS = (
    pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_dictionary,
)  # fmt: skip
_TABLES: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": iter_delimited,
    ".tsv": iter_delimited,
    ".parquet": _parquet,
}


def _captioned_media(folder: Path) -> Iterator[Row | UnusableRow]:
    """The caption pair of each medium; its caption is empty without a file.

    Raises:
        UserError: no media.
    """
    found = False
    for file in _files_below(folder):
        if not (modality := modality_of_file(file.name)):
            continue
        found, text = True, file.with_suffix(".txt")
        try:
            caption = text.read_text(encoding="utf-8-sig").strip() if text.is_file() else ""
        except UnicodeDecodeError as error:
            yield UnusableRow("caption not UTF-8", f"{text} is not UTF-8: {error}")
            continue
        yield {f"{modality}_name": file.relative_to(folder).as_posix(), "caption": caption}
    if not found:
        raise UserError(f"{folder} holds neither media nor WebDataset shards (.tar)")


def _files_below(folder: Path) -> Iterator[Path]:
    """All files but hidden ones, sorted by name in each folder."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))
