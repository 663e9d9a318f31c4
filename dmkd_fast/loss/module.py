"""The loss as a module, which also takes the call of the published DM-KD code."""

from __future__ import annotations

from numbers import Real
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from dmkd_fast.loss.arguments import Options, Settings
from dmkd_fast.loss.divergences import terms_of
from dmkd_fast.loss.functional import KdLossParts, kd_loss
from dmkd_fast.runtime.errors import invalid


class DistillKL(nn.Module):
    """Compute `kd_loss` as a module.

    The call of the published DM-KD code works too: `DistillKL()(y_s, y_t, temp, opt)`, with the
    temperature as third argument. `opt` is ignored, as in that code.

    Args:
        temperature: Softmax temperature T; None: the default of `kd_loss`, unless a call gives one.
        settings: alpha, reduction, t_squared, ignore_index, label_smoothing, divergence,
            standardize_logits, class_dim, num_classes: same as for `kd_loss`.
    """

    def __init__(
        self, temperature: float | Tensor | None = None, **settings: Unpack[Settings]
    ) -> None:
        super().__init__()
        if unknown := set(settings) - set(Settings.__annotations__):
            raise TypeError(
                f"DistillKL: got {sorted(unknown)}, expected {[*Settings.__annotations__]}"
            )
        terms_of(settings.get("divergence", "forward_kl"))  # an error comes here, not when called
        self.temperature, self.settings = temperature, settings

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Any = None,
        opt: object = None,
        *,
        return_parts: bool = False,
        **options: Unpack[Options],
    ) -> Tensor | KdLossParts:
        """Compute the loss; options are mask, row_weight and num_items, same as for `kd_loss`.

        A number as third argument is the temperature, as in the published code. A tensor as third
        argument is the temperature if `opt` follows, or if the module has neither temperature nor
        alpha and the shape of the tensor does not fit a target.
        """
        temperature = self.temperature
        is_free = temperature is None and self.settings.get("alpha") is None
        class_dim = options.get("class_dim", self.settings.get("class_dim", -1))
        certain = opt is not None
        if _is_temperature(target, student_logits, class_dim, certain=certain, possible=is_free):
            if temperature is not None:
                got = f"{target} with the call and {temperature} before"
                raise invalid("temperature", got, "one", "write DistillKL() to give it each time")
            temperature, target = target, None
        elif opt is not None:
            raise ValueError("opt: expected after a temperature: DistillKL()(s, t, temp, opt)")
        given: Any = {} if temperature is None else {"temperature": temperature}
        given |= {"return_parts": return_parts, **self.settings, **options}
        loss: Tensor | KdLossParts = kd_loss(student_logits, teacher_logits, target, **given)
        return loss

    def extra_repr(self) -> str:
        """Return the settings that print() shows."""
        shown = {"temperature": self.temperature, **self.settings}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def _is_temperature(
    value: object, student: Tensor, class_dim: int, *, certain: bool, possible: bool
) -> bool:
    """Tell whether the third argument of `DistillKL` is a temperature, not a target or None."""
    if not isinstance(value, Tensor):
        return isinstance(value, Real) or hasattr(value, "item")  # of Python or NumPy
    of_target: tuple[int, ...] = student.shape
    if value.dtype == torch.int64:
        of_target = of_target[:class_dim] + of_target[class_dim:][1:]
    return certain or (possible and value.shape != of_target)
