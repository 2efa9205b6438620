"""Converts downloaded instruction data to the common instruction format.

    python dataset/preprocess_dataset.py alpaca    .../alpaca/alpaca_data.json
    python dataset/preprocess_dataset.py llava     .../llava/llava_instruct_150k.json
    python dataset/preprocess_dataset.py videochat .../videochat/videochat_instruct_11k.json

writes `alpaca.json`, `llava.json`, `videochat.json` to the folder of the input, as the catalog
expects. Unusable records are dropped, counted by reason, and listed with row and reason in
`<output>.dropped.jsonl`. Streams row by row in constant memory.
"""

import argparse
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from nextgpt.common.cli import run_cli
from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import to_json
from nextgpt.dataset.json_stream import iter_rows
from nextgpt.dataset.readers import Record, read_record


class _Dropped(Exception):
    """The reason why a record is dropped."""


def preprocess(kind: str, raw: Path, output: Path) -> tuple[int, Counter[str]]:
    """Convert the usable records of `raw` (alpaca, llava or videochat) to `output`, atomically.

    Returns:
        The number of records written, and of those dropped for each reason.

    Raises:
        UserError: `raw` is not a JSON array, is also the output, or has no usable record.
    """
    if raw.resolve() == output.resolve():
        raise UserError(f"{raw} would be overwritten: give another output")
    dropped_file = output.with_suffix(".dropped.jsonl")
    written, dropped = 0, Counter[str]()
    with (
        atomic_write(dropped_file) as partial_dropped,
        atomic_write(output) as partial_rows,
        partial_dropped.open("w") as dropped_out,
        partial_rows.open("w") as rows_out,
    ):
        for row, (record, _) in enumerate(tqdm(iter_rows(raw), unit=" rows", delay=2)):
            try:
                converted = _CONVERTERS[kind](record)
            except _Dropped as why:
                dropped[str(why)] += 1
                line = {"row": row, "reason": str(why), "record": record}
                dropped_out.write(to_json(line) + "\n")
                continue
            read_record(converted, "instruction", raw, row)  # raises if the format is wrong
            rows_out.write((",\n" if written else "[\n") + to_json(converted))
            written += 1
        rows_out.write("\n]\n")
        if not written:
            raise UserError(f"{raw}: no record is usable as {kind}: {_listed(dropped)}")
    return written, dropped


def _alpaca(record: Record) -> Record:
    question = f"{_text(record, 'instruction')}\n{record.get('input') or ''}".strip()
    return _conversation([question, _text(record, "output")])


def _llava(record: Record) -> Record:
    turns = _list(record, "conversations")
    if [turn.get("from") for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise _Dropped("human and gpt do not take turns")
    texts = [_text(turn, "value") for turn in turns]
    shown = _name(record, "image") if "image" in record else None
    if [text.count("<image>") for text in texts] != [int(shown is not None)] + [0] * len(texts[1:]):
        raise _Dropped("not one <image>, in the first question, for the one image")
    texts[0] = texts[0].replace("<image>", "").strip()
    return _conversation(texts, "image", shown)


def _videochat(record: Record) -> Record:
    texts = []
    for entry in _list(record, "QA"):
        texts += [f"{entry.get('i') or ''}\n{_text(entry, 'q')}".strip(), _text(entry, "a")]
    return _conversation(texts, "video", _name(record, "video"))


_CONVERTERS = {"alpaca": _alpaca, "llava": _llava, "videochat": _videochat}


def _conversation(texts: list[str], modality: str = "text", name: str | None = None) -> Record:
    """A record of alternating questions and answers; a medium belongs to the first question."""
    turns = []
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        shown = modality if name and not turns else "text"
        turns.append({"from": "human", "value": question, "input_modality": shown})
        turns.append({"from": "gpt", "value": answer, "caption": "", "output_modality": "text"})
    return ({f"{modality}_name": name} if name else {}) | {"conversation": turns}


def _text(record: Record, key: str) -> str:
    if not isinstance(text := record.get(key), str) or not text.strip():
        raise _Dropped(f"no {key}")
    return text.strip()


def _name(record: Record, key: str) -> str:
    if (name := _text(record, key)).startswith("/") or ".." in name.split("/"):
        raise _Dropped(f"{key} outside the media folder")
    return name


def _list(record: Record, key: str) -> list[Record]:
    entries = record.get(key)
    is_list = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    if not is_list or not entries:
        raise _Dropped(f"no {key}")
    return entries


def _listed(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} ({why})" for why, count in dropped.most_common()) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=_CONVERTERS)
    parser.add_argument("raw", type=Path, help="the downloaded JSON file")
    parser.add_argument("output", type=Path, nargs="?", help="default: KIND.json, same folder")
    arguments = parser.parse_args()
    output = arguments.output or arguments.raw.with_name(f"{arguments.kind}.json")
    written, dropped = preprocess(arguments.kind, arguments.raw, output)
    print(f"{output}: {written} records; dropped: {_listed(dropped)}")


if __name__ == "__main__":
    run_cli(main)
