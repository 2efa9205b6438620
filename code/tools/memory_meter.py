"""Counts the live bytes of tensors while operations run; on fake tensors, what they would need."""

import weakref
from itertools import chain
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten._index_put_impl_.default)


class MemoryMeter(TorchDispatchMode):
    """Dispatch mode that tracks the bytes of tensors made inside and still referenced.

    The model itself is not counted. Boolean masks, whose count only data could give, select all.

    Args:
        model: whose gradients are counted separately.
        gradient_shard: fraction of a complete gradient that stays on this rank under ZeRO.

    Attributes:
        live: bytes now.
        peak: most bytes at once.
        peak_besides: most bytes at once without complete gradients.
    """

    def __init__(self, model: nn.Module, gradient_shard: float = 1.0) -> None:
        super().__init__()
        self.live = 0.0
        self.peak = 0.0
        self.peak_besides = 0.0
        self._gradients = 0.0
        self._shard = gradient_shard
        held = chain(model.parameters(), model.buffers())
        # Bytes, by the storage's address.
        self._bytes: dict[int, float] = {t.untyped_storage()._cdata: 0.0 for t in held}
        self._of_gradients: set[int] = set()
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def __enter__(self) -> Self:
        hook = self._count_gradient
        self._hooks = [p.register_post_accumulate_grad_hook(hook) for p in self._parameters]
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is _aten._local_scalar_dense.default:
            return 1  # a count that only data could give
        if func in _INDEXING:
            args = (args[0], _all_rows(args[1]), *args[2:])
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._bytes:
            return
        self._bytes[storage._cdata] = storage.nbytes()
        self._add(storage.nbytes())
        weakref.finalize(storage, self._free, storage._cdata)

    def _count_gradient(self, parameter: nn.Parameter) -> None:
        """Count only this rank's shard of a complete gradient, and separately."""
        if parameter.grad is None:
            return
        address = parameter.grad.untyped_storage()._cdata
        if address in self._of_gradients or address not in self._bytes:
            return
        size = self._bytes[address] * self._shard
        self._of_gradients.add(address)
        self._gradients += size
        self._add(size - self._bytes[address])
        self._bytes[address] = size

    def _free(self, address: int) -> None:
        size = self._bytes.pop(address)
        if address in self._of_gradients:
            self._of_gradients.remove(address)
            self._gradients -= size
        self._add(-size)

    def _add(self, size: float) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_besides = max(self.peak_besides, self.live - self._gradients)


def _all_rows(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices in which masks select everything."""
    chosen: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            everything = torch.zeros(index.numel(), dtype=torch.int64, device=index.device)
            chosen += [everything] * index.dim()
        else:
            chosen.append(index)
    return chosen
