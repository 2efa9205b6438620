"""Runs a protocol: sampling on all ranks, scoring on the first, `results.json`, the report."""

import hashlib
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nextgpt.common.device import choose_device
from nextgpt.common.distributed import compute_on_rank_0, print_rank_0
from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import read_json, to_json
from nextgpt.common.paths import PROJECT_ROOT
from nextgpt.config.schema import Config
from nextgpt.evaluation.networks import MetricNetworks
from nextgpt.evaluation.protocols import Protocol
from nextgpt.evaluation.report import format_report
from nextgpt.evaluation.sampler import RUN, SamplingRun, sample
from nextgpt.evaluation.scoring import score_samples
from nextgpt.generation.assistant import Assistant, find_delta
from nextgpt.model.delta import read_delta

RESULTS = "results.json"
_PACKAGES = ("torchmetrics", "pycocoevalcap", "nltk")


@dataclass(frozen=True)
class ProtocolOptions:
    """Options of the command line.

    Attributes:
        data: the data's folder or file; None: the protocol's own folder.
        delta: tuned parameters; None: the last stage's.
        samples: number of documents; None: all.
        seed: of the media.
        sample, score: whether to do each.
    """

    data: Path | None = None
    delta: Path | None = None
    samples: int | None = None
    seed: int = 0
    sample: bool = True
    score: bool = True


def run_protocol(config: Config, protocol: Protocol, options: ProtocolOptions, out: Path) -> None:
    """Sample into the folder `out`, score what is there, and print the report; on all ranks.

    Raises:
        UserError: data, a component or a network is missing, or `out` holds another run's samples.
    """
    if (options.samples is not None and options.samples < 1) or options.seed < 0:
        raise UserError(
            f"--samples {options.samples}, --seed {options.seed}: give at least 1 and at least 0"
        )
    if options.score:
        check_packages()
    if options.sample:
        documents = protocol.documents(config, options.data)[: options.samples]
        delta = options.delta or find_delta(config)
        assistant = Assistant.from_config(config, delta)
        print_rank_0("\n".join(assistant.report))
        sample(assistant, SamplingRun(protocol, documents, out, options.seed, _identify(delta)))
        print_rank_0(f"samples in {out}")
        del assistant  # the metrics' networks may need its memory
    if options.score:
        compute_on_rank_0(lambda: _score(config, protocol, out))


def check_packages() -> None:
    """Raise a UserError that names the metrics' packages that are not installed."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(
            f"the metrics need {', '.join(missing)}: pip install -r requirements-eval.txt, or give "
            "--sample-only"
        )


def _score(config: Config, protocol: Protocol, out: Path) -> None:
    networks = MetricNetworks(config.evaluation, choose_device())
    result = score_protocol(protocol, networks, out)
    print(format_report(protocol, result))
    print(f"in {out}: {RESULTS}")


def score_protocol(protocol: Protocol, networks: MetricNetworks, out: Path) -> dict[str, Any]:
    """Score the samples in `out` and write `results.json` there.

    Raises:
        UserError: as `score_samples`, or the samples are another protocol's.
    """
    run = read_json(out / RUN) if (out / RUN).is_file() else {}
    if run.get("protocol", protocol.name) != protocol.name:
        raise UserError(f"{out} holds samples of {run['protocol']}, not of {protocol.name}")
    result = score_samples(protocol, out, networks)
    content = {"run": run, **result, "paper": dict(protocol.paper), "networks": networks.names()}
    with atomic_write(out / RESULTS) as partial:
        partial.write_text(to_json(content, indent=1) + "\n", encoding="utf-8")
    return result


def _identify(delta: Path) -> dict[str, str]:
    """The tuned parameters' file and fingerprint."""
    source = read_delta(delta).source
    return {
        "delta": os.path.relpath(source, PROJECT_ROOT),
        "fingerprint": hashlib.sha256(source.read_bytes()).hexdigest()[:16],
    }
