"""Formats a memory estimate: bytes by use, and whether it fits this machine and common GPUs."""

import psutil
import torch

from nextgpt.model.trainable import format_parameter_counts
from nextgpt.tools.memory_estimate import MemoryEstimate

_GPU_SIZES = (24, 48, 80)  # GB
_USABLE = 0.9  # of a memory: the rest is for CUDA, libraries and fragmentation


def format_memory_estimate(estimate: MemoryEstimate) -> str:
    """The estimate as text."""
    lines = [estimate.summary, format_parameter_counts(estimate.groups), "", "on each GPU, GB"]
    lines += [_row(use, size) for use, size in estimate.on_device.items()]
    lines.append(_row("at most at once", estimate.peak))
    lines += ["", "in the machine's memory, for each process, GB"]
    lines += [_row(use, size) for use, size in estimate.in_memory.items()]
    lines.append(_row("weights, while they are loaded", estimate.loading))
    lines.append(_row("at most at once", estimate.memory_peak))
    lines += ["", "serving, GB"]
    lines += [_row(component, size) for component, size in estimate.serving.items()]
    lines.append(_row("together", sum(estimate.serving.values())))
    lines += ["", *_verdicts(estimate)]
    return "\n".join(lines)


def _row(name: str, size: float) -> str:
    return f"  {name:<44}{size / 1e9:>9.2f}"


def _verdicts(estimate: MemoryEstimate) -> list[str]:
    """Whether it fits the memory and GPUs of this machine, and common GPUs."""
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpus = {f"{i}: {one.name}": one.total_memory for i, one in enumerate(devices)}
    gpus |= {f"a GPU of {size} GB": size * 1e9 for size in _GPU_SIZES}
    if devices:
        name, needed = "this machine's memory", estimate.memory_peak
    else:
        name = "no GPU here; this machine's memory"
        needed = sum(estimate.in_memory.values()) + estimate.peak
    size = psutil.virtual_memory().total
    room, wanted = int(_USABLE * size / needed), estimate.processes
    verdict = "fits" if room >= wanted else f"room for {room} of {wanted} processes"
    lines = [f"{name} ({size / 1e9:.0f} GB): {verdict}"]
    for name, size in gpus.items():
        verdict = "fits" if estimate.peak < _USABLE * size else "does not fit"
        lines.append(f"{name} ({size / 1e9:.0f} GB): {verdict}")
    return lines
