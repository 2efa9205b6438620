"""Scores of answers, and what many of them say: shares with intervals, chance. Costs nothing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from nextgpt.common.modality import Modality
from nextgpt.evaluation.metrics import proportion
from nextgpt.mini_world.captions import audible_attributes, parse_caption
from nextgpt.mini_world.objects import VALUES, Value
from nextgpt.mini_world.scoreboard.items import Item, Wanted

Told = Mapping[str, Value | None]  # attribute to what is seen, heard or read of it


@dataclass(frozen=True)
class Score:
    """What is right of one answer.

    Attributes:
        modalities: whether the media that came are those that were wanted, in number too, and
            words where words were wanted.
        attributes: `image colour` and the like to whether it is right.
    """

    modalities: bool
    attributes: dict[str, bool]

    @property
    def right(self) -> bool:
        """Right media and every named attribute right."""
        return self.modalities and all(self.attributes.values())


def score_answer(
    wanted: Sequence[Wanted], text: str, media: Sequence[tuple[Modality, Told]]
) -> Score:
    """Score an answer's words and its media as judged; of two media of a kind the first counts."""
    kinds = sorted(one.kind for one in wanted if one.kind != "text")
    worded = any(one.kind == "text" for one in wanted)
    fits = sorted(kind for kind, _ in media) == kinds and (bool(text.strip()) or not worded)
    attributes = {}
    for one in wanted:
        if one.kind == "text":
            told = audible_attributes(parse_caption(text)) if one.heard else parse_caption(text)
        else:
            told = next((seen for kind, seen in media if kind == one.kind), {})
        attributes |= compare(one, told)
    return Score(fits, attributes)


def compare(wanted: Wanted, told: Told) -> dict[str, bool]:
    """`image colour` and the like to whether it is as wanted."""
    return {f"{wanted.kind} {n}": told.get(n) == value for n, value in wanted.attributes.items()}


def chance(items: Sequence[Item]) -> float:
    """The share that guesses would get right, had they the right media: 1 / values, multiplied."""
    return fmean(
        math.prod(1 / len(VALUES[name]) for one in item.wanted for name in one.attributes)
        for item in items
    )


def summarise(items: Sequence[Item], scores: Sequence[Score]) -> dict[str, Any]:
    """The figures of one cell; shares are between 0 and 1."""
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
        "chance": chance(items),
    }
