"""The training engine: optimizer steps over all ranks with DeepSpeed, exact checkpoints.

DeepSpeed's JSON sets how the optimizer is sharded (ZeRO stage, offload). Batch size, precision,
clipping, optimizer and schedule come from the run. Trainable parameters, gradients and reductions
are float32; the frozen language model and matrix products use the run's precision (autocast).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, log
from pathlib import Path
from typing import Any, Literal, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from nextgpt.common.distributed import all_gather_object
from nextgpt.common.errors import UserError
from nextgpt.common.json_io import read_json
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import TrainingConfig
from nextgpt.conversation.batch import Batch
from nextgpt.model.loading import compare_state_dicts, refuse_faults
from nextgpt.model.nextgpt import Losses, NextGPT
from nextgpt.model.trainable import dropout_disabled, group_of, is_measured, tuned_parameters
from nextgpt.training.adam_state import MOMENTS, gather_moment, restore_moments
from nextgpt.training.denoising import VALIDATION, DenoisingLoss
from nextgpt.training.loss_scale import LossScale, non_finite_gradient

_SET_BY_RUN = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "optimizer", "scheduler", "fp16", "bf16", "torch_autocast",
    "communication_data_type", "data_types",
)  # fmt: skip
_Number = TypeVar("_Number", int, float)
_PARAMETERS = "parameters"  # a file of a checkpoint

# Of one step before its update, averaged over all ranks' tokens, spans and target media: `loss`,
# the weighted sum; `text_loss`, None where the language model did not run; `alignment_MODALITY` of
# those with spans; `denoising_MODALITY` of those with target media; `learning_rate`, of groups
# without their own; `gradient_norm`, None without ZeRO and where an overflow skipped the step;
# `loss_scale` in fp16; `tokens`, the number with a text loss.
StepMetrics = dict[str, float | None]


@dataclass(frozen=True)
class StepCounts:
    """What one optimizer step has over all ranks.

    Attributes:
        tokens: labelled ones.
        signal_spans, targets: spans and target media, by modality.
        input_tokens, positions: tokens of the conversations, and with padding.
        flops: operations that the step needs (`training.flops`).
    """

    tokens: int
    signal_spans: dict[Modality, int]
    targets: dict[Modality, int] = field(default_factory=dict)
    input_tokens: int = 0
    positions: int = 0
    flops: int = 0


def micro_batch_size(training: TrainingConfig, world: int) -> int:
    """The largest divisor of a rank's samples that is not above the configured size.

    Raises:
        UserError: the global batch is not a multiple of the ranks.
    """
    per_rank, rest = divmod(training.global_batch_size, world)
    if rest:
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} cannot be shared equally by "
            f"{world} processes: set it to a multiple of them"
        )
    sizes = range(1, min(per_rank, training.micro_batch_size) + 1)
    return max(size for size in sizes if per_rank % size == 0)


def read_deepspeed_config(training: TrainingConfig) -> dict[str, Any]:
    """Read DeepSpeed's JSON.

    Raises:
        UserError: it cannot be read, or sets what comes from the run.
    """
    path = project_path(training.deepspeed_config)
    try:
        settings = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"training.deepspeed_config: {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"training.deepspeed_config: {path} holds no JSON object")
    if written := [key for key in _SET_BY_RUN if key in settings]:
        raise UserError(f"{path}: {', '.join(written)} come from the run, remove them here")
    if settings.get("zero_optimization", {}).get("compute_grad_norm", True) is not True:
        raise UserError(
            f"{path}: zero_optimization.compute_grad_norm must be on, since overflows are detected "
            "by the norm: remove it here"
        )
    return settings


class TrainEngine:
    """The model wrapped by DeepSpeed.

    Args:
        model: with `requires_grad` set on what trains.
        training: the stage's configuration.
        steps: optimizer steps of the whole run, for the schedule.
        device, dtype: of the products.
        denoising: None: there is no such loss.
    """

    def __init__(
        self,
        model: NextGPT,
        training: TrainingConfig,
        steps: int,
        device: torch.device,
        dtype: torch.dtype,
        denoising: DenoisingLoss | None = None,
    ) -> None:
        self.training, self.device, self.dtype = training, device, dtype
        self.denoising = denoising
        self.world = dist.get_world_size()
        self.micro_batch_size = micro_batch_size(training, self.world)
        self.accumulation = training.global_batch_size // self.world // self.micro_batch_size
        settings = self._settings(dtype)
        self._factor = learning_rate_schedule(steps, training.warmup_ratio, training.warmup_type)
        offloads = "offload_optimizer" in settings.get("zero_optimization", {})
        optimizer = _build_optimizer(model, training, offloads=offloads)
        model.to(device)
        try:
            self.engine, _, _, self.schedule = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                model_parameters=[p for p in model.parameters() if p.requires_grad],
                lr_scheduler=lambda inner: LambdaLR(inner, self._factor),
                config=settings,
            )
        except ValueError as error:
            fault = " ".join(str(error).split())
            raise UserError(f"DeepSpeed refuses {training.deepspeed_config}: {fault}") from error
        self.loss_scale = LossScale(self.engine.optimizer) if dtype == torch.float16 else None

    @property
    def model(self) -> NextGPT:
        """The wrapped model."""
        return self.engine.module

    def step(self, batches: list[Batch], counts: StepCounts) -> StepMetrics:
        """One optimizer step over this rank's `batches`; `counts` are of all ranks.

        In fp16 a step whose gradients overflow is skipped, and the loss scale is halved.

        Raises:
            UserError: a loss or gradient is not finite; nothing was updated.
        """
        self.engine.train()
        rate = self.training.learning_rate * self._factor(self.schedule.last_epoch)
        step = self.engine.global_steps
        sums = torch.zeros(2 + 2 * len(MODALITIES), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(batches):
            losses = self._losses(batch, step)
            self.engine.backward(self._normalize(losses, counts))
            sums += _as_vector(losses)
            if index + 1 == len(batches):
                totals = self._reduce_finite(sums)
            self.engine.step()
        scale = {"loss_scale": self.loss_scale.scale} if self.loss_scale else {}
        # ZeRO skips the step, on all ranks, if the norm of the reduced gradients is not finite.
        overflowed = self.engine.zero_optimization() and self.engine.optimizer.overflow
        if self.loss_scale:
            self.loss_scale.update(overflowed)
        elif overflowed:
            raise non_finite_gradient(self.dtype)
        norm = None if overflowed else self.engine.get_global_grad_norm()

        return {
            **self._average(totals, counts),
            "learning_rate": rate,
            "gradient_norm": None if norm is None else float(norm),
            **scale,
            "tokens": int(totals[0]),
        }

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> StepMetrics:
        """Losses over all ranks' `batches`, without dropout or an update.

        Every rank gives equally many batches. The modes and the random state are restored.

        Raises:
            UserError: a loss is not finite.
        """
        sums = torch.zeros(2 + 4 * len(MODALITIES), dtype=torch.float64, device=self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        with dropout_disabled(self.model), torch.random.fork_rng(devices):
            for batch in batches:
                losses = self._losses(batch, VALIDATION)
                spans = [losses.signal_spans.get(m, 0) for m in MODALITIES]
                targets = [len(batch.targets.get(m, ())) for m in MODALITIES]
                sums += torch.cat([_as_vector(losses), sums.new_tensor(spans + targets)])
        dist.all_reduce(sums)
        totals = _check_finite(sums)
        counted = list(map(int, totals[2 + 2 * len(MODALITIES) :]))
        return self._average(totals, StepCounts(int(totals[0]), *split_by_modality(counted)))

    def save(self, folder: Path, writers: Sequence[int]) -> dict[str, Any]:
        """Write the exact state into `folder` for `load` by any number of ranks.

        All ranks take part. A writer holds parameters and moments in turn in its machine's memory.

        Args:
            writers: the ranks that write; several: each on another disk, a complete copy.

        Returns:
            What is no tensor: JSON for `load`.
        """
        updates = self.schedule.last_epoch  # without steps that an overflow skipped
        rank, trained = dist.get_rank(), self._trained()
        writes = rank in writers
        measured = {n: p for n, p in self.model.named_parameters() if is_measured(n)}
        parameters = measured | trained
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            if writes:
                tensors = {name: p.detach().cpu().clone() for name, p in parameters.items()}
                save_file(tensors, folder / f"{_PARAMETERS}.safetensors")
        for moment in MOMENTS if updates else ():
            tensors = gather_moment(self.engine, trained, moment, keep=writes)
            if writes:
                save_file(tensors, folder / f"{moment}.safetensors")
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        states = {rank: random}
        if len(writers) > 1:  # the other ranks' disks may be others
            gathered = all_gather_object(random)
            states = dict(enumerate(gathered)) if writes else {}
        for owner, state in states.items():
            save_file(state, folder / f"random_{owner}.safetensors")
        return {
            "step": self.engine.global_steps,
            "updates": updates,
            "loss_scale": self.loss_scale and self.loss_scale.state(),
            "world": self.world,
        }

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Restore what `save` wrote and returned, except the parameters: see `load_parameters`.

        With another number of ranks, their random states start from the seed and the step.

        Raises:
            UserError: a file cannot be read.
        """
        self.engine.global_steps, updates = state["step"], state["updates"]
        self.schedule.last_epoch = updates
        groups, rates = self.schedule.optimizer.param_groups, self.schedule.base_lrs
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * self._factor(updates)
        if updates:
            load = partial(_read_tensors, folder)
            restore_moments(self.engine, self._trained(), updates, load)
        if self.loss_scale and state["loss_scale"]:
            self.loss_scale.load(state["loss_scale"])
        rank = dist.get_rank()
        torch.manual_seed(self.training.seed + state["step"] * self.world + rank)
        if state["world"] == self.world:
            random = _read_tensors(folder, f"random_{rank}")
            torch.set_rng_state(random["cpu"])
            if self.device.type == "cuda" and "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"], self.device)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def tuned_tensors(self, *, base_vocabulary: bool) -> dict[str, torch.Tensor]:
        """The tuned parameters by name, on the CPU in float32; all ranks take part."""
        tuned = dict(tuned_parameters(self.model, base_vocabulary=base_vocabulary))
        with deepspeed.zero.GatheredParameters(list(tuned.values())):
            return {name: p.detach().float().cpu().clone() for name, p in tuned.items()}

    def _losses(self, batch: Batch, step: int) -> Losses:
        """The losses of one forward pass."""
        losses: Losses = self.engine(batch)
        if self.denoising is not None:
            self.denoising.add_to(losses, batch, step)
        return losses

    def _normalize(self, losses: Losses, counts: StepCounts) -> torch.Tensor:
        """This micro batch's part of the mean over all tokens, spans and target media of the step.

        DeepSpeed averages over ranks and micro batches; the factor undoes that.
        """
        loss, weights = losses.text / max(counts.tokens, 1), self.training.alignment_loss_weights
        for modality, total in losses.alignment.items():
            loss = loss + weights[modality] * total / counts.signal_spans[modality]
        for modality, total in losses.denoising.items():
            weight = self.training.denoising_loss_weights[modality]
            loss = loss + weight * total / counts.targets[modality]
        return loss * self.world * self.accumulation + losses.unused

    def _average(self, totals: list[float], counts: StepCounts) -> StepMetrics:
        """The mean losses of `_as_vector`'s sums; no tokens: the language model did not run."""
        (tokens, text_total), sums = totals[:2], totals[2 : 2 + 2 * len(MODALITIES)]
        text_loss = text_total / max(counts.tokens, 1)
        alignment, denoising = (
            {m: total / counted[m] for m, total in of_modality.items() if counted.get(m)}
            for of_modality, counted in zip(
                split_by_modality(sums), (counts.signal_spans, counts.targets), strict=True
            )
        )
        loss = text_loss
        loss += sum(self.training.alignment_loss_weights[m] * x for m, x in alignment.items())
        loss += sum(self.training.denoising_loss_weights[m] * x for m, x in denoising.items())
        return {
            "loss": loss,
            "text_loss": text_loss if tokens else None,
            **{f"alignment_{modality}": value for modality, value in alignment.items()},
            **{f"denoising_{modality}": value for modality, value in denoising.items()},
        }

    def _reduce_finite(self, sums: torch.Tensor) -> list[float]:
        """All-reduce `sums`, and check losses and gradients before the update."""
        dist.all_reduce(sums)
        totals = _check_finite(sums)
        if not self.engine.zero_optimization():
            # DeepSpeed would apply them. Accumulated and averaged, they are the same on all ranks.
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            if not torch.nn.utils.get_total_norm(gradients).isfinite():
                raise non_finite_gradient(self.dtype)
        return totals

    def _settings(self, dtype: torch.dtype) -> dict:
        """DeepSpeed's JSON, completed from the run's configuration."""
        settings = read_deepspeed_config(self.training)
        if self.device.type == "cpu":  # the optimizer is on the CPU already
            for key in ("offload_optimizer", "offload_param"):
                settings.get("zero_optimization", {}).pop(key, None)
        return settings | {
            "train_batch_size": self.training.global_batch_size,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.training.max_grad_norm,
            "steps_per_print": 2**31,
            "torch_autocast": {
                "enabled": dtype != torch.float32,
                "dtype": str(dtype).removeprefix("torch."),
                # DeepSpeed would reduce gradients of linear layers in `dtype`, where small ones are
                # lost and large ones overflow. In float32 4 bytes instead of 2 are sent.
                "lower_precision_safe_modules": [],
            },
        }


