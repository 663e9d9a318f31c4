"""kd_loss on a GPU: share of the copy bandwidth, microseconds per step, beside its rivals.

Run by benchmarks/gpu.sh. Loss and gradient; outputs reused where an arm can. GB/s counts two reads
and one write of the logits for every arm, whatever it really moves; the copy is torch.add of the
same tensors. The goals are below what the builds predict (`predicted.py`). Steps at 256 x 1000 are
timed as a user sees them and replayed from a CUDA graph.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, arguments, recorded, time_interleaved
from benchmarks.loss import predicted
from benchmarks.loss.kd_loss import arms
from benchmarks.loss.kd_loss_family import TEMPERATURE, backward

SHAPES = ((256, 1000), (8192, 1000), (2048, 21841), (8192, 32000), (4096, 128256))
TINY = ((8, 100), (256, 1000), (4, 8193))  # a rehearsal
MOST_LAUNCH = 2**22  # logits up to which launches decide, for which nothing is predicted
AT_LEAST_S = 1.0  # of each arm, all its timings together


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("kd-loss-gpu", __doc__ or "")
    parser.add_argument("--n", type=int, default=20, help="timings per arm")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small shapes, one timing")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    if not torch.cuda.is_available():
        print("kd-loss-gpu: no CUDA device")
        return 2
    report = Report(bench="kd-loss", arguments=recorded(options), device=torch.device("cuda"))
    for shape in TINY if options.tiny else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            try:
                _measure(report, shape, dtype, options)
            except torch.OutOfMemoryError:  # Eager needs several times the logits.
                print(f"{shape} {dtype}: out of memory, left out")
    report.finish(record=options.record)
    return 0


def _measure(
    report: Report, shape: tuple[int, int], dtype: torch.dtype, options: argparse.Namespace
) -> None:
    torch.manual_seed(0)
    student = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    teacher = torch.randn(shape, device="cuda").to(dtype)
    found = arms(student, teacher)
    one_pass = found["ours, one pass, reused"]
    compared: dict[str, Callable[[], object]] = {
        "ours": found["ours"],
        "ours, one pass": one_pass,
        "eager": found["eager"],
        "compile": found["compile"],
        "copy": found["copy, reused"],
    }
    if importlib.util.find_spec("liger_kernel"):
        compared["liger"] = backward(_liger(), student, teacher)
    if shape == (256, 1000):
        compared["ours, one pass, graph"] = _captured(one_pass)
    n, at_least_s = (1, 0.0) if options.tiny else (options.n, AT_LEAST_S)
    timings = time_interleaved(compared, n=n, at_least_s=at_least_s)
    moved = 3 * student.numel() * student.element_size()
    peak = moved / timings["copy"]["median_ms"]
    for name, timing in timings.items():
        report.rows.append(
            {
                "shape": f"{shape[0]}x{shape[1]}",
                "dtype": str(dtype).removeprefix("torch."),
                "arm": name,
                "us_per_step": round(1e3 * timing["median_ms"], 2),
                "gb_per_s": round(1e-6 * moved / timing["median_ms"], 1),
                "share_of_copy": round(moved / timing["median_ms"] / peak, 3),
                "n": timing["n"],
            }
        )
        goal = predicted.goal(shape[1], report.rows[-1]["dtype"])
        if name == "ours, one pass" and goal is not None and student.numel() >= MOST_LAUNCH:
            report.at_least(
                f"{shape[0]}x{shape[1]} {dtype} share of copy",
                report.rows[-1]["share_of_copy"],
                goal,
            )


def _captured(arm: Callable[[], object]) -> Callable[[], object]:
    arm()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        arm()
    return graph.replay


def _liger() -> Callable[[Tensor, Tensor], Tensor]:
    """Liger's KLDivLoss, with the softmaxes that it leaves to the caller."""
    from liger_kernel.transformers import LigerKLDIVLoss

    module = LigerKLDIVLoss(reduction="batchmean")

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        log_q = F.log_softmax(student.float() / TEMPERATURE, dim=1)
        p = F.softmax(teacher.float() / TEMPERATURE, dim=1)
        divergence: Tensor = module(log_q, p)
        return divergence * TEMPERATURE**2

    return loss
