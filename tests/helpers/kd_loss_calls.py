"""Make random calls of the loss operators; compare them with the eager float64 definition."""

from __future__ import annotations

from typing import Any

import torch
from draws import BF16, F16, F32, F64, Call, Draw, check
from torch import Tensor

from dmkd_fast import kd_loss, kd_loss_and_grad
from dmkd_fast.loss import ops
from dmkd_fast.loss.arguments import problem_of
from dmkd_fast.loss.divergences import NAMES

ROUNDING = {F32: 1e-6, F64: 1e-12, F16: 2**-10, BF16: 2**-7}


def kd_arguments(draw: Draw) -> tuple[tuple, dict]:
    shape = draw.sizes(draw.choice((1, 2, 2, 2, 3)), low=0)
    shape[-1] = max(1, shape[-1])
    leading, classes = tuple(shape[:-1]), shape[-1]
    student = draw.floats(shape, draw.choice((F32, F32, BF16, F16, F64)))
    teacher = draw.floats(shape, draw.choice((student.dtype, F32, BF16, F16, F64)))
    named: dict[str, Any] = {"temperature": draw.choice((0.5, 1.0, 4, 20.0))}
    target = None
    kind = draw.choice(("none", "ids", "probabilities"))
    if kind == "ids":
        ids = torch.randint(0, classes, leading)
        if draw.random() < 0.3:
            ids = torch.where(torch.rand(leading) < 0.3, -100, ids)
        target = draw.place(ids)
    elif kind == "probabilities":
        target = draw.place(torch.rand(shape).softmax(-1).to(draw.choice((F32, BF16, F16, F64))))
    if target is not None:
        named["alpha"] = draw.choice((0.0, 0.3, 0.9))
        named["label_smoothing"] = draw.choice((0.0, 0.1))
    if draw.random() < 0.5:
        # Not total variation, whose gradient jumps where p equals q.
        names = [n for n in NAMES if n != "total_variation" and (kind == "ids" or n != "dkd")]
        named["divergence"] = draw.choice((*names, {"forward_kl": 0.5, "jsd": {"beta": 0.2}}))
    if draw.random() < 0.3:
        named["mask"] = draw.place(torch.rand(leading) < 0.7)
    if draw.random() < 0.3:
        named["row_weight"] = draw.place(torch.rand(leading).to(draw.choice((F32, F64, BF16))))
    named["reduction"] = draw.choice(("batchmean", "mean", "sum", "none"))
    if named["reduction"] in ("batchmean", "mean") and draw.random() < 0.3:
        named["num_items"] = draw.choice((3, torch.tensor(7), torch.tensor([2.5])))
    return (student, teacher, target), named


def kd_expected(tensors: tuple, named: dict) -> tuple[list, tuple]:
    """Compute the losses by the eager definition in float64; return its arguments too."""
    problem, _ = problem_of(*tensors, **named)
    wide = tuple(
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in problem
    )
    return ops._eager_forward(*wide, named["reduction"] == "none"), wide


def is_singular(tensors: tuple, named: dict) -> bool:
    """Return whether a correlation of dist is of almost constant probabilities.

    Its rounding errors grow without bound there, so that values say nothing.
    """
    if named.get("divergence") != "dist":
        return False
    for logits in tensors[:2]:
        p = (logits.double() / named["temperature"]).softmax(-1).reshape(-1, logits.shape[-1])
        if "mask" in named:
            p = p[named["mask"].reshape(-1)]
        for axis in (0, 1):
            spread = (p - p.mean(axis, keepdim=True)).norm(dim=axis) / p.norm(dim=axis)
            if (spread < 0.1).any():
                return True
    return False


def kd_tolerance(tensors: tuple) -> float:
    base = 1e-11 if F64 in (tensors[0].dtype, tensors[1].dtype) else 1e-5
    # Sanitized builds sum without vectors, term by term, so errors grow with the classes.
    return base * max(1.0, tensors[0].shape[-1] / 2000)


def largest_log_ratio(problem: tuple) -> float:
    """Return the largest finite |log p - log q| of teacher and student, at least 1."""
    q, p = ((x.double() / problem[4]).log_softmax(-1) for x in problem[:2])
    ratios = (p - q)[(p - q).isfinite()].abs()
    return max(1.0, ratios.max().item() if ratios.numel() else 0.0)


