"""Unsupported requests: media of what the world does not have are declined in text."""

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from nextgpt.evaluation.metrics import proportion
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.events import Answer
from nextgpt.generation.settings import GenerationSettings
from nextgpt.mini_world.objects import COLOURS, SHAPES, TIMBRE_OF, Split
from nextgpt.mini_world.scoreboard.plain_talk import (
    answer_texts,
    as_conversations,
    has_media,
    read_texts,
)
from nextgpt.mini_world.scoreboard.runner import OnProgress, Timer

_SUPPORTED = re.compile("|".join((*SHAPES, *TIMBRE_OF.values(), *COLOURS, "left, right")))


def unsupported_requests(split: Split) -> list[str]:
    """Return the hundred unsupported requests of a split; none is in the training data."""
    return read_texts(f"unsupported_requests_{split}")


def score_unsupported(
    assistant: Assistant,
    requests: Sequence[str],
    settings: GenerationSettings,
    timer: Timer,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Answer unsupported requests, with at most 64 tokens each, and score the answers."""
    conversations = as_conversations(requests)
    return summarize_unsupported(
        requests, answer_texts(assistant, conversations, settings, timer, on_progress)
    )


def summarize_unsupported(requests: Sequence[str], answers: Sequence[Answer]) -> dict[str, Any]:
    """Score the answers to unsupported requests.

    Returns:
        `n`, `right` (no media generated) and its `interval`; `explained`, the proportion that also
        names what there is; `examples`.
    """
    declined = [not has_media(answer) for answer in answers]
    explained = [bool(_SUPPORTED.search(answer.text)) for answer in answers]
    return {
        **proportion(declined),
        "explained": fmean(map(all, zip(declined, explained, strict=True))),
        "examples": list(zip(requests, (answer.text for answer in answers), strict=True)),
    }
