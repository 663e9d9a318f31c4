"""The loss against the teacher's K largest logits, for teachers that are stored or far away."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dmkd_fast.loss.divergences import DIST, terms_of
from dmkd_fast.loss.functional import KdLossParts, kd_loss
from dmkd_fast.runtime.errors import invalid

Rest = Literal["bucket", "renormalize"]


def kd_loss_topk(
    student_logits: Tensor,
    teacher_values: Tensor,
    teacher_indices: Tensor,
    target: Tensor | None = None,
    *,
    teacher_logsumexp: Tensor | None = None,
    rest: Rest = "bucket",
    temperature: float = 4.0,
    t_squared: bool = True,
    **options: Any,
) -> Tensor | KdLossParts:
    """Compute the distillation loss against K of the teacher's C logits.

    With K = C it is `kd_loss`, bit for bit.

    Args:
        student_logits: Logits (..., C) of the student.
        teacher_values: Logits (..., K) of the teacher, of any float dtype.
        teacher_indices: Their classes (..., K) int64, each at most once in a row.
        target: Must be None: add a cross-entropy of your own.
        teacher_logsumexp: logsumexp(teacher_logits / temperature, -1) over all C classes (...); for
            "bucket" alone.
        rest: What becomes of the other C - K classes. "bucket": teacher and student give them one
            probability, the sum of theirs. "renormalize": both softmaxes are over the K classes.
        temperature: One number, that of `teacher_logsumexp`.
        t_squared: Whether to multiply by T^2.
        options: Further arguments of `kd_loss`: reduction, mask, row_weight, num_items, divergence.
    """
    if rest not in get_args(Rest):
        raise invalid("rest", repr(rest), f"one of {get_args(Rest)}")
    if target is not None:
        raise invalid("target", "a tensor", "None", "add a cross-entropy to the loss")
    if teacher_indices.dtype != torch.int64:
        raise TypeError(f"teacher_indices: got {teacher_indices.dtype}, expected torch.int64")
    shape, classes = student_logits.shape, student_logits.shape[-1]
    for name, tensor in (("teacher_values", teacher_values), ("teacher_indices", teacher_indices)):
        if tensor.shape[:-1] != shape[:-1] or not 1 <= tensor.shape[-1] <= classes:
            expected = f"(..., K) with K from 1 to C, to fit student_logits {tuple(shape)}"
            raise invalid(name, f"shape {tuple(tensor.shape)}", expected)
    if teacher_indices.shape != teacher_values.shape:
        expected = f"{tuple(teacher_values.shape)}, that of teacher_values"
        raise invalid("teacher_indices", f"shape {tuple(teacher_indices.shape)}", expected)
    _check_options(options, teacher_values.shape[-1], classes)
    student, teacher = student_logits, teacher_values
    if teacher_values.shape[-1] == classes:
        # A class that is missing, as another is there twice, makes the loss nan.
        teacher = torch.full_like(teacher_values, torch.nan)
        teacher = teacher.scatter_(-1, teacher_indices, teacher_values)
    elif rest == "renormalize":
        if teacher_logsumexp is not None:
            raise ValueError('teacher_logsumexp: would be ignored with rest="renormalize"')
        student = student_logits.gather(-1, teacher_indices)
    else:
        if teacher_logsumexp is None or teacher_logsumexp.shape != shape[:-1]:
            got = None if teacher_logsumexp is None else tuple(teacher_logsumexp.shape)
            raise invalid("teacher_logsumexp", got, f"{tuple(shape[:-1])}, one of each row")
        # Logits times 1 / T whose softmax has the K probabilities and the sum of the others.
        wide = torch.promote_types(student.dtype, torch.float32)
        student, teacher = student.to(wide) / temperature, teacher.to(wide) / temperature
        others = student.scatter(-1, teacher_indices, -torch.inf).logsumexp(-1, keepdim=True)
        lse = teacher_logsumexp.to(wide)[..., None]
        # Probabilities of values in float16 may sum to more than 1. An empty bucket would make the
        # reverse KL infinite.
        left = 1 - (teacher - lse).exp().sum(-1, keepdim=True)
        left = left.clamp(min=torch.finfo(wide).eps)
        student = temperature * torch.cat((student.gather(-1, teacher_indices), others), -1)
        teacher = temperature * torch.cat((teacher, lse + left.log()), -1)
    options |= {"temperature": temperature, "t_squared": t_squared}
    loss: Tensor | KdLossParts = kd_loss(student, teacher, **options)
    return loss


def _check_options(options: dict[str, Any], count: int, classes: int) -> None:
    """Refuse options of `kd_loss` that need the logits of all classes in their order."""
    if (class_dim := options.get("class_dim", -1)) != -1:
        raise invalid("class_dim", class_dim, "-1", "move the classes to the last dimension")
    if count == classes:
        return
    case = f"for {count} of {classes} classes"
    if (num_classes := options.get("num_classes")) is not None:
        raise invalid("num_classes", num_classes, f"None {case}", "shorten student_logits")
    if (standardizes := options.get("standardize_logits", False)) is not False:
        raise invalid("standardize_logits", standardizes, f"False {case}", "remove it")
    divergence = options.get("divergence", "forward_kl")
    if DIST in terms_of(divergence)[::4]:  # A column is a rank, which is another class in each row.
        raise invalid("divergence", divergence, f"one other than dist {case}", "choose another")
