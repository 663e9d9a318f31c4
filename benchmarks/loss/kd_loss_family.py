"""The divergences beside forward KL and their eager definitions; linear heads beside eager ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, time_interleaved
from dmkd_fast import kd_loss, linear_kd_loss

TEMPERATURE = 10.0
# Divergence: most time in units of forward KL's, in float32 at both FAMILY_SHAPES.
FAMILY = {
    "reverse_kl": 1.2,
    "total_variation": 1.2,
    "dkd": 1.2,
    "jsd": 1.6,
    "alpha_beta": 1.6,
    "standardized": 1.6,
    "dist": 2.0,
}
FAMILY_SHAPES = ((256, 1000), (4096, 1000))
FAMILY_GAIN = 4.0  # over eager of the same divergence, at the second one
LINEAR_SHAPE = (2048, 768, 32000)  # rows, width of the hidden states, classes
LINEAR_GOALS = {"peak memory": 0.25, "time": 1.3}  # in units of eager's


def backward(
    loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor
) -> Callable[[], None]:
    """Return a call of loss and backward pass that allocates the gradient each time."""

    def call() -> None:
        student.grad = None
        loss(student, teacher).backward()

    return call


def _textbook(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A divergence as its paper's code writes it, with autograd."""

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    def correlation(a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)

    def standardized(x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7)

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        if name == "standardized":
            student, teacher = standardized(student), standardized(teacher)
        s, t = student / TEMPERATURE, teacher / TEMPERATURE
        log_q, log_p = s.log_softmax(1), t.log_softmax(1)
        if name in ("forward_kl", "standardized"):
            value = kl(log_p, log_q)
        elif name == "reverse_kl":
            value = kl(log_q, log_p)
        elif name == "total_variation":
            value = (log_p.exp() - log_q.exp()).abs().sum(1).mean() / 2
        elif name == "jsd":
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            value = (kl(log_p, log_m) + kl(log_q, log_m)) / 2
        elif name == "alpha_beta":
            a, b = 0.2, 0.7
            inner = (a * log_p + b * log_q).exp() - a / (a + b) * ((a + b) * log_p).exp()
            inner = inner - b / (a + b) * ((a + b) * log_q).exp()
            value = -inner.sum(1).mean() / (a * b)
        elif name == "dkd":
            mask = F.one_hot(target, s.shape[1]).bool()
            p, q = log_p.exp(), log_q.exp()
            p, q = (torch.stack((x[mask], x.masked_fill(mask, 0).sum(1)), 1) for x in (p, q))
            rest = [(x - 1000 * mask).log_softmax(1) for x in (t, s)]
            value = kl(p.log(), q.log()) + 8 * kl(*rest)
        else:
            p, q = log_p.exp(), log_q.exp()
            value = 2 - correlation(p, q).mean() - correlation(p.t(), q.t()).mean()
        return value * TEMPERATURE**2

    return loss


def family_arms(student: Tensor, teacher: Tensor) -> dict[str, Callable[[], None]]:
    """Return calls of loss and backward pass of each divergence, ours and eager."""
    target = torch.randint(student.shape[1], student.shape[:1])
    calls: dict[str, Callable[[], None]] = {}
    for name in ("forward_kl", *FAMILY):
        named: dict[str, Any] = {"divergence": name}
        named = {"standardize_logits": True} if name == "standardized" else named
        named |= {"target": target} if name == "dkd" else {}
        textbook: Callable[..., Tensor] = _textbook(name)
        calls[name] = backward(partial(kd_loss, temperature=TEMPERATURE, **named), student, teacher)
        calls[f"{name}, eager"] = backward(partial(textbook, target=target), student, teacher)
    return calls


