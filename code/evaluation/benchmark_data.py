"""Documents of the protocols: captions and media files, read from data sets as published.

A document is a medium with its captions. Documents are in an order drawn with a fixed seed, so that
the first N are a random subset. Own data: any file of caption pairs that training reads, such as
`[{"image_name": ..., "caption": ...}]`; rows of one file name are captions of one medium.
"""

import csv
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextgpt.common.errors import UserError
from nextgpt.common.json_io import read_json
from nextgpt.common.modality import Modality
from nextgpt.dataset.left_out import UnusableRow
from nextgpt.dataset.tables import annotation_rows


@dataclass(frozen=True)
class Document:
    """One medium of a data set.

    Attributes:
        doc_id: number in the data set, from 0.
        medium: its file, which may be missing.
        captions: unmodified, at least one.
    """

    doc_id: int
    medium: Path
    captions: tuple[str, ...]


_Captioned = Iterator[tuple[Path, str]]  # a medium's file and one of its captions


def read_documents(
    path: Path, modality: Modality, read: Callable[[Path], _Captioned]
) -> list[Document]:
    """Read the documents of a protocol.

    Args:
        path: folder in the layout that `read` knows, or a file of caption pairs.

    Raises:
        UserError: a file is missing or of another form, or no medium is there.
    """
    if path.is_file():
        pairs = _read_pairs(path, modality)
    elif path.is_dir():
        pairs = read(path)
    else:
        raise UserError(f"{path} does not exist: docs/evaluation.md describes the data")
    captions: dict[Path, list[str]] = {}
    try:
        for medium, caption in pairs:
            captions.setdefault(medium, []).append(caption)
    except (LookupError, TypeError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path}: not in the published layout ({type(error).__name__}: {error}): see "
            "docs/evaluation.md"
        ) from error
    documents = [
        Document(number, medium, tuple(several))
        for number, (medium, several) in enumerate(captions.items())
    ]
    random.Random(0).shuffle(documents)
    there = [document for document in documents if document.medium.is_file()]
    if not there:
        missing = f", such as {documents[0].medium}" if documents else ""
        raise UserError(f"{path}: none of the {len(documents)} media is there{missing}")
    if len(there) < len(documents):
        print(f"{len(documents) - len(there)} of {len(documents)} media are missing in {path}")
    return there


def read_coco(folder: Path, keep: Callable[[dict[str, Any]], bool]) -> _Captioned:
    """Yield the media and captions of `dataset_coco.json` that `keep` accepts, images with all."""
    for image in read_json(_existing(folder, "dataset_coco.json"))["images"]:
        if keep(image):
            medium = folder / image["filepath"] / image["filename"]
            yield from ((medium, sentence["raw"].strip()) for sentence in image["sentences"])


def read_coco_test(folder: Path) -> _Captioned:
    """Karpathy's test split: 5,000 images of val2014 with five captions or more."""
    return read_coco(folder, lambda image: image["split"] == "test")


def read_coco_val2014(folder: Path) -> _Captioned:
    """All 40,504 images of val2014."""
    return read_coco(folder, lambda image: image["filepath"] == "val2014")


def read_msrvtt(folder: Path) -> _Captioned:
    """The 2,990 videos of MSR-VTT's test split with 20 captions each."""
    content = read_json(_existing(folder, "test_videodatainfo.json", "MSRVTT_data.json"))
    test = {video["video_id"] for video in content["videos"] if video["split"] == "test"}
    for sentence in content["sentences"]:
        if sentence["video_id"] in test:
            yield folder / "videos" / f"{sentence['video_id']}.mp4", sentence["caption"].strip()


def read_audiocaps(folder: Path) -> _Captioned:
    """The test split of AudioCaps, clips of 10 s with five captions; files by YouTube's id."""
    with _existing(folder, "test.csv").open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            yield folder / "audios" / f"{row['youtube_id']}.wav", row["caption"].strip()


def _read_pairs(file: Path, modality: Modality) -> _Captioned:
    key, folder = f"{modality}_name", file.parent
    if (folder / f"{modality}s").is_dir():  # as in the course's data tree
        folder = folder / f"{modality}s"
    for row, (record, _) in enumerate(annotation_rows(file)):
        if isinstance(record, UnusableRow):
            continue
        if not isinstance(record.get(key), str) or not isinstance(record.get("caption"), str):
            raise UserError(
                f"{file}: row {row} (the first is 0) is no caption pair: expected {key} and caption"
            )
        yield folder / record[key], record["caption"].strip()


def _existing(folder: Path, *names: str) -> Path:
    files: Iterable[Path] = (folder / name for name in names)
    if found := next((file for file in files if file.is_file()), None):
        return found
    raise UserError(f"{folder} holds no {' or '.join(names)}: see docs/evaluation.md")
