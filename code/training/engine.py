"""The DeepSpeed agent: one optimizer step over all processes, exact saves and loads.

DeepSpeed's JSON says how the optimizer is spread (ZeRO stage, offload). Batch size, precision,
clipping, optimizer and schedule come from the run. What trains is float32, and so are its gradients
and their sums over micro batches and processes; the frozen language model and the matrix products
are in the run's precision (autocast).
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import TrainingConfig
from nextgpt.conversation.batch import Batch
from nextgpt.model.loading import compare_state_dicts, refuse_faults
from nextgpt.model.nextgpt import Losses, NextGPT
from nextgpt.model.trainable import group_of, tuned_parameters
from nextgpt.training.loss_scale import LossScale, non_finite_gradient

_FILLED_IN = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "optimizer", "scheduler", "fp16", "bf16", "torch_autocast",
    "communication_data_type", "data_types",
)  # fmt: skip
_STATE = "state"  # DeepSpeed's tag: the folder with its files inside a checkpoint


@dataclass(frozen=True)
class StepCounts:
    """What one optimizer step reads over all processes."""

    tokens: int
    signal_spans: dict[Modality, int]


@dataclass(frozen=True)
class StepResult:
    """Losses of one step, averaged over all processes' tokens and runs, before the update."""

    loss: float
    text_loss: float | None  # none where the language model was left out
    alignment: dict[Modality, float]
    learning_rate: float
    gradient_norm: float | None  # none of a step left out by an overflow, and without ZeRO
    loss_scale: float | None  # that this step's losses were multiplied with; none but in fp16


def micro_batch_size(training: TrainingConfig, world: int) -> int:
    """Samples a forward pass: the largest divisor of a process's share up to the configured size.

    Raises:
        UserError: the global batch cannot be shared equally.
    """
    share, rest = divmod(training.global_batch_size, world)
    if rest:
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} cannot be shared equally by "
            f"{world} processes: set it to a multiple of them"
        )
    return max(n for n in range(1, share + 1) if share % n == 0 and n <= training.micro_batch_size)


def read_deepspeed_config(training: TrainingConfig) -> dict[str, Any]:
    """What DeepSpeed's JSON says.

    Raises:
        UserError: it cannot be read, or sets what comes from the run.
    """
    path = project_path(training.deepspeed_config)
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"training.deepspeed_config: {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"training.deepspeed_config: {path} holds no JSON object")
    if written := [key for key in _FILLED_IN if key in settings]:
        raise UserError(f"{path}: {', '.join(written)} come from the run, remove them here")
    if settings.get("zero_optimization", {}).get("compute_grad_norm", True) is not True:
        raise UserError(
            f"{path}: zero_optimization.compute_grad_norm must be on, by the gradients' norm a run "
            "tells those that overflow: remove it here"
        )
    return settings


