"""The loss of a training step: a divergence from the teacher, and cross-entropy with the classes.

Shapes: B views in a micro-batch, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dmkd_fast.loss.divergences import DKD, Divergence, terms_of
from dmkd_fast.loss.functional import kd_loss_and_grad
from dmkd_fast.runtime import checks
from dmkd_fast.runtime.errors import invalid


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a student minimizes: alpha * KD + (1 - alpha) * CE, mean over the batch.

    Raises:
        TypeError, ValueError: A number is out of range, or the divergence is unknown.
    """

    temperature: float = 4.0
    """Softmax temperature of the KD term."""
    alpha: float = 1.0
    """Weight of the KD term, in (0, 1]; cross-entropy with the targets has 1 - alpha."""
    divergence: Divergence = "forward_kl"
    """KD term, as `kd_loss` takes it. "dist" correlates over the rows of a micro-batch."""
    standardize_logits: bool = False
    """Whether each row of both logits gets mean 0 and standard deviation 1 in the KD term."""

    def __post_init__(self) -> None:
        checks.number("temperature", self.temperature, low=0.01, high=1000)
        if not 0 < self.alpha <= 1:
            fix = "raise it, as with 0 the teacher would be ignored"
            raise invalid("alpha", self.alpha, "a number above 0 and at most 1", fix)
        terms_of(self.divergence)

    @property
    def uses_target(self) -> bool:
        """Whether the loss depends on the targets."""
        return self.alpha < 1 or DKD in terms_of(self.divergence)[::4]

    def backward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        *,
        num_items: int,
        grad_scale: Tensor | float = 1.0,
    ) -> Tensor:
        """Add the gradient of a micro-batch to the student, and return its loss ().

        Args:
            student_logits: Logits (B, C) with an autograd graph.
            teacher_logits: Logits (B, C) of the teacher.
            target: Class ids (B,) int64 or probabilities (B, C); ignored unless `uses_target`.
            num_items: Number of views that the sum over the micro-batch is divided by.
            grad_scale: Factor on the gradient alone.
        """
        loss, grad = kd_loss_and_grad(
            student_logits,
            teacher_logits,
            target if self.uses_target else None,
            alpha=self.alpha if self.alpha < 1 else None,
            temperature=self.temperature,
            num_items=num_items,
            grad_scale=grad_scale,
            divergence=self.divergence,
            standardize_logits=self.standardize_logits,
        )
        # loss * 0 is NaN if the loss is not finite; its gradient alone could still be finite.
        student_logits.backward(grad.add_(loss * 0))
        return loss
