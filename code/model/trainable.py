"""What of the model is tuned: the one table behind freezing, modes, optimizer, saving, loading."""

from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import get_args

from torch import nn

from nextgpt.config.schema import TrainableGroup

TRAINABLE_GROUPS: tuple[TrainableGroup, ...] = get_args(TrainableGroup)
NEEDED_TO_ANSWER: frozenset[TrainableGroup] = frozenset(
    ("input_projection", "output_projections", "vocabulary")
)


def group_of(name: str) -> TrainableGroup | None:
    """The tuned part that the parameter called `name` belongs to; none for frozen weights."""
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
    """Whether `name` is one of the language model's own two vocabulary matrices."""
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


def is_measured(name: str) -> bool:
    """Whether `name` is a constant that is measured before training, saved and never trained."""
    return name.endswith(".centre")


def tuned_parameters(
    model: nn.Module, *, own_vocabulary: bool
) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of everything that can be tuned, in the model's order.

    Args:
        model: a NextGPT.
        own_vocabulary: whether the language model's own vocabulary rows count.
    """
    for name, parameter in model.named_parameters():
        if group_of(name) and (own_vocabulary or not is_base_vocabulary(name)):
            yield name, parameter


def set_trainable(model: nn.Module, trains: list[TrainableGroup], *, own_vocabulary: bool) -> None:
    """Freeze everything but the parts in `trains`, which become float32, and set the modes.

    From here on `model` is in training mode: see `set_modes`.
    """
    model.requires_grad_(False)
    for name, parameter in tuned_parameters(model, own_vocabulary=own_vocabulary):
        if group_of(name) in trains and not is_measured(name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    model.train()


def trained_groups(model: nn.Module) -> set[TrainableGroup | None]:
    """The parts with a parameter that asks for a gradient; none of them: the language model."""
    return {group_of(name) for name, one in model.named_parameters() if one.requires_grad}


def set_modes(model: nn.Module, trained: Set[TrainableGroup | None]) -> None:
    """Put modules of the parts in `trained` into training mode, all others into evaluation mode.

    Dropout is thus active in what trains only; it never is in a frozen adapter or in the language
    model. Exempt are modules that have no dropout and read their mode as "a backward pass comes":
    layers that recompute their activations, and quantized matrices, which without one are packed in
    a way that gradients do not pass through.
    """
    for name, module in model.named_modules():
        module.training = group_of(f"{name}.") in trained or _reads_mode_as_backward(module)


def _reads_mode_as_backward(module: nn.Module) -> bool:
    quantized = type(module).__module__.startswith("bitsandbytes.")
    return quantized or getattr(module, "gradient_checkpointing", False)


@contextmanager
def dropout_disabled(model: nn.Module) -> Iterator[None]:
    """Put everything into evaluation mode (see `set_modes`) and, at the end, back as it was."""
    before = model.training
    set_modes(model, set())
    try:
        yield
    finally:
        model.train(before)


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """By part, how many parameters it has and how many of them train; the frozen base model last.

    Parts that `model` lacks are left out.
    """
    counts: dict[str, tuple[int, int]] = dict.fromkeys(
        (*TRAINABLE_GROUPS, "language_model"), (0, 0)
    )
    for name, parameter in model.named_parameters():
        size, trains = parameter.numel(), parameter.requires_grad
        is_base = is_base_vocabulary(name) and not trains
        part = "language_model" if is_base else group_of(name) or "language_model"
        counts[part] = counts[part][0] + size, counts[part][1] + size * trains
    return {part: count for part, count in counts.items() if count[0]}


def format_parameter_counts(table: dict[str, tuple[int, int]]) -> str:
    """The table as text, for the start of a run."""
    lines = [f"{'part':<20}{'parameters':>14}  trains"]
    for part, (size, trained) in table.items():
        lines.append(f"{part:<20}{size:>14,}  {f'{trained:,}' if trained else 'frozen'}")
    total, trained = (sum(column) for column in zip(*table.values(), strict=True))
    lines.append(f"{'total':<20}{total:>14,}  {trained:,} ({100 * trained / total:.2f} %)")
    return "\n".join(lines)
