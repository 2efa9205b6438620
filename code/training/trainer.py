"""A stage's training from its configuration to its delta.

Reads as a story: data, model, what trains, predecessor, agent, steps, delta.
"""

import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from nextgpt.callbacks.hidden_state_cache import HiddenStateCache, caches_hidden_states
from nextgpt.callbacks.least_squares import init_input_projection
from nextgpt.callbacks.whitening import needs_whitening, whiten_projections
from nextgpt.common.device import choose_device, choose_dtype
from nextgpt.common.distributed import all_reduce_sum, compute_on_rank_0
from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config, TrainableGroup
from nextgpt.conversation.batch import Batch
from nextgpt.dataset.conversations import open_conversations, prompt_embeds_shapes
from nextgpt.dataset.sampler import BatchSchedule
from nextgpt.model.build import build_model, build_prompt_builder
from nextgpt.model.delta import Delta, load_delta, read_delta, tensors_of_absent_groups
from nextgpt.model.nextgpt import NextGPT
from nextgpt.model.quantization import check_zero_stage
from nextgpt.model.trainable import count_parameters, format_parameter_counts, set_trainable
from nextgpt.training.caption_check import check_caption_embeddings
from nextgpt.training.checkpointing import CheckpointManager, read_run_state
from nextgpt.training.data import CollatedBatch, ExampleDataset, load_batches, rank_batches
from nextgpt.training.engine import StepCounts, TrainEngine, read_deepspeed_config
from nextgpt.training.media_features import BatchEncoder, FeatureCaches
from nextgpt.training.metrics import MetricsLogger
from nextgpt.training.run_inputs import identify_inputs

# What the stages before have trained, and a stage's predecessor must therefore bring.
TRAINED_BEFORE: dict[int, set[TrainableGroup]] = {
    1: set(),
    2: {"input_projection", "vocabulary"},
    3: {"input_projection", "output_projections", "vocabulary"},
    4: {"input_projection", "output_projections", "vocabulary", "lora"},
}
STOPPED_BY_SIGNAL = 143
_CENTRING_BATCHES = 16


@dataclass(frozen=True)
class RunOptions:
    """What the command line says beside the configuration.

    Attributes:
        stage: 1 to 4.
        init_from: the delta to start from; none: the predecessor's, or, in stage 1, none.
        resume: go on with an unfinished run.
        restart: drop an unfinished run.
        log_path: folder of the logs, `stage_N` in it; none: `log` in the stage's folder.
    """

    stage: int
    init_from: Path | None = None
    resume: bool = False
    restart: bool = False
    log_path: Path | None = None


