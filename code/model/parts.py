"""What of the model is tuned: the one table behind freezing, the optimizer, saving and loading."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from torch import nn

from config.schema import Part

PARTS: tuple[Part, ...] = get_args(Part)


def part_of(name: str) -> Part | None:
    """The tuned part that the parameter called `name` belongs to; none for frozen weights."""
    if name.startswith("input_projection."):
        return "input_projection"
    if name.startswith("output_projections."):
        return "output_projections"
    if ".lora_" in name:
        return "lora"
    if name.endswith(".new_rows") or is_own_vocabulary(name):
        return "vocabulary"
    return None


def is_own_vocabulary(name: str) -> bool:
    """Whether `name` is one of the language model's own two vocabulary matrices."""
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


def tuned_parameters(
    model: nn.Module, *, own_vocabulary: bool
) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of everything that can be tuned, in the model's order.

    Args:
        model: a NextGPT.
        own_vocabulary: whether the language model's own vocabulary rows count.
    """
    for name, parameter in model.named_parameters():
        if part_of(name) and (own_vocabulary or not is_own_vocabulary(name)):
            yield name, parameter


def set_trainable(model: nn.Module, trains: list[Part], *, own_vocabulary: bool) -> None:
    """Freeze everything but the parts in `trains`; what trains is float32 from here on."""
    model.requires_grad_(False)
    for name, parameter in tuned_parameters(model, own_vocabulary=own_vocabulary):
        if part_of(name) in trains:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class PartRow:
    """A line of the table: a part, how many parameters it has, and how many of them train."""

    part: str
    parameters: int
    trained: int


def parts_table(model: nn.Module) -> list[PartRow]:
    """One row for each part of `model`, the frozen language model last."""
    counts: dict[str, list[int]] = {part: [0, 0] for part in [*PARTS, "language_model"]}
    for name, parameter in model.named_parameters():
        trains = parameter.requires_grad
        is_base = is_own_vocabulary(name) and not trains
        count = counts["language_model" if is_base else part_of(name) or "language_model"]
        count[0] += parameter.numel()
        count[1] += parameter.numel() if trains else 0
    return [PartRow(part, *count) for part, count in counts.items() if count[0]]


def format_parts_table(rows: list[PartRow]) -> str:
    """The table as text, for the start of a run."""
    lines = [f"{'part':<20}{'parameters':>14}  trains"]
    for row in rows:
        state = "frozen" if not row.trained else f"{row.trained:,}"
        lines.append(f"{row.part:<20}{row.parameters:>14,}  {state}")
    total = sum(row.parameters for row in rows)
    trained = sum(row.trained for row in rows)
    lines.append(f"{'total':<20}{total:>14,}  {trained:,} ({100 * trained / total:.2f} %)")
    return "\n".join(lines)
