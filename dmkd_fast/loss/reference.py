"""Eager definition of the distillation loss, the reference for tests and benchmarks.

Plain PyTorch, for any device, not optimized for speed.
Shapes: B rows, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Compute the loss T^2 * KL(softmax(t / T) || softmax(s / T)) of each row, (B,) float32.

    The terms are p * (expm1(-d) + d) with d = log p - log q. Their sum equals that of p * d,
    because p and q both sum to one, but it is exact and never negative as q -> p. float64 student
    logits are computed and returned in float64, all others in float32.
    """
    compute = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    log_q = torch.log_softmax(student_logits.to(compute) / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits.to(compute) / temperature, dim=-1)
    p, q, d = log_p.exp(), log_q.exp(), log_p - log_q
    # Far from d = 0, q - p replaces p * expm1(-d), because expm1 may overflow where p is tiny.
    terms = torch.where(d.abs() < 1, p * (torch.expm1(-d) + d), (q - p) + p * d)
    # 0 * log 0 is 0. The loss is infinite if the student gives 0 where the teacher does not.
    terms = torch.where(p == 0, q, terms)
    return temperature**2 * terms.sum(dim=-1)


def reference_grad(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Compute the gradient of `reference_loss` by the student logits: T * (q - p), (B, C)."""
    compute = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    q = torch.softmax(student_logits.to(compute) / temperature, dim=-1)
    p = torch.softmax(teacher_logits.to(compute) / temperature, dim=-1)
    return temperature * (q - p)


def reference_cross_entropy(
    student_logits: Tensor, target: Tensor, *, label_smoothing: float
) -> Tensor:
    """Compute the cross-entropy of each row at temperature 1 to class ids or probabilities, (B,).

    Equals `F.cross_entropy(..., reduction="none")`, except that a class with target 0 adds 0 even
    if the student's log-probability of it is -inf.
    """
    weights = _target_weights(student_logits, target, label_smoothing)
    terms = -weights * torch.log_softmax(student_logits, dim=-1)
    return torch.where(weights == 0, 0, terms).sum(dim=-1)


def reference_cross_entropy_grad(
    student_logits: Tensor, target: Tensor, *, label_smoothing: float
) -> Tensor:
    """Compute the gradient of the cross-entropy: softmax(s) * sum(target) - target, (B, C)."""
    weights = _target_weights(student_logits, target, label_smoothing)
    return torch.softmax(student_logits, dim=-1) * weights.sum(dim=-1, keepdim=True) - weights


def _target_weights(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Return the target as smoothed probabilities (B, C) in the logits' dtype."""
    if target.ndim < logits.ndim:
        target = torch.zeros_like(logits).scatter_(-1, target[..., None], 1)
    return target.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / logits.shape[-1]
