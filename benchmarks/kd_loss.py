"""kd_loss against eager PyTorch, torch.compile of it, and a copy of the same bytes.

Timed: loss and gradient by the student's logits, outputs allocated anew each time. The copy reads
two matrices and writes one: no implementation can move fewer bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, arguments, time_interleaved
from dmkd_fast import kd_loss, kd_loss_and_grad, runtime

TEMPERATURE = 10.0
SHAPES = ((256, 100), (256, 1000), (4096, 1000))


def main(argv: list[str]) -> None:
    parser = arguments("kd-loss", __doc__ or "")
    parser.add_argument("--n", type=int, default=20, help="timings per arm")
    options: argparse.Namespace = parser.parse_args(argv)
    runtime.set_num_threads(0)
    report = Report(bench="kd-loss")
    for rows, classes in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            medians = _measure(report, rows, classes, dtype, options.n)
            if dtype == torch.float32 and classes == 1000:
                shape = f"{rows}x{classes} fp32"
                report.at_least(f"{shape} vs eager", medians["eager"] / medians["ours"], 8)
                report.at_least(f"{shape} vs compile", medians["compile"] / medians["ours"], 3)
    report.finish(record=options.record)


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss as published."""
    log_q = F.log_softmax(student / TEMPERATURE, dim=1)
    p = F.softmax(teacher / TEMPERATURE, dim=1)
    return F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2


def _measure(
    report: Report, rows: int, classes: int, dtype: torch.dtype, n: int
) -> dict[str, float]:
    torch.manual_seed(0)
    student = torch.randn(rows, classes).to(dtype).requires_grad_()
    teacher = torch.randn(rows, classes).to(dtype)
    compiled = torch.compile(eager, dynamic=False)

    def backward(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            student.grad = None
            loss(student, teacher).backward()

        return call

    arms = {
        "ours": backward(lambda s, t: kd_loss(s, t, temperature=TEMPERATURE)),
        "ours, one pass": lambda: kd_loss_and_grad(student, teacher, temperature=TEMPERATURE),
        "eager": backward(eager),
        "compile": backward(compiled),
        "copy": lambda: torch.add(student.detach(), teacher),
    }
    timings = time_interleaved(arms, n=n)
    medians = {name: timing["median_ms"] for name, timing in timings.items()}
    for name, timing in timings.items():
        report.rows.append(
            {
                "shape": f"{rows}x{classes}",
                "dtype": str(dtype).removeprefix("torch."),
                "arm": name,
                **timing,
                "times_faster_than_eager": round(medians["eager"] / timing["median_ms"], 2),
            }
        )
    return medians
