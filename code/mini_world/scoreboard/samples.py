"""The scoreboard's items as `samples.jsonl`, in lmms-eval's field names, and their media.

A record also holds what the scores are computed from, so that an evaluation can be continued, and
its contact sheet drawn, from the folder alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nextgpt.common.json_io import to_json
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.messages import Media, Text
from nextgpt.evaluation.sampler import MEDIA
from nextgpt.media.decoding import read_image, read_video_frames
from nextgpt.media.transforms import read_audio
from nextgpt.media.writing import Frames, Output, Sound, save_medium
from nextgpt.mini_world.media_set import render_medium
from nextgpt.mini_world.render_audio import SAMPLE_RATE
from nextgpt.mini_world.scoreboard.items import SECOND
from nextgpt.mini_world.scoreboard.runner import Result

Record = dict[str, Any]
_Named = list[tuple[Modality, str]]  # media as (modality, file in the folder)


def save_samples(results: Sequence[Result], first_id: int, seed: int, out: Path) -> list[Record]:
    """Return a record of each result; save the media of its last answer and what it refers to.

    Args:
        first_id: `doc_id` of the first.
        seed: of the rendered media.
        out: the media's files are in its folder `media`.
    """
    return [_record(first_id + index, result, seed, out) for index, result in enumerate(results)]


def read_medium(modality: Modality, path: Path) -> Output:
    """Read an image, video or audio file of any supported format.

    Raises:
        MediaError: the file is missing, broken or not of this modality.
    """
    if modality == "image":
        return read_image(path)
    if modality == "video":
        return Frames(np.stack(read_video_frames(path, lambda count, _: range(count))), 0)
    return Sound(read_audio(path, SAMPLE_RATE).numpy(), SAMPLE_RATE)


def _record(doc_id: int, result: Result, seed: int, out: Path) -> Record:
    item, last = result.item, result.answers[-1]
    kinds = [part.modality for part in last.turn.parts if isinstance(part, Media)]
    made = _save(zip(kinds, last.outputs, strict=True), f"{doc_id:06d}", out)
    files: dict[str, list[str]] = {}
    for kind, file in made:
        files.setdefault(f"{kind}s", []).append(file)
    text = last.text.strip()
    response = to_json({"text": text, **files}, ensure_ascii=False) if files else text
    return {
        "doc_id": doc_id,
        "doc": {
            "cell": item.cell,
            "held_out": item.held_out,
            "shown": [item.shown[0], asdict(item.shown[1])] if item.shown else None,
        },
        "arguments": [
            part.text for turn in item.rounds for part in turn.parts if isinstance(part, Text)
        ],
        "target": [[part.kind, part.attributes] for part in item.expected],
        "resps": [[response]],
        "filtered_resps": [response],
        "media": {"given": _save(_given(result, seed), f"{doc_id:06d}_given", out), "made": made},
        "answers": [answer.text for answer in result.answers],
        "judged": list(map(list, result.judged)),
        "right": result.score.right,
        "modalities": result.score.modalities,
        "attributes": result.score.attributes,
        "written": result.written,
        "ceiling": result.ceiling,
        "passed": result.passed,
    }


def _given(result: Result, seed: int) -> list[tuple[Modality, Output]]:
    """What the last request refers to: what is shown or, in second rounds, the first answer."""
    item, first = result.item, result.answers[0]
    if item.cell == SECOND:
        kinds = [part.modality for part in first.turn.parts if isinstance(part, Media)]
        return list(zip(kinds, first.outputs, strict=True))
    if item.shown is None:
        return []
    modality, obj, path = item.shown
    return [(modality, render_medium(path.name, modality, obj, seed))]


def _save(media: Iterable[tuple[Modality, Output]], stem: str, out: Path) -> _Named:
    """Save (modality, medium) pairs as `media/STEM_NUMBER`."""
    saved: _Named = []
    for number, (modality, medium) in enumerate(media):
        file = f"{MEDIA}/{stem}_{number}{MODALITIES[modality].suffix}"
        save_medium(medium, out / file)
        saved.append((modality, file))
    return saved
