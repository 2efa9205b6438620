"""Recorded cases, weights by recipe and the relative error of the parity tests."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from parity.recipe import recipe_tensor

PARITY = Path(__file__).parent / "parity"
MEDIA = PARITY / "media"


@cache
def cases() -> dict[str, torch.Tensor]:
    """Load every recorded tensor by name. Shared between tests: do not modify."""
    return load_file(PARITY / "cases.safetensors")


def recipe_state(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each parameter's name and its recipe value under the name `prefix` + name."""
    for name, parameter in module.named_parameters():
        yield name, recipe_tensor(prefix + name, parameter.shape)


@torch.no_grad()
def fill_by_recipe(module: nn.Module, prefix: str = "") -> None:
    """Overwrite every parameter of `module` in place; buffers keep their values."""
    parameters = dict(module.named_parameters())
    for name, value in recipe_state(module, prefix):
        parameters[name].copy_(value)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the Euclidean norm of the difference over the norm of `expected`."""
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm()).item()