def _as_vector(losses: Losses) -> torch.Tensor:
    """Number of tokens, text loss, alignment and denoising loss by modality, float64 sums."""
    zero = torch.zeros_like(losses.text)
    sums = (
        total.get(m, zero) for total in (losses.alignment, losses.denoising) for m in MODALITIES
    )
    return torch.stack([zero + losses.tokens, losses.text, *sums]).detach().double()


def split_by_modality(values: Sequence[_Number]) -> list[dict[Modality, _Number]]:
    """Values of all modalities, one after the other for several quantities, by modality."""
    size = len(MODALITIES)
    starts = range(0, len(values), size)
    return [dict(zip(MODALITIES, values[start : start + size], strict=True)) for start in starts]


def _check_finite(sums: torch.Tensor) -> list[float]:
    totals = sums.tolist()
    if not all(map(isfinite, totals)):
        raise UserError("the loss is not finite: lower the learning rate or look at the data")
    return totals


def load_parameters(model: NextGPT, checkpoint: Path) -> None:
    """Load a checkpoint's parameters, which must be those that train, before DeepSpeed starts.

    Raises:
        UserError: they are of another model, or cannot be read.
    """
    tensors = _read_tensors(checkpoint, _PARAMETERS)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    faults = compare_state_dicts(model.state_dict(), tensors, required=trained)
    refuse_faults(checkpoint, faults, "another model's? remove it")
    model.load_state_dict(tensors, strict=False)


