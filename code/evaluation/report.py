"""The report of a protocol: a text table with the paper's values."""

from collections.abc import Mapping
from typing import Any

from nextgpt.evaluation.protocols import Protocol
from nextgpt.evaluation.scoring import SHARE

_NETWORK_OF = {
    "FID": "inception", "CLIPScore": "clip", "CLIPSIM": "clip", "FD": "audio_tagger",
    "KL": "audio_tagger", "IS": "audio_tagger", "CLAP score": "clap",
    "SBERT-sim": "sentence_encoder",
}  # fmt: skip


def format_report(protocol: Protocol, result: Mapping[str, Any]) -> str:
    """Format the result of `score_samples`, a line a metric.

    The columns: the system's answers; of generated media also `passed`, the caption that the
    language model wrote decoded through the decoder's text encoder, and `ceiling`, the true caption
    decoded so; `paper`, the paper's value, `-` where it is not recorded here.
    """
    metrics = result["metrics"]
    skipped = f", {result['skipped']} skipped" if result["skipped"] else ""
    lines = [f"\n{protocol.title}: {result['samples']} samples{skipped}"]
    lines.append(f"{'':<24}" + "".join(f"{kind:>10}" for kind in [*metrics, "paper"]))
    for name in [*protocol.metrics, SHARE]:
        if any(name in scores for scores in metrics.values()):
            values = [scores.get(name) for scores in metrics.values()]
            cells = [*values, protocol.paper.get(name)]
            lines.append(f"{name:<24}" + "".join(f"{_cell(value):>10}" for value in cells))
    found = {name for scores in metrics.values() for name in scores}
    for name in protocol.metrics:
        if name not in found and (key := _NETWORK_OF.get(name)):
            lines.append(f"{name}: not computed, evaluation.{key} is null")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