class TrainEngine:
    """The model in DeepSpeed's hands.

    Args:
        model: with `requires_grad` set on what trains.
        training: the stage's configuration.
        steps: optimizer steps of the whole run, for the schedule.
        device, dtype: where and in which precision.
    """

    def __init__(
        self,
        model: NextGPT,
        training: TrainingConfig,
        steps: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.training = training
        self.device = device
        self.dtype = dtype
        self.world = dist.get_world_size()
        self.micro_batch_size = micro_batch_size(training, self.world)
        self.accumulation = training.global_batch_size // self.world // self.micro_batch_size
        settings = self._settings(dtype)
        self._factor = learning_rate_schedule(steps, training.warmup_ratio, training.warmup_type)
        optimizer = _optimizer(model, training, offloaded=_offloads(settings))
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
        half = dtype == torch.float16
        self.loss_scale = LossScale(self.engine.optimizer) if half else None

    @property
    def model(self) -> NextGPT:
        """The model itself."""
        return self.engine.module

    def step(self, batches: list[Batch], counts: StepCounts) -> StepResult:
        """One optimizer step over this process's `batches`; `counts` are those of all processes.

        In fp16 a step whose gradients overflow is left out, and the loss scale is halved.

        Raises:
            UserError: a loss or gradient is not finite; nothing was updated.
        """
        self.engine.train()
        rate = self.training.learning_rate * self._factor(self.schedule.last_epoch)
        sums = torch.zeros(1 + len(MODALITIES), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(batches):
            losses: Losses = self.engine(batch)
            self.engine.backward(self._share_of_loss(losses, counts))
            nothing = torch.zeros_like(losses.text)
            parts = [losses.text, *(losses.alignment.get(m, nothing) for m in MODALITIES)]
            sums += torch.stack(parts).detach()
            if index + 1 == len(batches):
                totals = self._checked_totals(sums)
                self._check_unsharded_gradients()
            self.engine.step()
        scale = self.loss_scale and self.loss_scale.scale
        overflowed = self._overflowed()
        if self.loss_scale:
            self.loss_scale.update(overflowed)
        elif overflowed:
            raise non_finite_gradient(self.dtype)
        norm = None if overflowed else self.engine.get_global_grad_norm()
        return self._result(totals, counts, rate, norm, scale)

    def save(self, folder: Path) -> None:
        """Write this process's part of the exact state into `folder`; all processes take part."""
        self.engine.save_checkpoint(
            str(folder), tag=_STATE, exclude_frozen_parameters=True, save_latest=False
        )
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.loss_scale:
            random |= self.loss_scale.state()
        save_file(random, folder / f"random_{dist.get_rank()}.safetensors")

    def load(self, folder: Path) -> None:
        """Take up the state that `save` wrote.

        Raises:
            UserError: it is not of this model and these processes.
        """
        path, _ = self.engine.load_checkpoint(
            str(folder), tag=_STATE, custom_load_fn=_load_what_trains
        )
        if path is None:
            raise UserError(f"{folder} cannot be read: remove it to resume from an older one")
        random = load_file(folder / f"random_{dist.get_rank()}.safetensors")
        torch.set_rng_state(random["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.device)
        if self.loss_scale:
            self.loss_scale.load(random)

    def tuned_tensors(self, *, base_vocabulary: bool) -> dict[str, torch.Tensor]:
        """The tuned parameters by name, on the CPU in float32; all processes take part."""
        tuned = dict(tuned_parameters(self.model, base_vocabulary=base_vocabulary))
        with deepspeed.zero.GatheredParameters(list(tuned.values())):
            return {name: p.detach().float().cpu().clone() for name, p in tuned.items()}

    def _share_of_loss(self, losses: Losses, counts: StepCounts) -> torch.Tensor:
        """This micro batch's part of the mean over all tokens and runs of the step.

        DeepSpeed will average over processes and micro batches; the factor undoes it.
        """
        loss = losses.text / max(counts.tokens, 1)
        for modality, distance in losses.alignment.items():
            weight = self.training.alignment_loss_weights[modality]
            loss = loss + weight * distance / counts.signal_spans[modality]
        return loss * self.world * self.accumulation + losses.unused

    def _checked_totals(self, sums: torch.Tensor) -> list[float]:
        """`sums` over all processes, before the update that they could spoil."""
        dist.all_reduce(sums)
        totals = sums.tolist()
        if not all(math.isfinite(total) for total in totals):
            raise UserError("the loss is not finite: lower the learning rate or look at the data")
        return totals

    def _check_unsharded_gradients(self) -> None:
        """Refuse a step that nobody else would: without ZeRO, DeepSpeed takes each.

        The gradients are those of the step, accumulated and averaged: alike in all processes.
        """
        if self.engine.zero_optimization():
            return
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.model.parameters() if p.grad is not None]
        )
        if not torch.isfinite(norm):
            raise non_finite_gradient(self.dtype)

    def _overflowed(self) -> bool:
        """Whether DeepSpeed left this step out, which it does in all processes or in none.

        ZeRO looks at what it would step with: the gradients' norm after accumulation and reduction,
        which is not finite where a single gradient, a sum of them, or the norm itself is not.
        """
        return self.engine.zero_optimization() and self.engine.optimizer.overflow

    def _result(
        self,
        totals: list[float],
        counts: StepCounts,
        rate: float,
        norm: float | None,
        scale: float | None,
    ) -> StepResult:
        text_loss = totals[0] / max(counts.tokens, 1)
        alignment = {
            modality: total / counts.signal_spans[modality]
            for modality, total in zip(MODALITIES, totals[1:], strict=True)
            if counts.signal_spans[modality]
        }
        weights = self.training.alignment_loss_weights
        loss = text_loss + sum(weights[m] * value for m, value in alignment.items())
        read = text_loss if counts.tokens else None
        return StepResult(loss, read, alignment, rate, None if norm is None else float(norm), scale)

    def _settings(self, dtype: torch.dtype) -> dict:
        """DeepSpeed's JSON with the run's figures filled in."""
        settings = read_deepspeed_config(self.training)
        if self.device.type == "cpu":  # the optimizer is on the CPU already
            settings.get("zero_optimization", {}).pop("offload_optimizer", None)
            settings.get("zero_optimization", {}).pop("offload_param", None)
        return settings | {
            "train_batch_size": self.training.global_batch_size,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.training.max_grad_norm,
            "steps_per_print": 2**31,
            "torch_autocast": {
                "enabled": dtype != torch.float32,
                "dtype": str(dtype).removeprefix("torch."),
                # Of linear layers DeepSpeed would sum gradients in `dtype`, where small ones are
                # lost and large ones overflow. In float32, 4 bytes instead of 2 of each are sent.
                "lower_precision_safe_modules": [],
            },
        }


def _load_what_trains(src: dict[str, torch.Tensor], dst: NextGPT) -> None:
    """Load the saved parameters, which must be those that train, and nothing else."""
    trained = [name for name, parameter in dst.named_parameters() if parameter.requires_grad]
    faults = compare_state_dicts(dst.state_dict(), src, required=trained)
    refuse_faults("the checkpoint", faults, "another model's? remove it")
    dst.load_state_dict(src, strict=False)


def _offloads(settings: dict) -> bool:
    return "offload_optimizer" in settings.get("zero_optimization", {})


def _optimizer(
    model: NextGPT, training: TrainingConfig, *, offloaded: bool
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (what DeepSpeed's `Adam` is), one group a rate."""
    groups: dict[float, list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(_peak_rate(name, training), []).append(parameter)
    arguments = {
        "betas": training.betas,
        "eps": training.adam_epsilon,
        "weight_decay": training.weight_decay,
    }
    rates = [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
    if offloaded:
        return deepspeed.ops.adam.DeepSpeedCPUAdam(rates, **arguments)
    return torch.optim.AdamW(rates, fused=True, **arguments)


def _peak_rate(name: str, training: TrainingConfig) -> float:
    """The peak learning rate of the parameter called `name`."""
    rates = training.group_learning_rates
    if ".lora_B." in name and "lora_B" in rates:
        return rates["lora_B"]
    return rates.get(group_of(name), training.learning_rate)


def learning_rate_schedule(
    steps: int, warmup: float, warmup_type: Literal["log", "linear"]
) -> Callable[[int], float]:
    """Factor of the peak learning rate at each step from 0: warm-up to 1, then linear decay to 0.

    `log` is DeepSpeed's `WarmupDecayLR` with its default `warmup_type` over at least 10 steps, as
    published: log(step + 1) / log(warm-up steps), which is 0 in the first step. `linear` reaches
    the peak in the last warm-up step and is above 0 in the first.

    Args:
        steps: of the whole run.
        warmup: share of them with a rising rate.
        warmup_type: how it rises.
    """
    rising = max(10, int(warmup * steps)) if warmup_type == "log" else max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            if warmup_type == "log":
                return math.log(step + 1) / math.log(rising)
            return (step + 1) / rising
        return max(0.0, (steps - step) / max(1, steps - rising))

    return factor