def measure_family(report: Report, shape: tuple[int, int], n: int) -> None:
    """Time each divergence beside forward KL, then the eager definitions beside each other.

    Between calls of eager losses, whose many matrices the allocator gives back to the system, a
    call of ours would pay for hundreds of page faults, or not, by chance.
    """
    torch.manual_seed(0)
    calls = family_arms(torch.randn(shape).requires_grad_(), torch.randn(shape))
    timings: dict[str, dict[str, float]] = {}
    for is_eager in (False, True):
        some = {name: call for name, call in calls.items() if name.endswith("eager") == is_eager}
        timings |= time_interleaved(some, n=n)
    medians = {name: timing["median_ms"] for name, timing in timings.items()}
    for name in ("forward_kl", *FAMILY):
        gain = medians[f"{name}, eager"] / medians[name]
        ratio = medians[name] / medians["forward_kl"]
        report.rows.append(
            {
                "shape": f"{shape[0]}x{shape[1]}",
                "dtype": "float32",
                "arm": name,
                "set": "family",
                "threads": torch.get_num_threads(),
                **timings[name],
                "times_forward_kl": round(ratio, 3),
                "times_faster_than_eager": round(gain, 2),
            }
        )
        label = f"{name} {shape[0]}x{shape[1]}, {torch.get_num_threads()} threads"
        if name in FAMILY:
            report.at_most(f"{label} vs forward KL", ratio, FAMILY[name])
        if shape == FAMILY_SHAPES[1]:
            report.at_least(f"{label} vs eager", gain, FAMILY_GAIN)


def linear_arms(rows: int, width: int, classes: int) -> dict[str, Callable[[], object]]:
    """Return calls of loss and backward pass of two linear heads: ours, eager, Liger's if there.

    Liger has no forward KL of linear heads in plain PyTorch; its arm is the Jensen-Shannon
    divergence, as is "ours, jsd".
    """
    hidden, weight = torch.randn(rows, width), torch.randn(classes, width) / width**0.5
    teacher = torch.randn(rows, width), torch.randn(classes, width) / width**0.5
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def with_gradients(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            hidden.grad = weight.grad = None
            loss().backward()

        return call

    def eager() -> Tensor:
        return _textbook("forward_kl")(hidden @ weight.t(), teacher[0] @ teacher[1].t(), hidden)

    ours = partial(linear_kd_loss, *leaves, *teacher, temperature=TEMPERATURE)
    calls: dict[str, Callable[[], Tensor]] = {"linear, eager": eager, "linear, ours": ours}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        pass
    else:
        liger = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, temperature=TEMPERATURE
        )
        labels = torch.zeros(rows, dtype=torch.int64)
        calls["linear, ours, jsd"] = partial(ours, divergence="jsd")
        calls["linear, Liger, jsd"] = partial(liger, *leaves, *teacher, labels, None, None)
    return {name: with_gradients(loss) for name, loss in calls.items()}


def measure_linear(report: Report, memory: Callable[[str, str], int]) -> None:
    """Time two linear heads and their loss, and measure their peak memory."""
    shape = "x".join(map(str, LINEAR_SHAPE))
    torch.manual_seed(0)
    timings = time_interleaved(linear_arms(*LINEAR_SHAPE), n=3, warmup=1)
    peaks = {name: memory(name, shape) for name in timings}
    for name, timing in timings.items():
        report.rows.append(
            {
                "shape": shape,
                "dtype": "float32",
                "arm": name,
                "set": "linear",
                "threads": torch.get_num_threads(),
                **timing,
                "peak_mib": round(peaks[name] / 2**10, 1),
                "share_of_eagers_peak": round(peaks[name] / peaks["linear, eager"], 3),
            }
        )
    if "linear, Liger, jsd" not in timings:
        note = "not measured: liger-kernel is not installed"
        report.rows.append({"shape": shape, "arm": "linear, Liger", "set": "linear", "note": note})
    found = {
        "peak memory": peaks["linear, ours"] / peaks["linear, eager"],
        "time": timings["linear, ours"]["median_ms"] / timings["linear, eager"]["median_ms"],
    }
    for name, goal in LINEAR_GOALS.items():
        report.at_most(f"linear heads {shape}: {name} vs eager", found[name], goal)
