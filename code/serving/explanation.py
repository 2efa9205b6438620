"""Why it did that: what an answer was made of, as HTML that folds out below it."""

from html import escape
from itertools import groupby

from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.messages import Media, Turn
from nextgpt.serving.answer_state import AnswerState
from nextgpt.serving.scheduler import Finished

_SPACES = str.maketrans({"Ġ": "·", "▁": "·", "Ċ": "⏎"})  # how tokenizers write space and new line
_LINKS = {
    "load": "loading parts",
    "encode": "encoder: your media to features",
    "language_model": "language model: prompt to tokens",
    "projection": "projection: signal tokens to caption embeddings",
    "first_word": "until the first word",
    "whole": "all together",
}


def explanation_html(reply: AnswerState) -> str:
    """The fold-out of a reply that has ended, as far as it came; everything in it is escaped."""
    if reply.turn is None or not reply.ended:
        return ""
    return (
        '<details class="why"><summary>Why this answer</summary>'
        f"<h4>What the language model wrote</h4>{_tokens(reply.token_names)}"
        f"{_nearest(reply.turn, reply.finished) if reply.finished else ''}"
        f"{_seconds(reply.finished.seconds) if reply.finished else ''}"
        f"<p>Seed {reply.seed}: the same one and the same knobs give the same answer.</p></details>"
    )


def _kind(token: str) -> Modality | None:
    """The modality whose signal token `[PREFIXn]` it is."""
    prefix = token.removeprefix("[").rstrip("]0123456789") if token.endswith("]") else None
    return next((m for m, spec in MODALITIES.items() if spec.token_prefix == prefix), None)


def _link(name: str) -> str:
    if name in MODALITIES:
        return f"{MODALITIES[name].display_name} decoder"
    return _LINKS.get(name, name)


def _tokens(names: tuple[str, ...]) -> str:
    groups = []
    for kind, group in groupby(names, _kind):
        chips = "".join(f"<code>{escape(name.translate(_SPACES))}</code>" for name in group)
        link = f"signal tokens: they call the {_link(kind)}" if kind else ""
        title = f' title="{link}"' if kind else ""
        groups.append(f'<span class="run {kind or "words"}"{title}>{chips}</span>')
    return f'<p class="tokens">{"".join(groups)}</p>'


def _nearest(turn: Turn, finished: Finished) -> str:
    media = [part.modality for part in turn.parts if isinstance(part, Media)]
    if not media:
        return ""
    rows = "".join(
        f'<tr><td><span class="run {modality}">{MODALITIES[modality].display_name}</span></td>'
        f"<td>{escape(caption)}</td><td>{distance:.3g}</td></tr>"
        for modality, near in zip(media, finished.nearest, strict=True)
        for caption, distance in near
    )
    return (
        "<h4>Which captions the signal runs stand closest to</h4>"
        "<p>The projected signal run, and captions of the mini world by the decoder's own text "
        "encoder: the nearest three by mean squared distance. What is meant may have no caption "
        f"among them.</p><table><tr><th>run<th>caption<th>distance</tr>{rows}</table>"
    )


def _seconds(seconds: dict[str, float]) -> str:
    most = max(seconds.values()) or 1.0
    rows = "".join(
        f"<tr><td>{escape(_link(link))}</td><td>{taken:.2f}</td>"
        f'<td><meter min="0" max="{most:.3f}" value="{taken:.3f}"></meter></td></tr>'
        for link, taken in seconds.items()
    )
    return f"<h4>Seconds of each link</h4><table>{rows}</table>"
