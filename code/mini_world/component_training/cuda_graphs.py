"""CUDA graphs: on a GPU, the small networks' kernel launches cost more than their kernels.

The video U-Net's forward and backward pass are two thousand launches.
"""

import torch
from torch import Tensor, nn


class GraphedModule(nn.Module):
    """A module whose forward and backward pass are captured once per input shape and replayed.

    On CPU, or without gradients, it calls the module directly. Parameters may change in place, as
    an optimizer does, but must not be replaced.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._graphs: dict[tuple[torch.Size, ...], nn.Module] = {}

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the module's output; the inputs must not require gradients."""
        if inputs[0].device.type != "cuda" or not torch.is_grad_enabled():
            return self.module(*inputs)
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._graphs:
            samples = tuple(tensor.clone() for tensor in inputs)
            # A single frame leaves temporal layers unused.
            self._graphs[shapes] = torch.cuda.make_graphed_callables(
                _Alias(self.module), samples, allow_unused_input=True
            )
        return self._graphs[shapes](*inputs)


class _Alias(nn.Module):
    """A wrapper per shape: capturing replaces the `forward` of the module it is given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)