class Trainer:
    """One stage's training in one of its processes, which have started (`start_processes`)."""

    def __init__(self, config: Config, options: RunOptions) -> None:
        self.config = config
        self.options = options
        self.device = choose_device()
        self.dtype = choose_dtype(config.training.precision, self.device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._stop = False

    def train(self) -> bool:
        """Train the stage to its end; whether it got there, or was told to stop before."""
        config, training = self.config, self.config.training
        folder = CheckpointManager(
            project_path(config.save_path) / f"stage_{self.options.stage}",
            self.options.stage,
            config,
        )
        checkpoint = folder.begin(resume=self.options.resume, restart=self.options.restart)
        if self.options.resume and checkpoint is None and folder.delta.is_file():
            self.say(f"{folder.path} is finished: {folder.delta}")
            return True

        samples = self.open_samples()
        sizes = samples.conversations.sizes
        plan = BatchSchedule(sizes, training.global_batch_size, config.data.batching, training.seed)
        steps = min(plan.steps_per_epoch * training.epochs, training.max_steps or 2**62)
        self.say(f"{steps} steps of {training.global_batch_size} samples out of {sizes}")

        folder.init_from = self.find_predecessor(checkpoint)
        delta = None if folder.init_from is None else read_delta(folder.init_from)
        inputs = partial(identify_inputs, config, samples.conversations, delta and delta.source)
        unrecorded = checkpoint is None
        if checkpoint is not None and (warning := folder.check_inputs(inputs(), checkpoint)):
            self.say(warning)
            unrecorded = True
        torch.manual_seed(training.seed)
        model = self.make_model(delta)
        carried = tensors_of_absent_groups(model, delta) if delta else {}
        base_vocabulary = config.language_model.trainable_embeddings == "full" or bool(
            delta and delta.holds_base_vocabulary
        )
        vocabulary_size = model.base_vocabulary_size
        if checkpoint is None and (delta is None or not delta.holds("input_projection")):
            self.fit(model, samples, plan, steps)
        kept = (
            HiddenStateCache(model, training, self.dtype)
            if caches_hidden_states(training)
            else None
        )
        if training.cache_hidden_states and kept is None:
            self.say(
                "training.cache_hidden_states: no state is read twice in one epoch, none is cached"
            )
        self.centre(model, samples, plan, steps, kept)
        agent = TrainEngine(model, training, steps, self.device, self.dtype)
        torch.manual_seed(training.seed + self.rank)  # every process drops out its own

        first_step, counted = 0, {"samples": 0, "skipped": 0, "cut_tokens": 0}
        if checkpoint is not None:
            agent.load(checkpoint)
            run = read_run_state(checkpoint)
            first_step, counted = run["step"], run["counted"]
            self.say(f"resumed after step {first_step} from {checkpoint}")
        elif self.rank == 0:
            folder.clear()
        if unrecorded and self.rank == 0:
            folder.record_inputs(inputs())
        logs = self.options.log_path
        logs = logs / folder.path.name if logs else folder.path / "log"
        with closing(MetricsLogger(logs, self.rank, first_step, steps, counted)) as progress:
            if not self.take_steps(agent, samples, plan, folder, progress, first_step, steps, kept):
                return False
        if kept is not None:
            self.say(kept.report())
        tensors = agent.tuned_tensors(base_vocabulary=base_vocabulary)
        if self.rank == 0:
            folder.finish(carried | tensors, vocabulary_size)
        self.say(f"stage {self.options.stage} is finished: {folder.delta}")
        return True

    def fit(self, model: NextGPT, samples: ExampleDataset, plan: BatchSchedule, steps: int) -> None:
        """Give a new input projection its measured start, the same in every process."""
        if self.config.input_projection.init == "least_squares":
            self.say("fitting the input projection")
            init_input_projection(model.to(self.device), self.batches(samples, plan, steps))

    def centre(
        self,
        model: NextGPT,
        samples: ExampleDataset,
        plan: BatchSchedule,
        steps: int,
        kept: HiddenStateCache | None,
    ) -> None:
        """Measure what new output projections begin with, the same in every process.

        A resumed run measures it again: checkpoints hold what trains, and a centre does not.
        """
        if needs_whitening(model):
            model.to(self.device)
            batches = self.batches(samples, plan, min(steps, _CENTRING_BATCHES))
            whiten_projections(model, map(kept.fill, batches) if kept else batches, self.dtype)

    def batches(self, samples: ExampleDataset, plan: BatchSchedule, steps: int) -> Iterator[Batch]:
        """This process's part of the run's first batches, a conversation a row."""
        order = rank_batches(plan, 0, steps, samples.conversations.length, self.rank, self.world)
        size, width = self.config.training.micro_batch_size, self.config.encoder.width
        completer = BatchEncoder(self.config, samples.caches, self.device)
        with load_batches(samples, order, size, width, workers=0) as batches:
            for ready in batches:
                yield from (completer.complete(one) for one in ready)

    def take_steps(
        self,
        agent: TrainEngine,
        samples: ExampleDataset,
        plan: BatchSchedule,
        folder: CheckpointManager,
        progress: MetricsLogger,
        first_step: int,
        steps: int,
        kept: HiddenStateCache | None,
    ) -> bool:
        """The steps from `first_step` on; False if a signal ended them, after a save."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        length = samples.conversations.length
        order = rank_batches(plan, first_step, steps, length, self.rank, self.world)
        loaded = load_batches(
            samples,
            order,
            agent.micro_batch_size,
            self.config.encoder.width,
            self.config.data.num_workers,
            self.config.data.packed_seq_length,
        )
        completer = BatchEncoder(self.config, samples.caches, self.device)
        with loaded as batches:
            for step in range(first_step + 1, steps + 1):
                ready = next(batches)
                counts, stopped = self.count(step, ready, progress)
                if stopped:
                    folder.save(agent, step - 1, progress.counted)
                    progress.close()
                    self.say(f"stopped after step {step - 1}; go on with --resume")
                    return False
                whole = [completer.complete(one) for one in ready]
                if kept is not None:
                    whole = [kept.fill(batch) for batch in whole]
                    counts = replace(counts, tokens=0)
                result = agent.step(whole, counts)
                progress.report(step, result, counts)
                if step % self.config.training.save_steps == 0 and step < steps:
                    folder.save(agent, step, progress.counted)
        return True

    def count(
        self, step: int, ready: list[CollatedBatch], progress: MetricsLogger
    ) -> tuple[StepCounts, bool]:
        """What all processes read in this step, and whether one of them was told to stop."""
        mine = [0] * len(MODALITIES)
        for one in ready:
            for index, modality in enumerate(MODALITIES):
                mine[index] += len(one.batch.signal_spans.get(modality, ()))
        totals = all_reduce_sum(
            [
                *mine,
                sum(one.target_tokens for one in ready),
                sum(one.samples for one in ready),
                sum(len(one.skipped) for one in ready),
                sum(one.cut_tokens for one in ready),
                self._stop,
            ],
            self.device,
        )
        *runs, tokens, samples, skipped, cut_tokens, stopped = (int(total) for total in totals)
        if not stopped:
            progress.list_skipped(step, [skip for one in ready for skip in one.skipped])
            progress.count(samples, skipped, cut_tokens)
        return StepCounts(tokens, dict(zip(MODALITIES, runs, strict=True))), bool(stopped)

    def open_samples(self) -> ExampleDataset:
        """The stage's data sets, their features and their caption embeddings."""
        conversations = open_conversations(self.config.data)
        shapes = prompt_embeds_shapes(self.config)
        wrong_rows: dict[str, np.ndarray] = {}
        if shapes is not None:
            # Once, because tables of all captions are held: 120 MB a million rows.
            check = partial(check_caption_embeddings, self.config, conversations)
            lines, wrong_rows = compute_on_rank_0(check)
            for line in lines:
                self.say(line)
        return ExampleDataset(
            conversations,
            build_prompt_builder(self.config),
            self.config.data.max_seq_length,
            FeatureCaches(self.config),
            shapes,
            wrong_rows,
        )

    def find_predecessor(self, checkpoint: Path | None) -> Path | None:
        """Where the delta is that this stage starts from, or started from before `checkpoint`."""
        if checkpoint is not None and self.options.init_from is None:
            path = read_run_state(checkpoint)["init_from"]
            return path and Path(path)
        if self.options.init_from is None and self.options.stage > 1:
            return project_path(self.config.save_path) / f"stage_{self.options.stage - 1}"
        return self.options.init_from

    def make_model(self, delta: Delta | None) -> NextGPT:
        """The model with what trains set free and the predecessor's parameters in it."""
        training = self.config.training
        if not training.trainable:
            raise UserError("training.trainable is empty: name what is to be trained")
        settings = read_deepspeed_config(training)
        check_zero_stage(
            training.deepspeed_config, settings, self.config.language_model.quantization
        )
        model = build_model(
            self.config,
            self.dtype,
            lora="lora" in training.trainable or (delta is not None and delta.holds("lora")),
            output_projections="output_projections" in training.trainable,
        )
        if delta is not None:
            self.say(f"starting from {delta.source}")
            for line in load_delta(model, delta, TRAINED_BEFORE[self.options.stage]):
                self.say(f"  {line}")
        configure_trainable(model, self.config)
        self.say(format_parameter_counts(count_parameters(model)))
        return model

    def say(self, text: str) -> None:
        """Print, once for all processes."""
        if self.rank == 0:
            print(text, flush=True)

    def _on_signal(self, *_: object) -> None:
        self._stop = True


def configure_trainable(model: NextGPT, config: Config) -> None:
    """Set what trains, modules' modes, and how activations are kept, in place.

    Where output projections alone train, no gradient passes through the language model: it keeps no
    activations, and is not to be asked to compute them again for a gradient of its inputs.
    """
    trains = config.training.trainable
    if config.training.activation_checkpointing and set(trains) != {"output_projections"}:
        model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    whole = config.language_model.trainable_embeddings == "full"
    set_trainable(model, trains, base_vocabulary=whole)
