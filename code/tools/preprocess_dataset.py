"""Converts data sets as downloaded to the formats of training.

    python dataset/preprocess_dataset.py alpaca         .../alpaca/alpaca_data.json
    python dataset/preprocess_dataset.py llava          .../llava/llava_instruct_150k.json
    python dataset/preprocess_dataset.py videochat      .../videochat/videochat_instruct_11k.json
    python dataset/preprocess_dataset.py cc3m           .../cc3m/Train_GCC-training.tsv
    python dataset/preprocess_dataset.py webvid         .../webvid/results_2M_train.csv
    python dataset/preprocess_dataset.py audiocap       .../audiocap/train.csv
    python dataset/preprocess_dataset.py llava_pretrain .../blip_laion_cc_sbu_558k.json
    python dataset/preprocess_dataset.py videochat2     .../videochat2.json

writes `alpaca.json`, `llava.json`, ... to the folder of the input, as the catalog expects. The last
two are not in the catalog: name the output in `data.datasets`. Unusable rows, such as those without
a file, are dropped, counted by reason, and listed with row and reason in `<output>.dropped.jsonl`.
Streams row by row in constant memory; run again after an interruption, it continues.
"""

import argparse
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from nextgpt.common.cli import run_cli
from nextgpt.common.errors import UserError
from nextgpt.common.file_digests import FileState
from nextgpt.dataset.left_out import UnusableRow
from nextgpt.dataset.readers import read_record
from nextgpt.tools.raw_formats import RAW_FORMATS, MediaFolder
from nextgpt.tools.resumable_output import open_output


class Summary(NamedTuple):
    """Number of records written, of rows dropped by reason, of files found by pattern."""

    written: int
    dropped: Counter[str]
    found: Counter[str]


def preprocess(kind: str, raw: Path, output: Path, media: Path | None = None) -> Summary:
    """Convert the usable rows of `raw` to `output`, atomically.

    Args:
        kind: a key of `RAW_FORMATS`.
        media: folder of the files; by default, for formats that do not name them, `images`,
            `videos` or `audios` next to `raw`. For other formats, None: no file is looked for.

    Raises:
        UserError: `raw` is of another form, is also the output, or has no usable row, or the media
            folder is missing.
    """
    raw_format = RAW_FORMATS[kind]
    if raw.resolve() == output.resolve():
        raise UserError(f"{raw} would be overwritten: give another output")
    if not raw.is_file():
        raise UserError(f"{raw} is no file")
    if raw_format.needs_media and media is None:
        media = raw.with_name(f"{raw_format.modality}s")
    if media and not media.is_dir():
        raise UserError(f"{media} is no folder: give the folder of the media with --media")
    folder = MediaFolder(media, raw_format.modality) if media and raw_format.modality else None
    identity = {
        "kind": kind, "raw": str(raw.resolve()), "state": list(FileState.of(raw)),
        "media": str(media and media.resolve()),
    }  # fmt: skip
    with open_output(output, output.with_suffix(".dropped.jsonl"), identity) as out:
        rows = enumerate(tqdm(raw_format.rows(raw), unit=" rows", delay=2))
        for row, record in islice(rows, out.rows, None):
            try:
                converted, pattern = raw_format.convert(row, record, folder)
                read_record(converted, raw_format.kind, raw, row)
            except UnusableRow as why:
                out.drop(why.cause, record)
                continue
            if pattern:
                out.count("found", pattern)
            out.write(converted)
        counts = [out.counts.get(name, Counter()) for name in ("dropped", "found")]
        if not out.written:
            raise UserError(f"{raw}: no record is usable as {kind}: {_listed(counts[0])}")
    return Summary(out.written, *counts)


def _listed(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} ({name})" for name, count in ordered) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=RAW_FORMATS)
    parser.add_argument("raw", type=Path, help="the downloaded file")
    parser.add_argument("output", type=Path, nargs="?", help="default: KIND.json, same folder")
    parser.add_argument("--media", type=Path, help="folder of the media files")
    arguments = parser.parse_args()
    output = arguments.output or arguments.raw.with_name(f"{arguments.kind}.json")
    summary = preprocess(arguments.kind, arguments.raw, output, arguments.media)
    print(f"{output}: {summary.written} records; dropped: {_listed(summary.dropped)}")
    if summary.found:
        print(f"files found by name: {_listed(summary.found)}")


if __name__ == "__main__":
    run_cli(main)
