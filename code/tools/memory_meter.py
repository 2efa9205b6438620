"""Counts the bytes that are alive while operations run: on fake tensors, what they would need."""

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
    """In its block, `live` are the bytes of what operations have made and is still held.

    The model itself does not count. Where data decides how much there is (a mask chooses rows),
    which fake tensors cannot tell, all of it counts.

    Args:
        model: whose gradients are weighed apart.
        gradient_share: of a gradient, what stays in this process once it is complete: 1, or what
            ZeRO leaves of it.

    Attributes:
        live: bytes now.
        peak: the most bytes at once.
        peak_besides: the most bytes at once, complete gradients left out.
    """

    def __init__(self, model: nn.Module, gradient_share: float = 1.0) -> None:
        super().__init__()
        self.live = 0.0
        self.peak = 0.0
        self.peak_besides = 0.0
        self._gradients = 0.0
        self._share = gradient_share
        held = chain(model.parameters(), model.buffers())
        # Bytes, by the storage's address.
        self._weighs: dict[int, float] = {t.untyped_storage()._cdata: 0.0 for t in held}
        self._of_gradients: set[int] = set()
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def __enter__(self) -> Self:
        hook = self._weigh_gradient
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
            return 1  # a count that only data could tell
        if func in _INDEXING:
            args = (args[0], _all_rows(args[1]), *args[2:])
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._weigh(tensor)
        return made

    def _weigh(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._weighs:
            return
        self._weighs[storage._cdata] = storage.nbytes()
        self._grow(storage.nbytes())
        weakref.finalize(storage, self._free, storage._cdata)

    def _weigh_gradient(self, parameter: nn.Parameter) -> None:
        """A complete gradient: from now on only its share counts, and apart."""
        if parameter.grad is None:
            return
        address = parameter.grad.untyped_storage()._cdata
        if address in self._of_gradients or address not in self._weighs:
            return
        share = self._weighs[address] * self._share
        self._of_gradients.add(address)
        self._gradients += share
        self._grow(share - self._weighs[address])
        self._weighs[address] = share

    def _free(self, address: int) -> None:
        weight = self._weighs.pop(address)
        if address in self._of_gradients:
            self._of_gradients.remove(address)
            self._gradients -= weight
        self._grow(-weight)

    def _grow(self, weight: float) -> None:
        self.live += weight
        self.peak = max(self.peak, self.live)
        self.peak_besides = max(self.peak_besides, self.live - self._gradients)


def _all_rows(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices in which masks choose everything."""
    chosen: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            everything = torch.zeros(index.numel(), dtype=torch.int64, device=index.device)
            chosen += [everything] * index.dim()
        else:
            chosen.append(index)
    return chosen
