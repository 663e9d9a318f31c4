"""Eager definitions of the fused operations: the one truth for tests and benchmarks.

Stands on floor 1. Plain PyTorch, any device, no attention to speed.
B batch, C classes, N capacity, c channels, H W pixels of a slot, S side of a view.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Per-row distillation loss T^2 * KL(softmax(t / T) || softmax(s / T)), (B,) float32.

    The sum runs over p * (expm1(-d) + d) with d = log p - log q, which equals p * d because p and
    q both sum to one, but is exact and never negative as q -> p (error 3e-7 against 7.5 % for
    p * d at KL = 3e-6). float64 stays float64; everything else is computed in float32.
    """
    compute = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    log_q = torch.log_softmax(student_logits.to(compute) / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits.to(compute) / temperature, dim=-1)
    p, q, d = log_p.exp(), log_q.exp(), log_p - log_q
    # Far from zero, p * expm1(-d) is better had as q - p: expm1 may overflow where p is tiny.
    terms = torch.where(d.abs() < 1, p * (torch.expm1(-d) + d), (q - p) + p * d)
    # 0 * log 0 is 0; a student that rules out what the teacher allows costs infinitely much.
    terms = torch.where(p == 0, q, terms)
    return temperature**2 * terms.sum(dim=-1)


def kd_grad(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Gradient of each row of `kd_loss` by its student logits: T * (q - p), (B, C)."""
    compute = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    q = torch.softmax(student_logits.to(compute) / temperature, dim=-1)
    p = torch.softmax(teacher_logits.to(compute) / temperature, dim=-1)
    return temperature * (q - p)


def cross_entropy(student_logits: Tensor, target: Tensor, *, label_smoothing: float) -> Tensor:
    """Per-row cross-entropy at temperature 1 against class ids or probabilities, (B,).

    As `F.cross_entropy(..., reduction="none")`, but a class of probability 0 costs 0 even where the
    student rules it out.
    """
    weights = _target_weights(student_logits, target, label_smoothing)
    terms = -weights * torch.log_softmax(student_logits, dim=-1)
    return torch.where(weights == 0, 0, terms).sum(dim=-1)


def cross_entropy_grad(student_logits: Tensor, target: Tensor, *, label_smoothing: float) -> Tensor:
    """Gradient of each row of `cross_entropy`: softmax(s) * sum(target) - target, (B, C)."""
    weights = _target_weights(student_logits, target, label_smoothing)
    return torch.softmax(student_logits, dim=-1) * weights.sum(dim=-1, keepdim=True) - weights


def _target_weights(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """The target as smoothed probabilities (B, C) in the logits' dtype."""
    if target.ndim < logits.ndim:
        target = torch.zeros_like(logits).scatter_(-1, target[..., None], 1)
    return target.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / logits.shape[-1]


def views(
    slots: Tensor, indices: Tensor, boxes: Tensor, flips: Tensor, *,
    size: int, pad: int, mean: Tensor, std: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Gather, crop, resize (bilinear, antialiased), flip, normalise, cast: one view per row.

    Resampling is separable: rows and columns are weighted by triangle filters over the pixels whose
    centres lie in the box, written as two batched matrix products. The filter widens with the crop
    where that shrinks by more than 1.15. Equals cropping first and then torchvision's `resize`.

    Args:
        slots: (N, c, H, W) uint8.
        indices: (B,) int64 slot numbers.
        boxes: (B, 4) float32: top, left, height, width in pixels; may reach `pad` beyond the image.
        flips: (B,) bool, horizontal.
        size: Side of a view.
        pad: Width of the black border.
        mean, std: (c,) float32 of pixel values in [0, 1].
        dtype: Of the result.

    Returns:
        (B, c, size, size), channels_last.
    """
    images = slots[indices].float() / 255  # (B, c, H, W)
    rows = _filter(boxes[:, 0], boxes[:, 2], images.shape[-2], size, pad)  # (B, S, H)
    columns = _filter(boxes[:, 1], boxes[:, 3], images.shape[-1], size, pad)  # (B, S, W)
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    out = rows[:, None] @ images @ columns.transpose(1, 2)[:, None]  # (B, c, S, S)
    out = (out - mean[:, None, None]) / std[:, None, None]
    return out.to(dtype, memory_format=torch.channels_last)


def _filter(start: Tensor, length: Tensor, source: int, size: int, pad: int) -> Tensor:
    """Weights (B, size, source) that resample [start, start + length) to `size` pixels."""
    scale = length / size  # (B,)
    support = torch.where(scale > 1.15, scale, torch.ones_like(scale))
    steps = torch.arange(size, device=start.device) + 0.5
    centres = start[:, None] + steps * scale[:, None]  # (B, S)
    pixels = torch.arange(-pad, source + pad, device=start.device) + 0.5  # (source + 2 pad,)
    distance = (pixels - centres[..., None]).abs() / support[:, None, None]
    inside = (pixels > start[:, None, None]) & (pixels < (start + length)[:, None, None])
    weights = (1 - distance).clamp_min(0) * inside
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-6)
    return weights[..., pad : pad + source]
