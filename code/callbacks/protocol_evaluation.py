"""Evaluation of a protocol's first samples while a stage trains, logged with the losses.

All ranks answer, rank 0 scores. Samples, media and `results.json` of each evaluation stay in the
stage's folder, `evaluation/step_N`. It costs the answers and their media: 16 images of Stable
Diffusion, with caption passing, are 48 decodings.
"""

import shutil
import time
from pathlib import Path

from nextgpt.callbacks.run_assistant import RunAssistant, refuse_zero_3
from nextgpt.common.distributed import compute_on_rank_0, print_rank_0
from nextgpt.common.errors import UserError
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.evaluation.networks import MetricNetworks
from nextgpt.evaluation.protocols import find_protocol
from nextgpt.evaluation.runner import check_packages, score_protocol
from nextgpt.evaluation.sampler import ANSWER, SamplingRun, sample
from nextgpt.training.engine import StepMetrics
from nextgpt.training.trainer import Trainer, TrainerCallback


class ProtocolEvaluation(TrainerCallback):
    """Runs `evaluation.protocol` every `training.evaluate_every` steps and at the end.

    Metrics are logged as `evaluation_FID`, and `evaluation_passed_FID`, `evaluation_ceiling_FID`
    with caption passing. It changes nothing of the run.

    Raises:
        UserError: no protocol is named, or an unknown one.
    """

    def __init__(self, config: Config) -> None:
        if config.evaluation.protocol is None:
            raise UserError("training.evaluate_every needs evaluation.protocol: name one")
        self.protocol = find_protocol(config.evaluation.protocol)
        self._assistant = RunAssistant()
        self._networks: MetricNetworks | None = None

    def on_train_begin(self, trainer: Trainer) -> None:
        """Read the documents.

        Raises:
            UserError: the data or a package is missing, or ZeRO 3.
        """
        refuse_zero_3(trainer, "training.evaluate_every", "null")
        check_packages()
        config = trainer.config.evaluation
        data = project_path(config.data) if config.data else None
        self.documents = self.protocol.documents(trainer.config, data)[: config.samples]
        self._networks = MetricNetworks(config, trainer.device)
        count, every = len(self.documents), trainer.config.training.evaluate_every
        print_rank_0(f"{self.protocol.name} on {count} samples, every {every} steps and at the end")

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """Add the protocol's metrics, if it is due."""
        if not trainer.is_due(trainer.config.training.evaluate_every, last=True):
            return
        start = time.perf_counter()
        out = trainer.checkpoints.path / "evaluation" / f"step_{trainer.step:06d}"
        # That of an earlier run, or of a step that an interrupted one had taken before.
        compute_on_rank_0(lambda: shutil.rmtree(out, ignore_errors=True))
        with self._assistant.answering(trainer) as assistant:
            run = SamplingRun(self.protocol, self.documents, out, identity={"step": trainer.step})
            sample(assistant, run)
        metrics |= compute_on_rank_0(lambda: self._score(out))
        metrics["evaluation_seconds"] = round(time.perf_counter() - start, 4)

    def _score(self, out: Path) -> StepMetrics:
        result = score_protocol(self.protocol, self._networks, out)
        return {
            "_".join(["evaluation", *([] if kind == ANSWER else [kind]), *name.split()]): value
            for kind, scores in result["metrics"].items()
            for name, value in scores.items()
        }
