"""Proportions and their confidence intervals."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

_Z = 1.959964  # two-sided 95 %


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval (J. Am. Stat. Assoc. 22, 1927, p. 209)."""
    if count == 0:
        return 0.0, 1.0
    mean, z2 = right / count, _Z**2
    centre = (mean + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(mean * (1 - mean) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def proportion(rights: Sequence[bool]) -> dict[str, Any]:
    """Return `n`, the proportion `right`, and its 95 % confidence `interval`."""
    low, high = wilson_interval(sum(rights), len(rights))
    mean = fmean(rights) if rights else 0.0
    return {"n": len(rights), "right": mean, "interval": [low, high]}
