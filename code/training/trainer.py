"""One stage's training, from its configuration to its delta."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nextgpt.common.device import choose_device, choose_dtype
from nextgpt.common.distributed import (
    all_reduce_sum,
    compute_on_rank_0,
    print_rank_0,
)
from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config, DataConfig, TrainableGroup
from nextgpt.conversation.batch import Batch
from nextgpt.dataset.conversations import open_conversations, prompt_embeds_shapes
from nextgpt.dataset.held_out import split_rows
from nextgpt.dataset.sampler import BatchSchedule, Sample
from nextgpt.dataset.target_media import describe_missing_targets
from nextgpt.model.acceleration import compile_blocks, fuse_kernels
from nextgpt.model.build import build_model, build_prompt_builder
from nextgpt.model.delta import Delta, load_delta, read_delta, tensors_of_absent_groups
from nextgpt.model.nextgpt import NextGPT
from nextgpt.model.quantization import check_zero_stage
from nextgpt.model.trainable import count_parameters, format_parameter_counts, set_trainable
from nextgpt.model.upstream_checkpoint import Tensors
from nextgpt.training.checkpointing import CheckpointManager, read_run_state
from nextgpt.training.data import ExampleDataset, load_batches, packing_options, rank_batches
from nextgpt.training.denoising import DenoisingLoss, open_target_latents
from nextgpt.training.engine import (
    StepCounts,
    StepMetrics,
    TrainEngine,
    load_parameters,
    read_deepspeed_config,
    split_by_modality,
)
from nextgpt.training.feature_caches import FeatureCaches
from nextgpt.training.flops import count_flops, peak_flops
from nextgpt.training.media_features import BatchEncoder
from nextgpt.training.metrics import MetricsLogger
from nextgpt.training.run_inputs import (
    RunInputs,
    check_caption_embeddings,
    identify_datasets,
    identify_inputs,
)
from nextgpt.training.validation import Validator, validates

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


class TrainerCallback:
    """Hooks for what is not part of every run. All ranks call all hooks, in the list's order."""

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Called with the model loaded, before the engine and its optimizer are built."""

    def on_step_begin(self, trainer: "Trainer", batches: list[Batch]) -> None:
        """Called before each optimizer step with this rank's micro batches, on the device."""

    def on_validate(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Called after each validation with its losses, before they are logged."""

    def on_step_end(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Called after each step and its validation; what is added to `metrics` is logged."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """Called after the last step, before the delta is written."""


class Trainer:
    """Trains one stage, in every process of an initialised process group.

    Attributes:
        step, total_steps: optimizer steps taken, and of the whole run.
        examples, schedule: the stage's samples, and which make up which global batch.
        checkpoints, checkpoint: the stage's folder, and what the run is resumed from.
        delta: tuned parameters that the run starts from.
        validator: computes the held-out losses; None if the run has none.
        model, engine, metrics: as their classes document.
    """

    def __init__(
        self, config: Config, options: RunOptions, callbacks: Sequence[TrainerCallback] = ()
    ) -> None:
        self.config, self.options, self.callbacks = config, options, callbacks
        self.device = choose_device()
        self.dtype = choose_dtype(config.training.precision, self.device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.step = 0
        self._stop = False
        folder = project_path(config.save_path) / f"stage_{options.stage}"
        setup = {
            "processes": self.world,
            "precision": str(self.dtype),
            "deepspeed": read_deepspeed_config(config.training),
        }
        self.checkpoints = CheckpointManager(folder, options.stage, config, setup)
        self.checkpoint: Path | None = None
        self.delta: Delta | None = None
        self.validator: Validator | None = None

    def train(self) -> bool:
        """Train the stage; False if a signal stopped it early, after saving a checkpoint.

        Raises:
            UserError: another run trains in the same folder, or an input is wrong.
        """
        with self.checkpoints.lock():
            return self._train()

    def _train(self) -> bool:
        options, folder, training = self.options, self.checkpoints, self.config.training
        if options.resume:
            folder.share_newest()
        self.checkpoint = folder.find_checkpoint(resume=options.resume, restart=options.restart)
        if options.resume and self.checkpoint is None and folder.delta.is_file():
            print_rank_0(
                f"{folder.path} is finished: {folder.delta}; to train on, start a run from that "
                "with --init-from and another --save_path"
            )
            return True
        self.open_dataset()
        self.read_predecessor()
        recorded = self.checkpoint and folder.check_inputs(self.identify_inputs(), self.checkpoint)
        self.build_model()
        self._vocabulary_size = self.model.base_vocabulary_size  # ZeRO 3 will shard the matrix
        peak = peak_flops(self.device, self.dtype)
        self._flops = count_flops(self.model) if peak else None
        for callback in self.callbacks:
            callback.on_train_begin(self)
        if training.compile:
            compile_blocks(self.model.language_model)
        denoising = None
        if training.denoised_modalities:
            denoising = DenoisingLoss.load(self.config, self.device, self.dtype)
        arguments = self.total_steps, self.device, self.dtype, denoising
        self.engine = TrainEngine(self.model, training, *arguments)
        torch.manual_seed(training.seed + self.rank)  # dropout differs between ranks
        counted = self.restore_checkpoint()
        if folder.writes:
            folder.record_start(None if recorded else self.identify_inputs())
        logs = options.log_path / folder.path.name if options.log_path else folder.path / "log"
        peak = peak and self.world * peak
        self.metrics = MetricsLogger(
            logs, self.rank, self.step, self.total_steps, counted, peak, truncates=folder.writes
        )
        with closing(self.metrics):
            finished = self.run_steps()
        if not finished:
            print_rank_0(f"stopped after step {self.step}; continue with --resume")
            return False
        for callback in self.callbacks:
            callback.on_train_end(self)
        self.save_delta()
        return True

    def open_dataset(self) -> None:
        """Open the data sets, hold samples out, and schedule the batches."""
        training, data = self.config.training, self.config.data
        self._packing = packing_options(self.config)
        self.examples = self._open_examples(data)
        rows, held_out = split_rows(self.examples.conversations, data.validation)
        self.examples.rows = rows
        size, sizes = training.global_batch_size, self.examples.sizes
        weights = {entry.name: entry.weight for entry in data.dataset_entries}
        self.schedule = BatchSchedule(sizes, size, data.batching, training.seed, weights)
        self.total_steps = self.schedule.steps_per_epoch * training.epochs
        if training.max_steps is not None:
            self.total_steps = min(self.total_steps, training.max_steps)
        print_rank_0(f"{self.total_steps} steps of {size} samples out of {sizes}")
        if validates(self.config):
            self._open_validator(held_out)

    def _open_validator(self, held_out: list[Sample]) -> None:
        """Prepare to validate on `held_out`, or on the data sets named for it."""
        data, examples = self.config.data, self.examples
        if names := data.validation.datasets:
            examples = self._open_examples(data.model_copy(update={"datasets": names}))
            sizes = examples.conversations.sizes
            held_out = [(name, row) for name, size in sizes.items() for row in range(size)]
        self.validator = Validator(self.config, examples, held_out)
        print_rank_0(
            f"validation on {len(self.validator.samples)} of {len(held_out)} held-out samples, "
            f"every {self.config.training.validate_steps} steps and at the end"
        )

    def _open_examples(self, data: DataConfig) -> ExampleDataset:
        """Open the data sets of `data` and compare their caption embeddings."""
        config, conversations = self.config, open_conversations(data)
        shapes = prompt_embeds_shapes(config)
        wrong_rows: dict[str, set[int]] = {}
        if shapes is not None:
            # On one rank, because it holds all captions: 330 MB per million rows.
            check = partial(check_caption_embeddings, config, conversations)
            lines, wrong_rows = compute_on_rank_0(check)
            for line in lines:
                print_rank_0(line)
        if denoised := config.training.denoised_modalities:
            describe = partial(describe_missing_targets, conversations, denoised)
            for line in compute_on_rank_0(describe):
                print_rank_0(line)
        return ExampleDataset(
            conversations,
            build_prompt_builder(config),
            data.max_seq_length,
            FeatureCaches(config),
            shapes,
            wrong_rows,
            target_latents=open_target_latents(config),
        )

    def read_predecessor(self) -> None:
        """Read the delta that the run starts from, or was started from."""
        path = self.options.init_from
        if path is None and self.checkpoint is not None:
            started_from = read_run_state(self.checkpoint)["init_from"]
            path = started_from and Path(started_from)
            if path and not path.exists():
                raise UserError(
                    f"{self.checkpoint} is of a run that started from {path}, which is gone: name "
                    "the same delta where it is now with --init-from"
                )
        self.checkpoints.init_from = path
        if path is None and self.options.stage > 1:
            path = self.checkpoints.path.with_name(f"stage_{self.options.stage - 1}")
        self.delta = None if path is None else read_delta(path)

    def identify_inputs(self) -> RunInputs:
        """What the run is built from, by content."""
        predecessor = self.delta and self.delta.source
        inputs = identify_inputs(self.config, self.examples.conversations, predecessor)
        if self.validator:
            held_out = identify_datasets(self.validator.examples.conversations)
            inputs["datasets"] |= {f"validation on {name}": one for name, one in held_out.items()}
        return inputs

    def build_model(self) -> None:
        """Build the model, load the predecessor's parameters and freeze what does not train."""
        config, training, delta = self.config, self.config.training, self.delta
        if not training.trainable:
            raise UserError("training.trainable is empty: name what is to be trained")
        settings = self.checkpoints.setup["deepspeed"]
        check_zero_stage(training.deepspeed_config, settings, config.language_model.quantization)
        if training.compile and settings.get("zero_optimization", {}).get("stage") == 3:
            raise UserError(
                "training.compile works with ZeRO 0 to 2: set it to false, or take another file "
                f"than training.deepspeed_config {training.deepspeed_config}"
            )
        torch.manual_seed(training.seed)
        self.model = build_model(
            config,
            self.dtype,
            lora="lora" in training.trainable or (delta is not None and delta.holds("lora")),
            output_projections="output_projections" in training.trainable,
        )
        if delta is not None:
            print_rank_0(f"starting from {delta.source}")
            for line in load_delta(self.model, delta, TRAINED_BEFORE[self.options.stage]):
                print_rank_0(f"  {line}")
        configure_trainable(self.model, config)
        if self.checkpoint is not None:
            load_parameters(self.model, self.checkpoint)
        if training.fused_kernels:
            fuse_kernels(self.model.language_model)
        print_rank_0(format_parameter_counts(count_parameters(self.model)))
        print_rank_0(f"attention: {self.model.language_model.config._attn_implementation}")

    def restore_checkpoint(self) -> dict[str, int]:
        """Load the checkpoint, or clear the folder for a new run; the samples counted so far."""
        if self.checkpoint is None:
            if self.checkpoints.writes:
                self.checkpoints.clear()
            return {"samples": 0, "skipped": 0, "cut_tokens": 0}
        run = read_run_state(self.checkpoint)
        self.engine.load(self.checkpoint, run["engine"])
        self.step = run["step"]
        if self.validator:
            self.validator.best = run.get("best")
        print_rank_0(f"resumed after step {self.step} from {self.checkpoint}")
        if changed := self.checkpoints.changed:
            print_rank_0(f"other settings than until then: {'; '.join(changed)}")
        if self.step > self.total_steps:
            raise UserError(
                f"{self.checkpoint} has taken more steps than the {self.total_steps} of "
                "training.max_steps and training.epochs: set more, or give --restart"
            )
        return run["counted"]

    def run_steps(self) -> bool:
        """Take the remaining steps; False if a signal stopped them, after saving a checkpoint."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        size, end = self.engine.micro_batch_size, self.total_steps
        options = {"num_workers": self.config.data.num_workers, **self._packing}
        loaded = self._load_batches(self.examples, self.step, end, size, **options)
        encoder = self._batch_encoder(self.examples)
        with loaded as steps:
            for batches in islice(steps, end - self.step):  # one more would end the processes
                counts = self.count_step(batches)
                if counts is None:
                    self._save_checkpoint()
                    return False
                batches = [encoder.encode(batch) for batch in batches]
                for callback in self.callbacks:
                    callback.on_step_begin(self, batches)
                result = self.engine.step(batches, counts)
                self.step += 1
                if self.validator and self.is_due(self.config.training.validate_steps, last=True):
                    result |= self.validate(self.validator, encoder)
                for callback in self.callbacks:
                    callback.on_step_end(self, result)
                self.metrics.log(self.step, result, counts)
                if self.is_due(self.config.training.save_steps, last=False):
                    self._save_checkpoint()
        return True

    def is_due(self, steps: int, *, last: bool) -> bool:
        """Whether the step is a multiple of `steps`; the run's end counts as `last`."""
        return last if self.step == self.total_steps else self.step % steps == 0

    def _save_checkpoint(self) -> None:
        best = self.validator and self.validator.best
        self.checkpoints.save(self.engine, self.step, self.metrics.counted, best)

    def validate(self, validator: Validator, encoder: BatchEncoder) -> StepMetrics:
        """The losses on the held-out samples; keeps the parameters of the best validation."""
        result = validator.validate(self.step, self.engine, encoder)
        self.metrics.list_held_out(self.step, validator.skipped)
        if self.config.training.save_best and validator.best["step"] == self.step:
            tensors = self._delta_tensors()
            if self.checkpoints.writes:
                self.checkpoints.save_best(tensors, self._vocabulary_size, self.step)
        for callback in self.callbacks:
            callback.on_validate(self, result)
        return result

    def count_step(self, batches: list[Batch]) -> StepCounts | None:
        """Counts of the next step over all ranks; None if any of them received a signal."""
        skipped = [sample for batch in batches for sample in batch.skipped]
        counted = {
            "samples": sum(batch.num_samples for batch in batches),
            "skipped": len(skipped),
            "cut_tokens": sum(batch.cut_tokens for batch in batches),
        }
        spans = [sum(len(b.signal_spans.get(m, ())) for b in batches) for m in MODALITIES]
        spans += [sum(len(b.targets.get(m, ())) for b in batches) for m in MODALITIES]
        tokens = sum(batch.num_label_tokens for batch in batches)
        work = [
            sum(int(batch.attention_mask.sum()) for batch in batches),
            sum(batch.attention_mask.numel() for batch in batches),
            self._flops.of(batches) if self._flops else 0,
        ]
        values = [self._stop, tokens, *work, *counted.values(), *spans]
        stopped, tokens, *totals = map(int, all_reduce_sum(values, self.device))
        if stopped:
            return None
        work, totals = totals[: len(work)], totals[len(work) :]
        counts = dict(zip(counted, totals[: len(counted)], strict=True))
        self.metrics.count(self.step + 1, skipped, counts)
        return StepCounts(tokens, *split_by_modality(totals[len(counted) :]), *work)

    def save_delta(self) -> None:
        """Write the tuned parameters, and those of the best validation."""
        tensors, best = self._delta_tensors(), None
        if self.validator and self.config.training.save_best:
            best = self.validator.best
            print_rank_0(f"lowest validation loss {best['loss']:.4f}, after step {best['step']}")
        if self.checkpoints.writes:
            self.checkpoints.finish(tensors, self._vocabulary_size, best)
        print_rank_0(f"stage {self.options.stage} is finished: {self.checkpoints.delta}")

    def _delta_tensors(self) -> Tensors:
        """The tuned parameters, and those of the predecessor that this run does not use."""
        delta = self.delta
        whole = self.config.language_model.trainable_embeddings == "full"
        whole = whole or bool(delta and delta.holds_base_vocabulary)
        unused = tensors_of_absent_groups(self.model, delta) if delta else {}
        return unused | self.engine.tuned_tensors(base_vocabulary=whole)

    def starts_new(self, group: TrainableGroup) -> bool:
        """Whether the parameters of `group` are neither resumed nor loaded from a predecessor."""
        return self.checkpoint is None and not (self.delta and self.delta.holds(group))

    def first_batches(self, steps: int | None = None) -> Iterator[Batch]:
        """Yield this rank's micro batches of the first `steps` (default: all).

        Rows are not packed, and there are no targets of the denoising loss.
        """
        end = min(steps or self.total_steps, self.total_steps)
        size = self.config.training.micro_batch_size
        examples = replace(self.examples, target_latents={})
        encoder = self._batch_encoder(examples)
        with self._load_batches(examples, 0, end, size) as loaded:
            for batches in loaded:
                yield from map(encoder.encode, batches)

    def _batch_encoder(self, examples: ExampleDataset) -> BatchEncoder:
        return BatchEncoder(self.config, examples.caches, self.device, examples.target_latents)

    def _load_batches(
        self,
        examples: ExampleDataset,
        first: int,
        end: int,
        size: int,
        num_workers: int = 0,
        **options: Any,
    ) -> AbstractContextManager[Iterator[list[Batch]]]:
        """This rank's micro batches of each step from number `first` up to `end`."""
        length, width = examples.length, self.config.encoder.width
        order = rank_batches(self.schedule, first, end, length, self.rank, self.world)
        return load_batches(examples, order, size, width, num_workers, **options)

    def _on_signal(self, *_: object) -> None:
        self._stop = True


def configure_trainable(model: NextGPT, config: Config) -> None:
    """Set what trains, the modules' modes and activation checkpointing, in place."""
    trainable = config.training.trainable
    # Where output projections alone train, no gradient passes through the language model: it stores
    # no activations, and must not be asked to recompute them for a gradient of its inputs.
    if config.training.activation_checkpointing and set(trainable) != {"output_projections"}:
        model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    whole = config.language_model.trainable_embeddings == "full"
    set_trainable(model, trainable, base_vocabulary=whole)
