"""kd_loss against eager PyTorch, torch.compile of it, and a copy of the same bytes.

Timed: loss and gradient by the student's logits. Two sets of rows: every arm allocates its outputs
each time, or reuses them where it can ("reused": the one-pass form and the copy). The copy reads
two matrices and writes one: no implementation can move fewer bytes. Peak memory is that of one call
in a process of its own, beyond its inputs, in units of the gradient. The other divergences are
timed beside forward KL, and two linear heads beside their eager loss (`kd_loss_family.py`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, arguments, recorded, time_interleaved
from benchmarks.loss.kd_loss_family import (
    FAMILY,
    FAMILY_SHAPES,
    TEMPERATURE,
    backward,
    family_arms,
    linear_arms,
    measure_family,
    measure_linear,
)
from dmkd_fast import kd_loss, kd_loss_and_grad
from dmkd_fast.runtime.device import set_num_threads

SHAPES = ((256, 100), (256, 1000), (4096, 1000), (256, 21841), (512, 32000))
DTYPES = (torch.float32, torch.bfloat16)
MEMORY_SHAPE = "4096x1000"
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
    parser.add_argument(
        "--n",
        type=int,
        default=20,
        help="timings per arm; 5 n of small batches, n / 4 of large ones",
    )
    parser.add_argument("--quick", action="store_true", help="the smallest shape alone")
    parser.add_argument("--memory", nargs=2, metavar=("ARM", "SHAPE"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    if options.memory:
        print(peak_kib(*options.memory))
        return
    report = Report(bench="kd-loss", arguments=recorded(options), device=torch.device("cpu"))
    for threads in (1, 0):  # 0: all; last, so that the stamp shows it
        set_num_threads(threads)
        shapes = SHAPES[:1] if options.quick else SHAPES[:3] if threads == 1 else SHAPES
        for shape in shapes:
            size = shape[0] * shape[1]
            n = 5 * options.n if size < 2**20 else options.n
            n = n if size <= 2**23 else max(1, n // 4)
            for dtype in DTYPES:
                medians = _measure(report, shape, dtype, n)
                if threads == 0:
                    _judge(report, shape, dtype, medians)
            if shape in FAMILY_SHAPES:
                measure_family(report, shape, n)
        _measure_fixed_cost(report, options.n)
    for arm in ("ours", "ours, one pass", "eager", *(() if options.quick else FAMILY)):
        peak = round(memory(arm, MEMORY_SHAPE) / _gradient_kib(MEMORY_SHAPE), 3)
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
    if not options.quick:
        measure_linear(report, memory)
    report.finish(record=options.record)


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss as published."""
    log_q = F.log_softmax(student / TEMPERATURE, dim=1)
    p = F.softmax(teacher / TEMPERATURE, dim=1)
    return F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2


class _Nothing(torch.autograd.Function):
    """The least that a loss in Python costs: a scalar, and a gradient that is there already."""

    @staticmethod
    def forward(ctx: Any, student: Tensor) -> Tensor:
        return student.new_empty(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream.new_empty(FIXED_COST_SHAPE)


def _measure_fixed_cost(report: Report, n: int) -> None:
    """Loss and backward pass of a batch so small that only the calls cost time."""
    student, teacher = torch.randn(FIXED_COST_SHAPE).requires_grad_(), torch.randn(FIXED_COST_SHAPE)
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ours": partial(kd_loss, temperature=TEMPERATURE),
        "eager": eager,
        "nothing": lambda student, teacher: _Nothing.apply(student),
    }
    calls = {name: backward(loss, student, teacher) for name, loss in losses.items()}
    for name, timing in time_interleaved(calls, n=max(n, 200)).items():
        report.rows.append(
            {
                "shape": "8x10",
                "dtype": "float32",
                "arm": name,
                "set": "fixed cost",
                "threads": torch.get_num_threads(),
                **timing,
            }
        )


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
        report.at_least(f"{name} one pass, share of copy", share, 0.55)


def memory(arm: str, shape: str) -> int:
    """Return the growth in KiB of a process's peak memory in one call of an arm."""
    command = [sys.executable, "-m", "benchmarks", "kd-loss", "--memory", arm, shape]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def peak_kib(arm: str, shape: str) -> int:
    """Measure `memory` in this process, after a small call has loaded all code."""
    set_num_threads(1)
    sizes = tuple(map(int, shape.split("x")))
    _call(arm, (2, *(8 for _ in sizes[1:])))()
    call = _call(arm, sizes)
    # The mark is put back to what is resident now: loading left it far above any call.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _highest_kib()
    call()
    return _highest_kib() - before


def _call(arm: str, sizes: tuple[int, ...]) -> Callable[[], object]:
    if len(sizes) == 3:
        return linear_arms(*sizes)[arm]
    student, teacher = torch.randn(sizes).requires_grad_(), torch.randn(sizes)
    found = family_arms(student, teacher) if arm in FAMILY else arms(student, teacher)
    return found[arm]


def _gradient_kib(shape: str) -> float:
    rows, classes = map(int, shape.split("x"))
    return 4 * rows * classes / 2**10


def _highest_kib() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0])
