"""Scoring of answers, and per-cell summaries with confidence intervals and chance level."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from nextgpt.common.modality import Modality
from nextgpt.evaluation.metrics import proportion
from nextgpt.mini_world.captions import audible_attributes, parse_caption
from nextgpt.mini_world.objects import VALUES, Value
from nextgpt.mini_world.scoreboard.items import Expected, Item

Attributes = Mapping[str, Value | None]  # as judged in a medium or parsed from text


@dataclass(frozen=True)
class Score:
    """Score of one answer.

    Attributes:
        modalities: whether the answer has exactly the expected media, and text if expected.
        attributes: whether `image colour` etc. are right.
    """

    modalities: bool
    attributes: dict[str, bool]

    @property
    def right(self) -> bool:
        """Whether media and all attributes are right."""
        return self.modalities and all(self.attributes.values())


def score_answer(
    expected: Sequence[Expected], text: str, media: Sequence[tuple[Modality, Attributes]]
) -> Score:
    """Score an answer's text and its judged media; the first medium of a modality counts."""
    kinds = sorted(part.kind for part in expected if part.kind != "text")
    needs_text = any(part.kind == "text" for part in expected)
    modalities = sorted(kind for kind, _ in media) == kinds
    modalities &= bool(text.strip()) or not needs_text
    attributes = {}
    for part in expected:
        if part.kind == "text":
            found = parse_caption(text)
            found = audible_attributes(found) if part.describes_audio else found
        else:
            found = next((judged for kind, judged in media if kind == part.kind), {})
        attributes |= compare_attributes(part, found)
    return Score(modalities, attributes)


def compare_attributes(expected: Expected, found: Attributes) -> dict[str, bool]:
    """Return whether each expected attribute, as `image colour`, is found."""
    return {
        f"{expected.kind} {name}": found.get(name) == value
        for name, value in expected.attributes.items()
    }


def chance_level(items: Sequence[Item]) -> float:
    """Return the accuracy of uniform guesses with the right media."""
    return fmean(
        math.prod(1 / len(VALUES[name]) for part in item.expected for name in part.attributes)
        for item in items
    )


def summarize(items: Sequence[Item], scores: Sequence[Score]) -> dict[str, Any]:
    """Return the metrics of one cell; proportions are in 0..1."""
    names = sorted({name for score in scores for name in score.attributes})
    by_pair = {
        pairs: proportion(
            [s.right for i, s in zip(items, scores, strict=True) if i.held_out == held_out]
        )
        for pairs, held_out in (("seen_pairs", False), ("held_out_pairs", True))
    }
    return {
        **proportion([score.right for score in scores]),
        "modalities": fmean(score.modalities for score in scores),
        "attributes": {
            name: fmean(s.attributes[name] for s in scores if name in s.attributes)
            for name in names
        },
        **by_pair,
        "chance": chance_level(items),
    }
