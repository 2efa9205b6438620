"""The trainable groups: the one table behind freezing, modes, optimizer, saving and loading."""

from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import get_args

from torch import nn

from nextgpt.config.schema import TrainableGroup

TRAINABLE_GROUPS: tuple[TrainableGroup, ...] = get_args(TrainableGroup)
NEEDED_TO_ANSWER: Set[TrainableGroup] = {"input_projection", "output_projections", "vocabulary"}


def group_of(name: str) -> TrainableGroup | None:
    """Return the trainable group of the parameter called `name`; None for frozen weights."""
    if name.startswith("input_projection."):
        return "input_projection"
    if name.startswith("output_projections."):
        return "output_projections"
    if ".lora_" in name:
        return "lora"
    if name.endswith(".new_rows") or is_base_vocabulary(name):
        return "vocabulary"
    return None


def is_base_vocabulary(name: str) -> bool:
    """Whether `name` is the language model's own embedding matrix or LM head."""
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


def is_measured(name: str) -> bool:
    """Whether `name` is a mean of hidden states: measured before training, then constant."""
    return name.endswith(".centre")


def tuned_parameters(
    model: nn.Module, *, base_vocabulary: bool
) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over parameters of the trainable groups, frozen or not, by name.

    `base_vocabulary`: include the language model's own vocabulary matrices.
    """
    for name, parameter in model.named_parameters():
        if group_of(name) and (base_vocabulary or not is_base_vocabulary(name)):
            yield name, parameter


def set_trainable(model: nn.Module, groups: list[TrainableGroup], *, base_vocabulary: bool) -> None:
    """Freeze all but `groups`, unfreeze those in float32, and switch to training mode."""
    model.requires_grad_(False)
    for name, parameter in tuned_parameters(model, base_vocabulary=base_vocabulary):
        if group_of(name) in groups and not is_measured(name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    model.train()


def trained_groups(model: nn.Module) -> set[TrainableGroup | None]:
    """Return the groups with a parameter that requires a gradient; None: the language model."""
    return {group_of(name) for name, p in model.named_parameters() if p.requires_grad}


def set_modes(model: nn.Module, trained: Set[TrainableGroup | None]) -> None:
    """Put modules of the groups `trained` into training mode, all others into evaluation mode.

    Dropout is thus active in what trains only. Exempt are modules without dropout that need
    training mode for a backward pass: layers with activation checkpointing, and quantized matrices.
    """
    for name, module in model.named_modules():
        quantized = type(module).__module__.startswith("bitsandbytes.")
        exempt = quantized or getattr(module, "gradient_checkpointing", False)
        module.training = group_of(f"{name}.") in trained or exempt


@contextmanager
def dropout_disabled(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode inside, with the exceptions of `set_modes`."""
    before = model.training
    set_modes(model, set())
    try:
        yield
    finally:
        model.train(before)


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Count parameters by group that `model` has, all and trained; the language model last."""
    counts = dict.fromkeys((*TRAINABLE_GROUPS, "language_model"), (0, 0))
    for name, parameter in model.named_parameters():
        size, trains = parameter.numel(), parameter.requires_grad
        group = group_of(name) if trains or not is_base_vocabulary(name) else None
        total, trained = counts[group or "language_model"]
        counts[group or "language_model"] = total + size, trained + size * trains
    return {group: count for group, count in counts.items() if count[0]}


def format_parameter_counts(table: dict[str, tuple[int, int]]) -> str:
    """Format the counts as a table."""
    lines = [f"{'part':<20}{'parameters':>14}  trains"]
    for group, (size, trained) in table.items():
        lines.append(f"{group:<20}{size:>14,}  {f'{trained:,}' if trained else 'frozen'}")
    total, trained = (sum(column) for column in zip(*table.values(), strict=True))
    lines.append(f"{'total':<20}{total:>14,}  {trained:,} ({100 * trained / total:.2f} %)")
    return "\n".join(lines)
