"""Scoring: the metrics of a folder of samples, without the model that made them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nextgpt.evaluation.caption_scores import score_captions
from nextgpt.evaluation.media_scores import SCORERS, MediaSet
from nextgpt.evaluation.networks import MetricNetworks
from nextgpt.evaluation.protocols import Protocol
from nextgpt.evaluation.sampler import ANSWER, CEILING, PASSED, Record, read_samples

SHARE = "answers with a medium"
Scores = dict[str, float | None]


def score_samples(protocol: Protocol, out: Path, networks: MetricNetworks) -> dict[str, Any]:
    """Score the samples in the folder `out`.

    Returns:
        `samples`, those scored; `skipped`, those without a usable medium; `metrics`: by `answer`,
        and of generated media by `passed` and `ceiling` too, each by metric.

    Raises:
        UserError: there are no samples, or a network cannot be loaded.
        MediaError: a medium is gone or damaged.
    """
    records = read_samples(out)
    usable = [record for record in records if "error" not in record]
    if protocol.task == "describe":
        metrics = {ANSWER: _score_texts(protocol, usable, networks)}
    else:
        kinds = (ANSWER, PASSED, CEILING)
        metrics = {kind: _score_media(protocol, usable, kind, out, networks) for kind in kinds}
    return {
        "samples": len(usable),
        "skipped": len(records) - len(usable),
        "metrics": {kind: scores for kind, scores in metrics.items() if scores},
    }


def _score_texts(protocol: Protocol, records: Sequence[Record], networks: MetricNetworks) -> Scores:
    captions = [record["filtered_resps"][0] for record in records]
    references = [record["doc"]["captions"] for record in records]
    scores: Scores = dict(score_captions(captions, references))
    if captions and "SBERT-sim" in protocol.metrics and networks.config.sentence_encoder:
        scores["SBERT-sim"] = sentence_similarity(captions, references, networks)
    return scores


def sentence_similarity(
    captions: Sequence[str], references: Sequence[Sequence[str]], networks: MetricNetworks
) -> float:
    """The mean cosine of captions and their references by Sentence-BERT.

    FENSE (arXiv 2110.04684) is this with a penalty for errors in fluency.
    """
    found_ND = networks.sentence_embeddings(captions)
    flat_MD = networks.sentence_embeddings([one for several in references for one in several])
    parts = flat_MD.split([len(several) for several in references])
    cosines = [(part @ found).mean() for part, found in zip(parts, found_ND, strict=True)]
    return float(sum(cosines) / len(cosines))


def _score_media(
    protocol: Protocol, records: Sequence[Record], kind: str, out: Path, networks: MetricNetworks
) -> Scores:
    """The scores of the media of `kind`; empty if there are none."""
    there = [record for record in records if kind in record["media"]]
    if not there:
        return {SHARE: 0.0} if kind == ANSWER and records else {}
    media = MediaSet(
        [out / record["media"][kind] for record in there],
        [Path(record["doc"]["medium"]) for record in there],
        [record["doc"]["captions"][0] for record in there],
    )
    return SCORERS[protocol.modality](media, networks) | {SHARE: len(there) / len(records)}