def check_gradient(
    got: Tensor, expected: Tensor, tensors: tuple, problem: tuple, upstream: Tensor
) -> None:
    """Check a gradient relative to the factors of the softmaxes.

    The difference of two softmaxes can be arbitrarily small, so it is no measure of the error.
    """
    weight, temperature, alpha, kd_scale, ce_scale = problem[3:8]
    factor = max(alpha * kd_scale / temperature, (1 - alpha) * ce_scale)
    factor *= upstream.abs().max().item() * (1 if weight is None else weight.abs().max().item())
    dtype = tensors[0].dtype
    tiny = 2**-24 if dtype == F16 else 0  # half of the smallest step
    # Slopes of the other divergences also have the logarithm of p / q as a factor.
    share = kd_tolerance(tensors) * (largest_log_ratio(problem) if problem[10] else 1)
    check(
        got.reshape(expected.shape),
        expected,
        max(share, ROUNDING[dtype]),
        share * factor / 10 + tiny,
    )


def kd_forward(draw: Draw) -> Call:
    tensors, named = kd_arguments(draw)

    def compare(got: Tensor) -> None:
        loss = kd_expected(tensors, named)[0][0]
        share = kd_tolerance(tensors)
        if tensors[0].numel() and not is_singular(tensors, named):
            check(got.reshape(loss.shape), loss, share, 10 * share)

    return lambda: kd_loss(*tensors, **named), compare


def kd_backward(draw: Draw) -> Call:
    tensors, named = kd_arguments(draw)
    student = tensors[0].detach().requires_grad_()
    rows = named["reduction"] == "none"
    upstream = draw.floats(student.shape[:-1] if rows else (), F64)

    def run() -> Tensor:
        loss = kd_loss(student, *tensors[1:], **named)
        (grad,) = torch.autograd.grad(loss, student, upstream.to(loss.dtype))
        return grad

    def compare(got: Tensor) -> None:
        (*_, stats), problem = kd_expected(tensors, named)
        expected = ops._eager_backward(upstream.reshape(-1).double(), stats, *problem)
        if expected.numel() and not is_singular(tensors, named):
            check_gradient(got, expected, tensors, problem, upstream)

    return run, compare


def kd_one_pass(draw: Draw) -> Call:
    tensors, named = kd_arguments(draw)
    dtype = tensors[0].dtype
    if named["reduction"] == "none":
        named["reduction"] = "sum"
    scale = draw.choice((1.0, 8.0, torch.tensor(8.0), torch.tensor([4])))
    shape = tensors[0].shape
    out = None
    if draw.random() < 0.5:  # dense classes, rows in equal steps
        rows = 1
        for n in shape[:-1]:
            rows *= n
        gap, offset = draw.choice((0, 0, 3)), draw.choice((0, 1, 3))
        step = shape[-1] + gap
        memory = torch.full((offset + max(0, rows * step - gap),), 7, dtype=dtype)
        strides, extent = [1] * len(shape), step
        for axis in range(len(shape) - 2, -1, -1):
            strides[axis], extent = extent, extent * max(1, shape[axis])
        out = memory.as_strided(shape, strides, offset)

    def compare(got: tuple[Tensor, Tensor]) -> None:
        (loss, _, _, stats), problem = kd_expected(tensors, named)
        share = kd_tolerance(tensors)
        if not tensors[0].numel() or is_singular(tensors, named):
            return
        check(got[0], loss, share, 10 * share)
        upstream = torch.as_tensor(scale).reshape(-1).double()
        expected = ops._eager_backward(upstream, stats, *problem)
        check_gradient(got[1], expected, tensors, problem, upstream)
        if out is not None:
            memory = torch.ones(
                out.untyped_storage().nbytes() // out.element_size(), dtype=torch.bool
            )
            memory.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(False)
            assert (out.as_strided(memory.shape, (1,), 0)[memory] == 7).all(), "wrote beside out"

    return lambda: kd_loss_and_grad(*tensors, grad_scale=scale, out=out, **named), compare
