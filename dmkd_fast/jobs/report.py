"""Draw sample grids and training curves as PNG files.

matplotlib draws without a display and is imported on first use.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.runtime import files


def grid(images: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Draw a grid of images, one row per class with its name.

    Args:
        images: Images (C * n, c, H, W) uint8, n of each class in class order; c is 1 or 3.
        class_names: Names of the C classes.
        path: PNG file to write.
    """
    _sheet(images, class_names, path, width_inches=len(images) // len(class_names) * 0.55 + 1.2)


def pairs(images: Tensor, others: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Draw a grid of pairs of images, one row per class, with a thin gap between pairs.

    Args:
        images, others: Left and right images (C * n, c, H, W) uint8, n of each class in class
            order.
        class_names: Names of the C classes.
        path: PNG file to write.
    """
    gap = images.new_full((*images.shape[:-1], 3), 255)
    wide = torch.cat((images, others, gap), dim=-1)
    height, width = wide.shape[-2:]
    per_class = len(wide) // len(class_names)
    _sheet(wide, class_names, path, width_inches=per_class * 0.55 * width / height + 1.2)


def curves(stats: Path, path: Path, *, teacher_top1: float) -> None:
    """Plot accuracy and loss over views and over seconds, from a run's stats.jsonl.

    Args:
        stats: The file stats.jsonl of a run.
        path: PNG file to write.
        teacher_top1: Top-1 accuracy of the teacher, drawn as a dotted line.
    """
    rows = [json.loads(line) for line in stats.read_text(encoding="utf-8").splitlines()]
    figure, axes = _figure(2, width=10, height=3.8)
    for axis, key, label in ((axes[0], "views", "views"), (axes[1], "wall_s", "seconds")):
        scored = [row for row in rows if "top1" in row]
        axis.plot([r[key] for r in scored], [r["top1"] for r in scored], "o-", color="tab:blue")
        axis.axhline(teacher_top1, color="tab:blue", linestyle=":", linewidth=1)
        axis.set(xlabel=label, ylabel="top-1, real test images (dotted: teacher)")
        losses = axis.twinx()
        trained = [row for row in rows if "loss" in row]
        losses.plot([r[key] for r in trained], [r["loss"] for r in trained], color="tab:orange")
        losses.set(ylabel="distillation loss", yscale="log")
        axis.set_zorder(losses.get_zorder() + 1)
        axis.patch.set_visible(False)
    _save(figure, path)


def _sheet(images: Tensor, class_names: Sequence[str], path: Path, *, width_inches: float) -> None:
    per_class = len(images) // len(class_names)
    height, width = images.shape[-2:]
    rows = images.cpu().reshape(len(class_names), per_class, -1, height, width)  # (C, n, c, H, W)
    sheet = rows.permute(0, 3, 1, 4, 2).reshape(len(class_names) * height, per_class * width, -1)
    figure, axes = _figure(1, width=width_inches, height=len(class_names) * 0.55)
    axes[0].imshow(sheet.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
    axes[0].set_yticks([height * (i + 0.5) for i in range(len(class_names))], class_names)
    axes[0].set_xticks([])
    axes[0].tick_params(length=0)
    for spine in axes[0].spines.values():
        spine.set_visible(False)
    _save(figure, path)


def _figure(columns: int, *, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), squeeze=False)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
    files.replace(path, [file.getvalue()])
