"""Errors of loss and gradient against float64, as the student nears the teacher.

256 x 1000; teacher logits 3 * normal, student = teacher + noise * normal. "eager" is the published
chain in that dtype, "autocast" the same with its softmaxes in float32 and the division by T in
bfloat16, as torch.autocast does; "rounded" is the exact gradient rounded to the dtype, the least
error there can be. Relative errors; the gradient's in the 2-norm. `--figure FILE` draws them.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, arguments, recorded
from dmkd_fast import kd_loss_and_grad

SETTINGS = ((4, 0.5), (10, 2.0), (10, 0.5), (10, 0.1))


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("kd-loss-accuracy", __doc__ or "")
    parser.add_argument("--figure", help="PNG to write")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    report = Report(bench="kd-loss-accuracy", arguments=recorded(options))
    for temperature, noise in SETTINGS:
        for dtype in (torch.float32, torch.bfloat16):
            report.rows += _errors(temperature, noise, dtype)
    if options.figure:
        _draw(report, options.figure)
    report.finish(record=options.record)


def _errors(temperature: int, noise: float, dtype: torch.dtype) -> list[dict[str, object]]:
    torch.manual_seed(0)
    teacher = 3 * torch.randn(256, 1000)
    student = (teacher + noise * torch.randn(256, 1000)).to(dtype)
    teacher = teacher.to(dtype)
    loss, grad = _chain(student.double(), teacher.double(), temperature, torch.float64)
    arms = {
        "eager": _chain(student, teacher, temperature, dtype),
        "kd_loss": kd_loss_and_grad(student, teacher, temperature=temperature),
        "rounded": (loss, grad.to(dtype)),
    }
    if dtype != torch.float32:
        arms["autocast"] = _chain(student, teacher, temperature, torch.float32)
    return [
        {
            "temperature": temperature,
            "noise": noise,
            "dtype": str(dtype).removeprefix("torch."),
            "arm": name,
            "loss_error": (abs(a - loss) / loss).item(),
            "gradient_error": ((b.double() - grad).norm() / grad.norm()).item(),
        }
        for name, (a, b) in arms.items()
    ]


def _chain(
    student: Tensor, teacher: Tensor, temperature: int, softmax_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The published loss, logits divided by T in their own dtype."""
    leaf = student.clone().requires_grad_()
    log_q = F.log_softmax((leaf / temperature).to(softmax_dtype), dim=1)
    p = F.softmax((teacher / temperature).to(softmax_dtype), dim=1)
    loss = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def _draw(report: Report, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    labels = [f"T={t}\nnoise {n}" for t, n in SETTINGS]
    styles = {"eager": "oC0", "autocast": "sC1", "kd_loss": "DC2", "rounded": "_k"}
    for axes, dtype in zip(figure.subplots(1, 2), ("float32", "bfloat16"), strict=True):
        for arm, style in styles.items():
            rows = [r for r in report.rows if r["dtype"] == dtype and r["arm"] == arm]
            if rows:
                axes.semilogy(labels, [r["gradient_error"] for r in rows], style, label=arm)
        axes.set_title(f"{dtype} gradient, relative error")
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=110)
