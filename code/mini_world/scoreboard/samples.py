"""The scoreboard's items as `samples.jsonl`, in lmms-eval's field names, and their media."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import append_json_lines, to_json
from nextgpt.common.modality import MODALITIES
from nextgpt.conversation.messages import Media, Text
from nextgpt.evaluation.sampler import MEDIA, SAMPLES
from nextgpt.media.writing import save_medium
from nextgpt.mini_world.scoreboard.runner import Result


def write_samples(results: Sequence[Result], out: Path) -> None:
    """Write a record of each item and the media of its last answer to the folder `out`."""
    records = [_record(doc_id, result, out) for doc_id, result in enumerate(results)]
    with atomic_write(out / SAMPLES) as partial:
        append_json_lines(partial, records)


def _record(doc_id: int, result: Result, out: Path) -> dict[str, Any]:
    item, last = result.item, result.answers[-1]
    files: dict[str, list[str]] = {}
    kinds = [part.modality for part in last.turn.parts if isinstance(part, Media)]
    for number, (kind, output) in enumerate(zip(kinds, last.outputs, strict=True)):
        file = f"{MEDIA}/{doc_id:06d}_{number}{MODALITIES[kind].suffix}"
        save_medium(output, out / file)
        files.setdefault(f"{kind}s", []).append(file)
    text = last.text.strip()
    response = to_json({"text": text, **files}, ensure_ascii=False) if files else text
    said = [part.text for turn in item.rounds for part in turn.parts if isinstance(part, Text)]
    return {
        "doc_id": doc_id,
        "doc": {"cell": item.cell, "held_out": item.held_out},
        "arguments": said,
        "target": [[part.kind, part.attributes] for part in item.expected],
        "resps": [[response]],
        "filtered_resps": [response],
        "right": result.score.right,
    }
