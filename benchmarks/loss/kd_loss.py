"""kd_loss against eager PyTorch, torch.compile of it, and a copy of the same bytes.

Timed: loss and gradient by the student's logits. Two sets of rows: every arm allocates its outputs
anew, or reuses them where it can ("reused": the one-pass form and the copy). The copy reads two
matrices and writes one: no implementation can move fewer bytes. Peak memory is that of one call in
a process of its own, beyond its inputs, in units of the gradient.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, arguments, recorded, time_interleaved
from dmkd_fast import kd_loss, kd_loss_and_grad
from dmkd_fast.runtime.device import set_num_threads

TEMPERATURE = 10.0
SHAPES = ((256, 100), (256, 1000), (4096, 1000), (256, 21841), (512, 32000))
DTYPES = (torch.float32, torch.bfloat16)
MEMORY_SHAPE = "4096x1000"
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
FIXED_COST_SHAPE = (8, 10)
# (shape, dtype): how many times faster than eager and than compile, with all threads.
GOALS = {
    ((256, 1000), torch.float32): (8, 3),
    ((4096, 1000), torch.float32): (8, 3),
    ((512, 32000), torch.float32): (5, 1.5),
    ((256, 1000), torch.bfloat16): (5, 2.5),
    ((4096, 1000), torch.bfloat16): (5, 2.5),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("kd-loss", __doc__ or "")
    parser.add_argument("--n", type=int, default=20, help="timings per arm")
    parser.add_argument("--quick", action="store_true", help="the smallest shape alone")
    parser.add_argument("--memory", nargs=2, metavar=("ARM", "SHAPE"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    if options.memory:
        print(_peak_gradients(*options.memory))
        return
    report = Report(bench="kd-loss", arguments=recorded(options), device=torch.device("cpu"))
    shapes = SHAPES[:1] if options.quick else SHAPES
    for threads in (1, 0):  # 0: all; last, so that the stamp shows it
        set_num_threads(threads)
        for shape in shapes:
            for dtype in DTYPES:
                medians = _measure(report, shape, dtype, options.n)
                if threads == 0:
                    _judge(report, shape, dtype, medians)
            if shape in FAMILY_SHAPES:
                _measure_family(report, shape, options.n)
        _measure_fixed_cost(report, options.n)
    for arm in ("ours", "ours, one pass", "eager"):
        peak = _memory(arm, MEMORY_SHAPE)
        report.rows.append(
            {
                "shape": MEMORY_SHAPE,
                "dtype": "float32",
                "arm": arm,
                "set": "memory",
                "peak_gradients": peak,
            }
        )
        if arm != "eager":
            report.at_most(f"{arm}: peak memory in gradients", peak, 1.1)
    report.finish(record=options.record)


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss as published."""
    log_q = F.log_softmax(student / TEMPERATURE, dim=1)
    p = F.softmax(teacher / TEMPERATURE, dim=1)
    return F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2


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


def _measure_family(report: Report, shape: tuple[int, int], n: int) -> None:
    """Each divergence beside forward KL, and beside its own eager definition."""
    torch.manual_seed(0)
    student, teacher = torch.randn(shape).requires_grad_(), torch.randn(shape)
    target = torch.randint(shape[1], shape[:1])
    calls: dict[str, Callable[[], None]] = {}
    for name in ("forward_kl", *FAMILY):
        named = {"divergence": name} if name != "standardized" else {"standardize_logits": True}
        ours = partial(kd_loss, temperature=TEMPERATURE, **named)
        textbook: Callable[..., Tensor] = _textbook(name)
        theirs = partial(textbook, target=target)
        hard = partial(ours, target=target) if name == "dkd" else ours
        calls[name] = backward(hard, student, teacher)
        calls[f"{name}, eager"] = backward(theirs, student, teacher)
    timings = time_interleaved(calls, n=n)
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
                "times_forward_kl": round(ratio, 2),
                "times_faster_than_eager": round(gain, 2),
            }
        )
        if name in FAMILY:
            report.at_most(f"{name} {shape[0]}x{shape[1]} vs forward KL", ratio, FAMILY[name])
        if shape == FAMILY_SHAPES[1]:
            report.at_least(f"{name} {shape[0]}x{shape[1]} vs eager", gain, FAMILY_GAIN)


