"""The dynamic loss scale that fp16 needs (arXiv 1710.03740), for DeepSpeed's ZeRO optimizers.

Their own, with autocast, clips gradients while these are still scaled, and keeps the scale when one
overflows (DeepSpeed 0.19): from then on no step is taken.
"""

import torch

from nextgpt.common.errors import UserError

_FIRST = 2.0**12
_GOOD_STEPS = 500  # after which twice as much is tried
_STATE = "loss_scale"


def non_finite_gradient(dtype: torch.dtype) -> UserError:
    """The error of a gradient that is not finite, in a run whose products are in `dtype`."""
    other = "" if dtype == torch.float32 else ", or use fp32"
    return UserError(f"a gradient is not finite: lower the learning rate{other}")


class LossScale:
    """What losses are multiplied with, so that small gradients are told from 0 in fp16.

    Args:
        optimizer: DeepSpeed's, of ZeRO 1 to 3.

    Raises:
        UserError: it is another one.
    """

    def __init__(self, optimizer: object) -> None:
        if not hasattr(optimizer, "override_loss_scale"):
            raise UserError("training.precision fp16 needs ZeRO stage 1, 2 or 3: see dsconfig")
        self._optimizer = optimizer
        self._optimizer.torch_autocast_gradscaler = None
        self._good_steps = 0
        self._set(_FIRST)

    def _set(self, scale: float) -> None:
        self.scale = scale
        self._optimizer.override_loss_scale(scale)

    def update(self, overflowed: bool) -> None:
        """After a step, or after one that an overflow let fail.

        Raises:
            UserError: nothing is left to be halved: it is no overflow.
        """
        self._good_steps = 0 if overflowed else self._good_steps + 1
        if overflowed:
            if self.scale == 1:
                raise non_finite_gradient(torch.float16)
            self._set(self.scale / 2)
        elif self._good_steps == _GOOD_STEPS:
            self._good_steps = 0
            self._set(self.scale * 2)

    def state(self) -> dict[str, torch.Tensor]:
        """What `load` needs to go on."""
        return {_STATE: torch.tensor([self.scale, self._good_steps], dtype=torch.float64)}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a saved state."""
        scale, good_steps = state[_STATE].tolist()
        self._good_steps = int(good_steps)
        self._set(scale)
