"""A plan as text: what each use needs, and whether it fits the machine at hand and common GPUs."""

import psutil
import torch

from nextgpt.model.trainable import format_parameter_counts
from nextgpt.tools.memory_estimate import Plan

_CARDS = (24, 48, 80)  # GB
_HEADROOM = 0.9  # of a memory: the rest is left for CUDA, for libraries and for gaps


def format_memory_estimate(plan: Plan) -> str:
    """The plan as text."""
    lines = [plan.facts, format_parameter_counts(plan.parts), "", "on each GPU, GB"]
    lines += [_row(use, size) for use, size in plan.on_device.items()]
    lines.append(_row("at most at once", plan.peak))
    lines += ["", "in the machine's memory, for each process, GB"]
    lines += [_row(use, size) for use, size in plan.in_memory.items()]
    lines.append(_row("weights, while they are loaded", plan.loading))
    lines.append(_row("at most at once", plan.memory_peak))
    lines += ["", "serving, GB"]
    lines += [_row(part, size) for part, size in plan.serving.items()]
    lines.append(_row("together", sum(plan.serving.values())))
    lines += ["", *_fitting(plan)]
    return "\n".join(lines)


def _row(name: str, size: float) -> str:
    return f"  {name:<44}{size / 1e9:>9.2f}"


def _fitting(plan: Plan) -> list[str]:
    """Whether it fits the machine and devices at hand, and common ones; a tenth is left free."""
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    cards = {f"{i}: {one.name}": one.total_memory for i, one in enumerate(devices)}
    cards |= {f"a GPU of {size} GB": size * 1e9 for size in _CARDS}
    if devices:
        name, need = "this machine's memory", plan.memory_peak
    else:
        name, need = "no GPU here; this machine's memory", sum(plan.in_memory.values()) + plan.peak
    size = psutil.virtual_memory().total
    room = int(_HEADROOM * size / need)
    fits = "fits" if room >= plan.processes else f"room for {room} of {plan.processes} processes"
    lines = [f"{name} ({size / 1e9:.0f} GB): {fits}"]
    for name, size in cards.items():
        fits = "fits" if plan.peak < _HEADROOM * size else "does not fit"
        lines.append(f"{name} ({size / 1e9:.0f} GB): {fits}")
    return lines
