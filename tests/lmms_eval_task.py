"""Functions of local tasks of lmms-eval, which loads this file by path."""

import re
from typing import Any

Document = dict[str, Any]


def media(document: Document) -> list[str]:
    return [document["medium"]] if document["medium"] else []


def prompt(document: Document, lmms_eval_specific_kwargs: dict | None = None) -> str:
    return document["prompt"]


def target(document: Document) -> str:
    return document["caption"]


def score(document: Document, results: list[str]) -> dict[str, Any]:
    return {"cider": (results[0], document["caption"])}


def cider(items: list[tuple[str, str]]) -> float:
    """CIDEr-D by pycocoevalcap, of words alone."""
    from pycocoevalcap.cider.cider import Cider

    found, truth = (
        {
            row: [" ".join(re.findall(r"[a-z]+", pair[side].lower()))]
            for row, pair in enumerate(items)
        }
        for side in (0, 1)
    )
    return float(Cider().compute_score(truth, found)[0])
