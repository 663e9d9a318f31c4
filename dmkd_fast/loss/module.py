"""The loss as a module, which also takes the call of the published DM-KD code."""

from __future__ import annotations

from numbers import Real
from typing import cast

import torch
from torch import Tensor, nn

from dmkd_fast.loss.arguments import Reduction
from dmkd_fast.loss.divergences import Divergence, terms_of
from dmkd_fast.loss.functional import KdLossParts, kd_loss


class DistillKL(nn.Module):
    """Compute `kd_loss` as a module.

    The call of the published DM-KD code works too: `DistillKL()(y_s, y_t, temp, opt)`, with the
    temperature as third argument. `opt` is ignored, as in that code.

    Args:
        temperature: Softmax temperature T; None: the default of `kd_loss`, unless a call gives one.
        alpha, divergence, standardize_logits, reduction, t_squared, ignore_index, label_smoothing,
            class_dim, num_classes: Same as for `kd_loss`.
    """

    def __init__(
        self,
        temperature: float | Tensor | None = None,
        *,
        alpha: float | None = None,
        reduction: Reduction = "batchmean",
        t_squared: bool = True,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        divergence: Divergence = "forward_kl",
        standardize_logits: bool = False,
        class_dim: int = -1,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        terms_of(divergence)  # an error comes here, not at the first call
        self.temperature, self.alpha, self.reduction = temperature, alpha, reduction
        self.t_squared, self.ignore_index = t_squared, ignore_index
        self.label_smoothing = label_smoothing
        self.divergence, self.standardize_logits = divergence, standardize_logits
        self.class_dim, self.num_classes = class_dim, num_classes

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | float | None = None,
        opt: object = None,
        *,
        mask: Tensor | None = None,
        row_weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
        return_parts: bool = False,
    ) -> Tensor | KdLossParts:
        """Compute the loss; see `kd_loss` for the arguments.

        A number as third argument is the temperature, as in the published code. A tensor as third
        argument is the temperature if `opt` follows, or if the module has neither temperature nor
        alpha and the shape of the tensor does not fit a target.
        """
        temperature = self.temperature
        is_free = temperature is None and self.alpha is None
        if _is_temperature(target, student_logits, certain=opt is not None, possible=is_free):
            if temperature is not None:
                raise ValueError(
                    f"temperature: got {target} with the call and {temperature} before, expected "
                    "one; write DistillKL() to give it with each call"
                )
            temperature, target = cast(float, target), None
        elif opt is not None:
            raise ValueError(
                "opt: expected after a temperature, as in DistillKL()(s, t, temp, opt)"
            )
        given = {} if temperature is None else {"temperature": temperature}
        return kd_loss(
            student_logits,
            teacher_logits,
            cast("Tensor | None", target),
            alpha=self.alpha,
            reduction=self.reduction,
            t_squared=self.t_squared,
            mask=mask,
            row_weight=row_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            divergence=self.divergence,
            standardize_logits=self.standardize_logits,
            class_dim=self.class_dim,
            num_classes=self.num_classes,
            num_items=num_items,
            return_parts=return_parts,
            **given,
        )

    def extra_repr(self) -> str:
        """Return the settings that print() shows."""
        text = f"temperature={self.temperature}, alpha={self.alpha}, reduction={self.reduction!r}"
        if self.divergence != "forward_kl":
            text += f", divergence={self.divergence!r}"
        return text + ", standardize_logits=True" * self.standardize_logits


def _is_temperature(value: object, student: Tensor, *, certain: bool, possible: bool) -> bool:
    """Tell whether the third argument of `DistillKL` is a temperature, not a target or None.

    A number always is. A tensor is one if `certain`, or if `possible` and its shape does not fit a
    target.
    """
    if not isinstance(value, Tensor):
        return isinstance(value, Real) or hasattr(value, "item")  # of Python or NumPy
    of_target = student.shape[:-1] if value.dtype == torch.int64 else student.shape
    return certain or (possible and value.shape != of_target)