def _measure_fixed_cost(report: Report, n: int) -> None:
    """Loss and backward pass of a batch so small that only the calls cost time."""
    student, teacher = torch.randn(FIXED_COST_SHAPE).requires_grad_(), torch.randn(FIXED_COST_SHAPE)
    call = backward(partial(kd_loss, temperature=TEMPERATURE), student, teacher)
    timing = time_interleaved({"fixed": call}, n=max(n, 200))["fixed"]
    report.rows.append(
        {
            "shape": "8x10",
            "dtype": "float32",
            "arm": "ours",
            "set": "fixed cost",
            "threads": torch.get_num_threads(),
            **timing,
        }
    )


def backward(
    loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor
) -> Callable[[], None]:
    """Return a call of loss and backward pass that allocates the gradient each time."""

    def call() -> None:
        student.grad = None
        loss(student, teacher).backward()

    return call


def arms(student: Tensor, teacher: Tensor) -> dict[str, Callable[[], object]]:
    """Return the calls to compare; all but the last two allocate their outputs."""
    torch._dynamo.reset()  # else it gives up after eight shapes and runs eagerly
    compiled = torch.compile(eager, dynamic=False)
    logits, out = student.detach(), torch.empty_like(student, requires_grad=False)

    ours = partial(kd_loss, temperature=TEMPERATURE)
    one_pass = partial(kd_loss_and_grad, logits, teacher, temperature=TEMPERATURE)
    return {
        "ours": backward(ours, student, teacher),
        "ours, one pass": one_pass,
        "eager": backward(eager, student, teacher),
        "compile": backward(compiled, student, teacher),
        "copy": lambda: torch.add(logits, teacher),
        "ours, one pass, reused": partial(one_pass, out=out),
        "copy, reused": lambda: torch.add(logits, teacher, out=out),
    }


def _measure(
    report: Report, shape: tuple[int, int], dtype: torch.dtype, n: int
) -> dict[str, float]:
    torch.manual_seed(0)
    student = torch.randn(shape).to(dtype).requires_grad_()
    teacher = torch.randn(shape).to(dtype)
    timings = time_interleaved(arms(student, teacher), n=n)
    medians = {name: timing["median_ms"] for name, timing in timings.items()}
    for name, timing in timings.items():
        reused = name.endswith(", reused")
        bound = medians["copy, reused" if reused else "copy"]
        report.rows.append(
            {
                "shape": f"{shape[0]}x{shape[1]}",
                "dtype": str(dtype).removeprefix("torch."),
                "arm": name.removesuffix(", reused"),
                "set": "reused" if reused else "allocated",
                "threads": torch.get_num_threads(),
                **timing,
                "times_faster_than_eager": round(medians["eager"] / timing["median_ms"], 2),
                "times_faster_than_compile": round(medians["compile"] / timing["median_ms"], 2),
                "share_of_copy": round(bound / timing["median_ms"], 3),
            }
        )
    return medians


def _judge(
    report: Report, shape: tuple[int, int], dtype: torch.dtype, medians: dict[str, float]
) -> None:
    name = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
    for other, goal in zip(("eager", "compile"), GOALS.get((shape, dtype), ()), strict=False):
        report.at_least(f"{name} vs {other}", medians[other] / medians["ours"], goal)
    if shape == (4096, 1000) and dtype == torch.float32:
        share = medians["copy, reused"] / medians["ours, one pass, reused"]
        report.at_least(f"{name} one pass, share of copy", share, 0.6)


def _memory(arm: str, shape: str) -> float:
    command = [sys.executable, "-m", "benchmarks", "kd-loss", "--memory", arm, shape]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _peak_gradients(arm: str, shape: str) -> float:
    """Growth of peak resident memory in one call, after a small one has loaded all code."""
    rows, classes = map(int, shape.split("x"))
    set_num_threads(1)
    small = torch.randn(2, 8).requires_grad_(), torch.randn(2, 8)
    arms(*small)[arm]()
    student, teacher = torch.randn(rows, classes).requires_grad_(), torch.randn(rows, classes)
    call = arms(student, teacher)[arm]
    # The mark is put back to what is resident now: loading left it far above any call.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _highest_kib()
    call()
    return round((_highest_kib() - before) / (4 * rows * classes / 2**10), 3)


def _highest_kib() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0])
