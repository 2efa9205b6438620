"""One stage's training, from its configuration to its delta."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from nextgpt.common.device import choose_device, choose_dtype
from nextgpt.common.distributed import all_reduce_sum, compute_on_rank_0, print_rank_0
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
from nextgpt.training.callback import TrainerCallback
from nextgpt.training.caption_check import check_caption_embeddings
from nextgpt.training.checkpointing import CheckpointManager, read_run_state
from nextgpt.training.data import ExampleDataset, load_batches, rank_batches
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


@dataclass(frozen=True)
class RunOptions:
    """Options of the command line besides the configuration.

    Attributes:
        stage: 1 to 4.
        init_from: delta to start from; by default the previous stage's, or none in stage 1.
        resume: continue an unfinished run.
        restart: discard an unfinished run.
        log_path: folder of the logs, in `stage_N`; by default `log` in the stage's folder.
    """

    stage: int
    init_from: Path | None = None
    resume: bool = False
    restart: bool = False
    log_path: Path | None = None


class Trainer:
    """Trains one stage, in every process of an initialised process group.

    Args:
        config: the stage's configuration.
        options: of the command line.
        callbacks: hooks, called in this order.

    Attributes:
        step: optimizer steps taken.
        total_steps: of the whole run.
        examples: the stage's samples.
        schedule: which samples make up which global batch.
        checkpoints: the stage's folder.
        checkpoint: what the run is resumed from.
        delta: tuned parameters that the run starts from.
        model, engine, metrics: as their classes document.
    """

    def __init__(
        self, config: Config, options: RunOptions, callbacks: Sequence[TrainerCallback] = ()
    ) -> None:
        self.config = config
        self.options = options
        self.callbacks = callbacks
        self.device = choose_device()
        self.dtype = choose_dtype(config.training.precision, self.device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.step = 0
        self._stop = False
        folder = project_path(config.save_path) / f"stage_{options.stage}"
        self.checkpoints = CheckpointManager(folder, options.stage, config)
        self.checkpoint: Path | None = None
        self.delta: Delta | None = None

    def train(self) -> bool:
        """Train the stage; False if a signal stopped it early, after saving a checkpoint."""
        options, folder = self.options, self.checkpoints
        self.checkpoint = folder.find_checkpoint(resume=options.resume, restart=options.restart)
        if options.resume and self.checkpoint is None and folder.delta.is_file():
            self.log(f"{folder.path} is finished: {folder.delta}")
            return True
        self.open_dataset()
        self.read_predecessor()
        has_inputs = self.check_inputs()
        self.build_model()
        vocabulary_size = self.model.base_vocabulary_size  # ZeRO 3 will shard the matrix
        for callback in self.callbacks:
            callback.on_train_begin(self)
        self.build_engine()
        counted = self.restore_checkpoint()
        if self.rank == 0:
            folder.write_config()
            if not has_inputs:
                folder.record_inputs(self.identify_inputs())
        logs = options.log_path / folder.path.name if options.log_path else folder.path / "log"
        self.metrics = MetricsLogger(logs, self.rank, self.step, self.total_steps, counted)
        with closing(self.metrics):
            if not self.run_steps():
                return False
        for callback in self.callbacks:
            callback.on_train_end(self)
        self.save_delta(vocabulary_size)
        return True

    def open_dataset(self) -> None:
        """Open the data sets, compare their caption embeddings, and schedule the batches."""
        config, training = self.config, self.config.training
        conversations = open_conversations(config.data)
        shapes = prompt_embeds_shapes(config)
        wrong_rows: dict[str, set[int]] = {}
        if shapes is not None:
            # On one rank, because it holds all captions: 330 MB per million rows.
            check = partial(check_caption_embeddings, config, conversations)
            lines, wrong_rows = compute_on_rank_0(check)
            for line in lines:
                self.log(line)
        self.examples = ExampleDataset(
            conversations,
            build_prompt_builder(config),
            config.data.max_seq_length,
            FeatureCaches(config),
            shapes,
            wrong_rows,
        )
        size, sizes = training.global_batch_size, conversations.sizes
        self.schedule = BatchSchedule(sizes, size, config.data.batching, training.seed)
        self.total_steps = self.schedule.steps_per_epoch * training.epochs
        if training.max_steps is not None:
            self.total_steps = min(self.total_steps, training.max_steps)
        self.log(f"{self.total_steps} steps of {size} samples out of {sizes}")

    def read_predecessor(self) -> None:
        """Read the delta that the run starts from, or was started from."""
        path = self.options.init_from
        if path is None and self.checkpoint is not None:
            started_from = read_run_state(self.checkpoint)["init_from"]
            path = started_from and Path(started_from)
        elif path is None and self.options.stage > 1:
            path = self.checkpoints.path.with_name(f"stage_{self.options.stage - 1}")
        self.checkpoints.init_from = path
        self.delta = None if path is None else read_delta(path)

    def identify_inputs(self) -> dict:
        """What the run is built from, by content."""
        predecessor = self.delta and self.delta.source
        return identify_inputs(self.config, self.examples.conversations, predecessor)

    def check_inputs(self) -> bool:
        """Compare the inputs of a resumed run with those it started from; False: not recorded."""
        if self.checkpoint is None:
            return False
        warning = self.checkpoints.check_inputs(self.identify_inputs(), self.checkpoint)
        if warning:
            self.log(warning)
        return not warning

    def build_model(self) -> None:
        """Build the model, load the predecessor's parameters and freeze what does not train."""
        training, delta = self.config.training, self.delta
        if not training.trainable:
            raise UserError("training.trainable is empty: name what is to be trained")
        check_zero_stage(
            training.deepspeed_config,
            read_deepspeed_config(training),
            self.config.language_model.quantization,
        )
        torch.manual_seed(training.seed)
        self.model = build_model(
            self.config,
            self.dtype,
            lora="lora" in training.trainable or (delta is not None and delta.holds("lora")),
            output_projections="output_projections" in training.trainable,
        )
        if delta is not None:
            self.log(f"starting from {delta.source}")
            for line in load_delta(self.model, delta, TRAINED_BEFORE[self.options.stage]):
                self.log(f"  {line}")
        configure_trainable(self.model, self.config)
        self.log(format_parameter_counts(count_parameters(self.model)))

    def build_engine(self) -> None:
        """Wrap the model for DeepSpeed."""
        training = self.config.training
        self.engine = TrainEngine(self.model, training, self.total_steps, self.device, self.dtype)
        torch.manual_seed(training.seed + self.rank)  # dropout differs between ranks

    def restore_checkpoint(self) -> dict[str, int]:
        """Load the checkpoint, or clear the folder for a new run; the samples counted so far."""
        if self.checkpoint is None:
            if self.rank == 0:
                self.checkpoints.clear()
            return {"samples": 0, "skipped": 0, "cut_tokens": 0}
        self.engine.load(self.checkpoint)
        run = read_run_state(self.checkpoint)
        self.step = run["step"]
        self.log(f"resumed after step {self.step} from {self.checkpoint}")
        return run["counted"]

    def run_steps(self) -> bool:
        """Take the remaining steps; False if a signal stopped them, after saving a checkpoint."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        data = self.config.data
        order = self._rank_batches(self.step, self.total_steps)
        loaded = load_batches(
            self.examples,
            order,
            self.engine.micro_batch_size,
            self.config.encoder.width,
            data.num_workers,
            data.packed_seq_length,
        )
        encoder = BatchEncoder(self.config, self.examples.caches, self.device)
        with loaded as steps:
            while self.step < self.total_steps:
                batches = next(steps)
                counts = self.count_step(batches)
                if counts is None:
                    self.checkpoints.save(self.engine, self.step, self.metrics.counted)
                    self.metrics.close()
                    self.log(f"stopped after step {self.step}; continue with --resume")
                    return False
                batches = [encoder.encode(batch) for batch in batches]
                for callback in self.callbacks:
                    callback.on_step_begin(self, batches)
                result = self.engine.step(batches, counts)
                self.step += 1
                self.metrics.log(self.step, result)
                at_save = self.step % self.config.training.save_steps == 0
                if at_save and self.step < self.total_steps:
                    self.checkpoints.save(self.engine, self.step, self.metrics.counted)
        return True

    def count_step(self, batches: list[Batch]) -> StepCounts | None:
        """Counts of the next step over all ranks; None if any of them received a signal."""
        skipped = [sample for batch in batches for sample in batch.counts.skipped]
        totals = all_reduce_sum(
            [
                *(sum(len(b.signal_spans.get(m, ())) for b in batches) for m in MODALITIES),
                sum(batch.num_label_tokens for batch in batches),
                sum(batch.counts.samples for batch in batches),
                len(skipped),
                sum(batch.counts.cut_tokens for batch in batches),
                self._stop,
            ],
            self.device,
        )
        *span_totals, tokens, num_samples, num_skipped, cut_tokens, stopped = map(int, totals)
        if stopped:
            return None
        self.metrics.list_skipped(self.step + 1, skipped)
        self.metrics.count(num_samples, num_skipped, cut_tokens)
        return StepCounts(tokens, dict(zip(MODALITIES, span_totals, strict=True)))

    def save_delta(self, vocabulary_size: int) -> None:
        """Write the tuned parameters, and those of the predecessor that this run does not use."""
        delta = self.delta
        whole = self.config.language_model.trainable_embeddings == "full" or bool(
            delta and delta.holds_base_vocabulary
        )
        tensors = self.engine.tuned_tensors(base_vocabulary=whole)
        if self.rank == 0:
            unused = tensors_of_absent_groups(self.model, delta) if delta else {}
            self.checkpoints.finish(unused | tensors, vocabulary_size)
        self.log(f"stage {self.options.stage} is finished: {self.checkpoints.delta}")

    def starts_new(self, group: TrainableGroup) -> bool:
        """Whether the parameters of `group` are neither resumed nor loaded from a predecessor."""
        return self.checkpoint is None and not (self.delta and self.delta.holds(group))

    def first_batches(self, steps: int | None = None) -> Iterator[Batch]:
        """This rank's micro batches of the first steps, one conversation per row.

        Args:
            steps: how many; by default all.
        """
        order = self._rank_batches(0, min(steps or self.total_steps, self.total_steps))
        size, width = self.config.training.micro_batch_size, self.config.encoder.width
        encoder = BatchEncoder(self.config, self.examples.caches, self.device)
        with load_batches(self.examples, order, size, width, num_workers=0) as loaded:
            for batches in loaded:
                yield from (encoder.encode(batch) for batch in batches)

    def log(self, text: str) -> None:
        """Print once for all ranks."""
        print_rank_0(text)

    def _rank_batches(self, first_step: int, end: int) -> Iterator[list[tuple[str, int]]]:
        length = self.examples.conversations.length
        return rank_batches(self.schedule, first_step, end, length, self.rank, self.world)

    def _on_signal(self, *_: object) -> None:
        self._stop = True


def configure_trainable(model: NextGPT, config: Config) -> None:
    """Set what trains, the modules' modes and activation checkpointing, in place.

    Where output projections alone train, no gradient passes through the language model: it stores
    no activations, and must not be asked to recompute them for a gradient of its inputs.
    """
    trainable = config.training.trainable
    if config.training.activation_checkpointing and set(trainable) != {"output_projections"}:
        model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    whole = config.language_model.trainable_embeddings == "full"
    set_trainable(model, trainable, base_vocabulary=whole)