def _read_tensors(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    file = checkpoint / f"{name}.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} cannot be read: {error}: remove {checkpoint} to resume from an older one"
        ) from error


def _build_optimizer(
    model: NextGPT, training: TrainingConfig, *, offloads: bool
) -> torch.optim.Optimizer:
    """AdamW (DeepSpeed's `Adam`), a parameter group per learning rate."""
    rates: dict[str | None, float] = {**training.group_learning_rates}
    groups: dict[float, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = rates.get(group_of(name), training.learning_rate)
            if ".lora_B." in name:
                rate = rates.get("lora_B", rate)
            groups.setdefault(rate, {"params": [], "lr": rate})["params"].append(parameter)
    build = deepspeed.ops.adam.DeepSpeedCPUAdam if offloads else partial(AdamW, fused=True)
    return build(
        list(groups.values()),
        betas=training.betas,
        eps=training.adam_epsilon,
        weight_decay=training.weight_decay,
    )


def learning_rate_schedule(
    steps: int, warmup_ratio: float, warmup_type: Literal["log", "linear"]
) -> Callable[[int], float]:
    """Factor of the peak learning rate at each step from 0: warm-up to 1, then linear decay to 0.

    `log` is DeepSpeed's `WarmupDecayLR` with its default `warmup_type` over at least 10 steps, as
    published: log(step + 1) / log(warm-up steps), which is 0 in the first step. `linear` reaches
    the peak in the last warm-up step and is above 0 in the first.

    Args:
        steps: of the whole run; `warmup_ratio` of them have a rising rate.
    """
    is_log = warmup_type == "log"
    rising = warmup_ratio * steps
    warmup_steps = max(10, int(rising)) if is_log else max(1, round(rising))

    def factor(step: int) -> float:
        if step >= warmup_steps:
            return max(0.0, (steps - step) / max(1, steps - warmup_steps))
        return log(step + 1) / log(warmup_steps) if is_log else (step + 1) / warmup_steps

    return factor
