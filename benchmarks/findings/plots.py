"""Plots of the studies, from their rows, into docs/images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.findings.tables import Grid, cell_of, images_in_memory
from benchmarks.harness import read_rows
from benchmarks.provenance import counted

Row = dict[str, Any]


def draw(folder: Path) -> None:
    """Draw what there are rows for."""
    import matplotlib

    matplotlib.use("Agg")
    for name, plot in (("finding-2", _finding_2), ("finding-3", _finding_3), ("reuse", _reuse)):
        if rows := counted(read_rows(name), cell_of(name)):
            figure = plot(rows)
            # No date and no version, so that equal rows give an equal file.
            figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})


def _finding_2(rows: list[Row]) -> Any:
    """Heat maps: what a cell teaches, beside how far its images are from real ones."""
    taught = [r for r in rows if r["part"] == "grid" and r["seed"] != "quality"]
    grid = Grid(taught, lambda r: (r["guidance_scale"], r["num_steps"]))
    far = {
        (r["guidance_scale"], r["num_steps"]): r["frechet"] for r in rows if r["seed"] == "quality"
    }
    scales = sorted({r["guidance_scale"] for r in taught})
    steps = sorted({r["num_steps"] for r in taught})
    figure, axes = _axes(2, width=8.4)
    panels: tuple[tuple[str, str, Callable[[Any], float | None], str], ...] = (
        (
            "student top-1, %",
            "viridis",
            lambda c: grid.mean_of(c) if c in grid.cells else None,
            ".1f",
        ),
        ("Frechet distance to real images", "viridis_r", far.get, ".2f"),
    )
    for axis, (title, colors, value, form) in zip(axes, panels, strict=True):
        table = [[value((s, k)) for k in steps] for s in scales]
        numbers = [[float("nan") if v is None else v for v in line] for line in table]
        axis.imshow(numbers, cmap=colors, aspect="auto")
        for y, line in enumerate(table):
            for x, number in enumerate(line):
                if number is not None:
                    axis.text(
                        x,
                        y,
                        format(number, form),
                        ha="center",
                        va="center",
                        bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1.5},
                    )
        axis.set_xticks(range(len(steps)), [str(k) for k in steps])
        axis.set_yticks(range(len(scales)), [f"{s:g}" for s in scales])
        axis.set(title=title, xlabel="steps", ylabel="guidance scale")
    return figure


def _finding_3(rows: list[Row]) -> Any:
    """Lines over the temperature, one per teacher, one panel per student."""
    students = list(dict.fromkeys(r["student"] for r in rows))
    figure, axes = _axes(len(students), width=4.2 * len(students))
    for axis, student in zip(axes, students, strict=True):
        shown = [r for r in rows if r["student"] == student]
        grid = Grid(shown, lambda r: (r["teacher"], r["temperature"]))
        for teacher in dict.fromkeys(r["teacher"] for r in shown):
            _line(axis, grid, [(teacher, t) for t in _values(shown, "temperature")], 1, teacher)
        axis.set(title=f"student {student}", xlabel="temperature", ylabel="top-1, %")
        axis.legend(title="teacher")
    return figure


def _reuse(rows: list[Row]) -> Any:
    """Accuracy over the images held in memory."""
    figure, (axis,) = _axes(1, width=5.0)
    grid = Grid(rows, lambda r: (r["how"], images_in_memory(r)))
    total = max(r["images"] for r in rows)
    for how, name in (("frozen", "frozen set"), ("ring", f"ring through which {total:,} pass")):
        sizes = sorted({images_in_memory(r) for r in rows if r["how"] == how})
        _line(axis, grid, [(how, size) for size in sizes], 1, name)
    axis.set(xscale="log", xlabel="images in memory", ylabel="top-1, %")
    axis.legend()
    return figure


def _line(axis: Any, grid: Grid, cells: list[Any], place: int, label: str) -> None:
    """Means with their intervals, over one part of the cells' keys."""
    there = [cell for cell in cells if cell in grid.cells]
    halves = [grid.half(cell) for cell in there] if grid.freedom else None
    places, means = [cell[place] for cell in there], [grid.mean_of(cell) for cell in there]
    axis.errorbar(places, means, yerr=halves, marker="o", capsize=3, label=label)


def _values(rows: list[Row], name: str) -> list[Any]:
    return sorted({row[name] for row in rows})


def _axes(count: int, *, width: float) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(width, 3.4), squeeze=False, layout="tight")
    return figure, list(axes[0])
