"""CUDA graphs: on a GPU the small networks take less time than their kernels' launches.

A video network's forward and backward pass are two thousand launches.
"""

import torch
from torch import Tensor, nn


class ReplayedByShape(nn.Module):
    """A module whose passes are recorded once for each shape of its inputs, and then replayed.

    On a CPU, or without gradients, it is the module as it is. What it is made of must not be
    replaced meanwhile; weights that change in place, as an optimizer's do, are seen.
    """

    def __init__(self, module: nn.Module) -> None:
        """Record nothing yet."""
        super().__init__()
        self.module = module
        self._recorded: dict[tuple[torch.Size, ...], nn.Module] = {}

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the module gives for these inputs, which need no gradients themselves."""
        if inputs[0].device.type != "cuda" or not torch.is_grad_enabled():
            return self.module(*inputs)
        shapes = tuple(one.shape for one in inputs)
        if shapes not in self._recorded:
            samples = tuple(one.clone() for one in inputs)
            # A single frame leaves layers over time unused.
            self._recorded[shapes] = torch.cuda.make_graphed_callables(
                _Alias(self.module), samples, allow_unused_input=True
            )
        return self._recorded[shapes](*inputs)


class _Alias(nn.Module):
    """A module of its own around another: recording changes its `forward`, once for each shape."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)
