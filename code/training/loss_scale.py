"""Dynamic loss scaling for fp16 (arXiv 1710.03740) with DeepSpeed's ZeRO optimizers.

Under autocast DeepSpeed 0.19 clips gradients before they are unscaled, and keeps the scale after an
overflow, so that every later step is skipped.
"""

import torch

from nextgpt.common.errors import UserError

_INITIAL = 2.0**12
_GROWTH_INTERVAL = 500  # steps without overflow after which the scale is doubled


def non_finite_gradient(dtype: torch.dtype) -> UserError:
    """The error for a gradient that is not finite, in a run with products in `dtype`."""
    or_fp32 = "" if dtype == torch.float32 else ", or use fp32"
    return UserError(f"a gradient is not finite: lower the learning rate{or_fp32}")


class LossScale:
    """Factor of the losses, which keeps small gradients above 0 in fp16.

    Raises:
        UserError: the optimizer is not DeepSpeed's of ZeRO 1 to 3.
    """

    def __init__(self, optimizer: object) -> None:
        if not hasattr(optimizer, "override_loss_scale"):
            raise UserError("training.precision fp16 needs ZeRO stage 1, 2 or 3: see dsconfig")
        self._optimizer = optimizer
        self._optimizer.torch_autocast_gradscaler = None
        self._set(_INITIAL)

    def _set(self, scale: float, good_steps: int = 0) -> None:
        self.scale, self._good_steps = scale, good_steps
        self._optimizer.override_loss_scale(scale)

    def update(self, overflowed: bool) -> None:
        """Adapt the scale after a step, which an overflow may have skipped.

        Raises:
            UserError: the scale is 1 already, so it is no overflow.
        """
        self._good_steps += 1
        if overflowed and self.scale == 1:
            raise non_finite_gradient(torch.float16)
        if overflowed:
            self._set(self.scale / 2)
        elif self._good_steps == _GROWTH_INTERVAL:
            self._set(self.scale * 2)

    def state(self) -> dict[str, float]:
        """State for `load`."""
        return {"scale": self.scale, "good_steps": self._good_steps}

    def load(self, state: dict[str, float]) -> None:
        """Restore a saved state."""
        self._set(state["scale"], int(state["good_steps"]))
