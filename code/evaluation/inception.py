"""Inception v3 of the Fréchet inception distance (FID, arXiv 1706.08500), from its usual file.

The network is that of TensorFlow's release of 2015-12-05, with 1008 classes, in PyTorch's names:
`pt_inception-2015-12-05-6726825d.pth`. It differs from torchvision's in its poolings, and images
are resized as in TensorFlow 1. An image costs 6 billion multiplications.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from nextgpt.model.loading import compare_state_dicts, map_tensors, refuse_faults

FEATURES, CLASSES, SIZE = 2048, 1008, 299
_Kernel = int | tuple[int, int]
_Spec = Mapping[str, tuple]  # by layer: its input, output channels, kernel, and optionally stride


class BasicConv2d(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self, channels: int, out: int, kernel: _Kernel, stride: int = 1, *, pad: bool = True
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(side // 2 for side in sides) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(channels, out, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class Block(nn.Module):
    """Parallel branches of convolutions, concatenated by channels.

    Args:
        spec: the layers, in the order of the output; layers that are no other's input are output.
            The input `pool` is the pooled input, and is itself output where no layer has it.
        pool: `average` or `maximum`; `halve`: maximum with stride 2.
    """

    def __init__(self, channels: int, spec: _Spec, pool: str = "average") -> None:
        super().__init__()
        self.spec, self.pool = spec, pool
        widths = {"input": channels, "pool": channels}
        for name, (source, out, *kernel) in spec.items():
            self.add_module(name, BasicConv2d(widths[source], out, *kernel))
            widths[name] = out
        sources = {source for source, *_ in spec.values()}
        self.outputs = [name for name in [*spec, "pool"] if name not in sources]
        self.width = sum(widths[name] for name in self.outputs)

    def forward(self, x: Tensor) -> Tensor:
        values = {"input": x, "pool": self._pooled(x)}
        for name, (source, *_) in self.spec.items():
            values[name] = getattr(self, name)(values[source])
        return torch.cat([values[name] for name in self.outputs], dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "average":
            return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return max_pool2d(x, 3, stride=2) if self.pool == "halve" else max_pool2d(x, 3, 1, 1)


def _block_a(pool_width: int) -> _Spec:
    return {
        "branch1x1": ("input", 64, 1),
        "branch5x5_1": ("input", 48, 1),
        "branch5x5_2": ("branch5x5_1", 64, 5),
        "branch3x3dbl_1": ("input", 64, 1),
        "branch3x3dbl_2": ("branch3x3dbl_1", 96, 3),
        "branch3x3dbl_3": ("branch3x3dbl_2", 96, 3),
        "branch_pool": ("pool", pool_width, 1),
    }


def _block_c(width: int) -> _Spec:
    return {
        "branch1x1": ("input", 192, 1),
        "branch7x7_1": ("input", width, 1),
        "branch7x7_2": ("branch7x7_1", width, (1, 7)),
        "branch7x7_3": ("branch7x7_2", 192, (7, 1)),
        "branch7x7dbl_1": ("input", width, 1),
        "branch7x7dbl_2": ("branch7x7dbl_1", width, (7, 1)),
        "branch7x7dbl_3": ("branch7x7dbl_2", width, (1, 7)),
        "branch7x7dbl_4": ("branch7x7dbl_3", width, (7, 1)),
        "branch7x7dbl_5": ("branch7x7dbl_4", 192, (1, 7)),
        "branch_pool": ("pool", 192, 1),
    }


_BLOCK_B: _Spec = {
    "branch3x3": ("input", 384, 3, 2),
    "branch3x3dbl_1": ("input", 64, 1),
    "branch3x3dbl_2": ("branch3x3dbl_1", 96, 3),
    "branch3x3dbl_3": ("branch3x3dbl_2", 96, 3, 2),
}
_BLOCK_D: _Spec = {
    "branch3x3_1": ("input", 192, 1),
    "branch3x3_2": ("branch3x3_1", 320, 3, 2),
    "branch7x7x3_1": ("input", 192, 1),
    "branch7x7x3_2": ("branch7x7x3_1", 192, (1, 7)),
    "branch7x7x3_3": ("branch7x7x3_2", 192, (7, 1)),
    "branch7x7x3_4": ("branch7x7x3_3", 192, 3, 2),
}
_BLOCK_E: _Spec = {
    "branch1x1": ("input", 320, 1),
    "branch3x3_1": ("input", 384, 1),
    "branch3x3_2a": ("branch3x3_1", 384, (1, 3)),
    "branch3x3_2b": ("branch3x3_1", 384, (3, 1)),
    "branch3x3dbl_1": ("input", 448, 1),
    "branch3x3dbl_2": ("branch3x3dbl_1", 384, 3),
    "branch3x3dbl_3a": ("branch3x3dbl_2", 384, (1, 3)),
    "branch3x3dbl_3b": ("branch3x3dbl_2", 384, (3, 1)),
    "branch_pool": ("pool", 192, 1),
}


class InceptionV3(nn.Module):
    """RGB images (B, 3, H, W) uint8 -> features (B, 2048) of the last pooling."""

    blocks: ClassVar[dict[str, tuple[_Spec, str]]] = {
        "Mixed_5b": (_block_a(32), "average"),
        "Mixed_5c": (_block_a(64), "average"),
        "Mixed_5d": (_block_a(64), "average"),
        "Mixed_6a": (_BLOCK_B, "halve"),
        "Mixed_6b": (_block_c(128), "average"),
        "Mixed_6c": (_block_c(160), "average"),
        "Mixed_6d": (_block_c(160), "average"),
        "Mixed_6e": (_block_c(192), "average"),
        "Mixed_7a": (_BLOCK_D, "halve"),
        "Mixed_7b": (_BLOCK_E, "average"),
        "Mixed_7c": (_BLOCK_E, "maximum"),
    }

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, pad=False)
        width = 192
        for name, (spec, pool) in self.blocks.items():
            block = Block(width, spec, pool)
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(width, classes)  # of the file; its output is not used

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x = (resize_tensorflow(pixels_BCHW.float(), SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, stride=2)))
        x = max_pool2d(x, 3, stride=2)
        for name in self.blocks:
            x = getattr(self, name)(x)
        return x.mean(dim=(2, 3))


def resize_tensorflow(x_BCHW: Tensor, size: int) -> Tensor:
    """Resize to a square as TensorFlow 1 does: bilinear, pixel i of n at i · n / size."""
    for dim in (2, 3):
        length = x_BCHW.shape[dim]
        positions = torch.arange(size, device=x_BCHW.device) * (length / size)
        below = positions.long()
        above = (below + 1).clamp(max=length - 1)
        weight = (positions - below).view(-1, *([1] * (3 - dim)))
        low, high = (x_BCHW.index_select(dim, index) for index in (below, above))
        x_BCHW = low + (high - low) * weight
    return x_BCHW


def load_inception(file: Path) -> InceptionV3:
    """Load the network from a state dict, in evaluation mode.

    Raises:
        UserError: the file cannot be read, or is of another network.
    """
    with torch.device("meta"):
        network = InceptionV3()
    tensors = map_tensors(file)
    counters = [name for name in network.state_dict() if name.endswith("num_batches_tracked")]
    tensors |= {name: torch.tensor(0) for name in counters if name not in tensors}
    faults = compare_state_dicts(network.state_dict(), tensors)
    refuse_faults(file, faults, "give pt_inception-2015-12-05-6726825d.pth")
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)
