"""Fused distillation loss on logits: alpha * T^2 * KL(teacher || student) + (1 - alpha) * CE.

The gradient by the student's logits is the reduction's factor times alpha * T * (q - p) +
(1 - alpha) * (softmax(student) - target), with p = softmax(teacher / T), q = softmax(student / T).
Shapes: B rows, C classes.
Source: Hinton et al., "Distilling the knowledge in a neural network" (arXiv 1503.02531), section 2.
"""

from __future__ import annotations

from inspect import Parameter, Signature, signature
from typing import Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from dmkd_fast.loss import ops
from dmkd_fast.loss.arguments import Options, grad_scale_of, output_rows, problem_of
from dmkd_fast.loss.autograd import differentiable
from dmkd_fast.runtime.operators import check_own_memory


class KdLossParts(NamedTuple):
    """Result of `kd_loss(..., return_parts=True)`: loss = alpha * kd + (1 - alpha) * ce.

    `kd` and `ce` (None without a cross-entropy term) are reduced like the loss, without gradient.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor | None


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    return_parts: Literal[False] = ...,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    return_parts: bool,
    **options: Unpack[Options],
) -> Tensor | KdLossParts: ...
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    return_parts: bool = False,
    **options: Unpack[Options],
) -> Tensor | KdLossParts:
    """Compute the distillation loss in one pass over the logits.

    The loss equals the following, but stays exact and never becomes negative when the two
    distributions are almost equal::

        log_q = (student_logits.float() / T).log_softmax(-1)
        p = (teacher_logits.float() / T).softmax(-1)
        kd = F.kl_div(log_q, p, reduction=reduction) * T**2
        ce = F.cross_entropy(student_logits.float(), target)
        loss = alpha * kd + (1 - alpha) * ce

    A row counts unless its `mask` is False or its class id is `ignore_index`. A row that does not
    count adds nothing to either term and gets a zero gradient, whatever its logits are. All leading
    dimensions count as rows: (B, L, C) has B * L rows, whereas `F.kl_div` divides "batchmean" by B.
    Without rows, the mean is nan, as in torch; with class ids, a mask or `num_items` it is 0. If no
    row counts, the loss is 0.

    Args:
        student_logits: Logits (..., C) of the student, float32, float64, float16 or bfloat16, with
            any strides; gradients flow into them.
        teacher_logits: Logits (..., C) of the teacher, any of these dtypes; never get a gradient.
        target: Class ids (...) int64, or probabilities (..., C) of any of these dtypes.
        return_parts: Whether to return `KdLossParts(loss, kd, ce)`.
        temperature: Softmax temperature T of the KD term, 1e-4 to 1e4 (default 4); the CE term has
            T = 1. A Python or NumPy number, or a tensor that does not require grad: of one element
            (reading it from a GPU waits for the GPU), or of one per row, (...) or (..., 1).
            `alpha` and `label_smoothing` are numbers of the same types.
        alpha: Weight of the KD term, in [0, 1). Without a target it must be None (the default) or
            1, meaning 1.
        reduction: "batchmean" (default) divides the sum of the rows' losses by n, the number of
            rows that count (or `num_items`); "mean" divides the CE term by n, the KD term by n * C;
            "sum" divides by nothing; "none" returns one value per row, 0 where it does not count.
        t_squared: Whether to multiply the KD term by T^2 (default), so that the size of its
            gradient hardly depends on T.
        mask: Rows that count, (...) bool, True where a row counts.
        row_weight: Factors (...) on the rows' losses; they change no denominator.
        ignore_index: Class id of rows that do not count (default -100).
        label_smoothing: Fraction of the target that is spread over all classes, in [0, 1).
        num_items: Number of rows to divide by, for batches that are parts of a larger one (gradient
            accumulation, data parallelism): a number, or a tensor of one element on the logits'
            device.
        divergence: KD term in place of KL(p || q), for teacher p and student q at temperature T:
            "forward_kl", "reverse_kl", "jsd", "alpha_beta", "total_variation", "dkd" (needs class
            ids as target; `alpha` may be None), or "dist" (its second term correlates over all
            rows that count). Parameters and sums of two: see `loss/divergences.py`.
        standardize_logits: Whether each row of both logits gets mean 0 and standard deviation 1
            before it is divided by T in the KD term.
        class_dim: Dimension of the classes (default -1); 1 for (B, C, H, W). Logits with
            another class dimension than the last are copied.
        num_classes: Number of classes that count, where student and teacher are padded to
            different sizes: the rest of each row is ignored and gets a zero gradient.

    Returns:
        The loss in float32 (float64 if student or teacher logits are float64): a scalar, or (...)
        for "none".

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Shapes or devices differ, or an argument is out of range or would be ignored.
        NotImplementedError: A forward-mode derivative or a torch.func transform is active.
        RuntimeError: A class id is out of range. On CUDA the loss and the row's gradient are nan
            instead, because an error would have to wait for the device.
    """
    problem, leading = problem_of(student_logits, teacher_logits, target, **options)
    per_row = options.get("reduction") == "none"
    if torch.is_grad_enabled() and problem.student.requires_grad:
        losses = differentiable(per_row, return_parts, problem)
    else:
        losses = ops.forward(*problem, per_row)
    if not return_parts:
        loss = losses if isinstance(losses, Tensor) else losses[0]
        return loss.view(leading) if per_row else loss
    loss, kd, ce = (x.view(leading) if per_row else x for x in losses[:3])
    return KdLossParts(loss, kd, None if target is None or problem.alpha == 1 else ce)


def kd_loss_and_grad(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    grad_scale: float | Tensor = 1.0,
    out: Tensor | None = None,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:
    """Compute loss and gradient in one pass, without an autograd graph.

    The pass reads both logits once and writes the gradient once. Use it as
    `loss, grad = kd_loss_and_grad(...)`, followed by `student_logits.backward(grad)`.

    Args:
        student_logits, teacher_logits, target, options: Same as for `kd_loss`, except that
            `reduction` cannot be "none".
        grad_scale: Factor on the gradient alone, applied in float32 before rounding: a number, or a
            tensor of one element on the logits' device, such as the scale of a GradScaler.
        out: Tensor for the gradient, with shape, dtype and device of `student_logits`, dense
            classes, equally spaced rows that do not overlap, and memory that no input uses.

    Returns:
        The loss (a scalar, as from `kd_loss`), and its gradient with respect to `student_logits`
        times `grad_scale` (same shape and dtype as `student_logits`).
    """
    # What is no tensor is refused there.
    student = student_logits.detach() if isinstance(student_logits, Tensor) else student_logits
    problem, leading = problem_of(student, teacher_logits, target, **options)
    if options.get("reduction") == "none":
        raise ValueError('reduction: got "none", expected "batchmean", "mean" or "sum"')
    upstream, factor = grad_scale_of(grad_scale, problem.student, problem.teacher)
    is_plain = out is None and upstream is None and factor == 1
    is_plain = is_plain and "class_dim" not in options and "num_classes" not in options
    if is_plain and problem.student.is_cpu and not torch.compiler.is_compiling():
        loss, _, grad = ops.loss_and_gradient(problem)
        return loss, grad.view(student_logits.shape)
    if out is None:
        out = torch.empty_like(student_logits.detach(), memory_format=torch.contiguous_format)
    else:
        inputs = {
            "student_logits": student_logits,
            "teacher_logits": teacher_logits,
            "target": target,
            "row_weight": problem.weight,
            "grad_scale": upstream,
        }
        check_own_memory(output_rows(out, student_logits), inputs)
        torch.autograd.graph.increment_version(out)
    result, class_dim, num_classes = (
        out.detach(),
        options.get("class_dim", -1),
        options.get("num_classes"),
    )
    grad = problem.student
    if class_dim != -1:
        grad = torch.empty_like(grad, memory_format=torch.contiguous_format)
    else:
        rows = result.view(-1, result.shape[-1])
        grad = rows if num_classes is None else rows[:, :num_classes]
    loss = ops.forward_backward(grad, upstream, factor, *problem)[0]
    if class_dim != -1:
        result = result.movedim(class_dim, -1)
        result[..., :num_classes] = grad.view(*leading, grad.shape[-1])
    if num_classes is not None:
        result[..., num_classes:] = 0
    return loss, out


problem_of.__qualname__ = "kd_loss"  # What Python says of an option that does not exist.
for _function in (kd_loss, kd_loss_and_grad):  # help() shows options and their default values
    _own, _all = (list(signature(f).parameters.values()) for f in (_function, problem_of))
    _options = [parameter for parameter in _all if parameter.kind is Parameter.KEYWORD_ONLY]
    setattr(_function, "__signature__", Signature([*_own[:-1], *_options]))  # noqa: B010
