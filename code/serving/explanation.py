"""The fold-out below an answer, as HTML: its tokens, nearest captions and timings."""

from html import escape
from itertools import groupby

from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.messages import Media, Turn
from nextgpt.serving.answer_state import AnswerState
from nextgpt.serving.nearest_captions import Neighbours

_SPACES = str.maketrans({"Ġ": "·", "▁": "·", "Ċ": "⏎"})  # how tokenizers write space and new line
_STEPS = {
    "load": "loading components",
    "encode": "media encoder: your media to features",
    "language_model": "language model: prompt to tokens",
    "projection": "output projection: signal tokens to prompt embeddings",
    "first_word": "until the first word",
    "whole": "all together",
}


def explanation_html(state: AnswerState) -> str:
    """Render the fold-out of an answer that has ended, complete or not; all content is escaped."""
    if not state.token_names or not state.ended:
        return ""
    finished = state.finished
    nearest = ""
    if finished and finished.nearest and state.turn:
        nearest = _nearest(state.turn, finished.nearest)
    return (
        '<details class="why"><summary>Why this answer</summary>'
        f"<h4>What the language model wrote</h4>{_tokens(state.token_names)}{nearest}"
        f"{_seconds(finished.seconds) if finished else ''}"
        f"<p>Seed {state.seed}: the same seed and settings give the same answer.</p></details>"
    )


def _modality(token: str) -> Modality | None:
    """The modality whose signal token `[PREFIXn]` it is."""
    prefix = token.removeprefix("[").rstrip("]0123456789") if token.endswith("]") else None
    return next((m for m, spec in MODALITIES.items() if spec.token_prefix == prefix), None)


def _step(name: str) -> str:
    if name in MODALITIES:
        return f"{MODALITIES[name].display_name} decoder"
    return _STEPS.get(name, name)


def _tokens(names: tuple[str, ...]) -> str:
    groups = []
    for modality, group in groupby(names, _modality):
        chips = "".join(f"<code>{escape(name.translate(_SPACES))}</code>" for name in group)
        title = f"signal tokens: they call the {_step(modality)}" if modality else ""
        title = f' title="{title}"' if title else ""
        groups.append(f'<span class="span {modality or "words"}"{title}>{chips}</span>')
    return f'<p class="tokens">{"".join(groups)}</p>'


def _nearest(turn: Turn, nearest: tuple[Neighbours, ...]) -> str:
    media = [part.modality for part in turn.parts if isinstance(part, Media)]
    rows = "".join(
        f'<tr><td><span class="span {modality}">{MODALITIES[modality].display_name}</span></td>'
        f"<td>{escape(caption)}</td><td>{distance:.3g}</td></tr>"
        for modality, neighbours in zip(media, nearest, strict=True)
        for caption, distance in neighbours
    )
    return (
        "<h4>The captions nearest to the signal spans</h4>"
        "<p>The prompt embedding of each signal span against a bank of captions, embedded by the "
        "decoder's text encoder: the nearest three by mean squared distance. What is meant may "
        "have no caption in the bank.</p>"
        f"<table><tr><th>span<th>caption<th>distance</tr>{rows}</table>"
    )


def _seconds(seconds: dict[str, float]) -> str:
    longest = max(seconds.values()) or 1.0
    rows = "".join(
        f"<tr><td>{escape(_step(step))}</td><td>{taken:.2f}</td>"
        f'<td><meter min="0" max="{longest:.3f}" value="{taken:.3f}"></meter></td></tr>'
        for step, taken in seconds.items()
    )
    return f"<h4>Seconds of each step</h4><table>{rows}</table>"
