"""The loss of a training step: a divergence from the teacher, and cross-entropy with the classes.

Shapes: B views in a micro-batch, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, get_args

from torch import Tensor
from torch.nn import functional as F

from dmkd_fast.loss.divergences import DKD, Divergence, terms_of
from dmkd_fast.loss.functional import kd_loss_and_grad
from dmkd_fast.loss.topk import Rest, kd_loss_topk
from dmkd_fast.runtime import checks
from dmkd_fast.runtime.errors import invalid


class TopLogits(NamedTuple):
    """The K largest logits of a teacher for each view."""

    values: Tensor
    """Logits (B, K)."""
    indices: Tensor
    """Their classes (B, K) int64."""
    logsumexp: Tensor
    """logsumexp(logits / temperature) over all classes, (B,)."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a student minimizes: alpha * KD + (1 - alpha) * CE, mean over the batch.

    Raises:
        TypeError, UserError: A number is out of range, or the divergence is unknown.
    """

    temperature: float = 4.0
    """Softmax temperature of the KD term."""
    alpha: float = 1.0
    """Weight of the KD term, in (0, 1]; cross-entropy with the targets has 1 - alpha."""
    divergence: Divergence = "forward_kl"
    """KD term, as `kd_loss` takes it. "dist" correlates over the rows of a micro-batch."""
    rest: Rest = "bucket"
    """What becomes of the classes beside `TopLogits`, as in `kd_loss_topk`."""
    standardize_logits: bool = False
    """Whether each row of both logits gets mean 0 and standard deviation 1 in the KD term."""

    def __post_init__(self) -> None:
        checks.number("temperature", self.temperature, low=0.01, high=1000)
        if not 0 < checks.number("alpha", self.alpha) <= 1:
            fix = "raise it, as with 0 the teacher would be ignored" if self.alpha == 0 else ""
            raise invalid("alpha", self.alpha, "a number above 0 and at most 1", fix)
        if self.rest not in get_args(Rest):
            raise invalid("rest", repr(self.rest), "bucket or renormalize")
        terms_of(self.divergence)

    @property
    def uses_target(self) -> bool:
        """Whether the loss depends on the targets."""
        kinds = terms_of(self.divergence)[::4]  # four numbers a term; the first is its kind
        return self.alpha < 1 or DKD in kinds

    def backward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | TopLogits,
        target: Tensor,
        *,
        num_items: int,
        grad_scale: Tensor | float = 1.0,
    ) -> Tensor:
        """Add the gradient of a micro-batch to the student, and return its loss ().

        Args:
            student_logits: Logits (B, C) with an autograd graph.
            teacher_logits: Logits (B, C) of the teacher, or the largest ones of each view.
            target: Class ids (B,) int64 or probabilities (B, C); ignored unless `uses_target`.
            num_items: Number of views that the sum over the micro-batch is divided by.
            grad_scale: Factor on the gradient alone.
        """
        if isinstance(teacher_logits, TopLogits):
            value = self._top_loss(student_logits, teacher_logits, target) / num_items
            loss = value.detach()
            value.backward((grad_scale + loss * 0).to(value.dtype))
            return loss
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

    def _top_loss(self, student_logits: Tensor, teacher: TopLogits, target: Tensor) -> Tensor:
        """Return the sum of the losses of the views, ()."""
        loss = kd_loss_topk(
            student_logits,
            teacher.values,
            teacher.indices,
            teacher_logsumexp=teacher.logsumexp if self.rest == "bucket" else None,
            rest=self.rest,
            temperature=self.temperature,
            reduction="sum",
            divergence=self.divergence,
            standardize_logits=self.standardize_logits,
        )
        assert isinstance(loss, Tensor)
        if self.alpha == 1:
            return loss
        hard = F.cross_entropy(student_logits.float(), target, reduction="sum")
        return self.alpha * loss + (1 - self.alpha) * hard
