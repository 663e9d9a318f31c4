"""Tables of the studies: means over seeds with 95 % intervals, from whatever rows there are.

In a grid the deviation between seeds is pooled over its cells, so that an interval over three seeds
is as narrow as the whole grid allows; each table says its n.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]
# 97.5 % quantiles of Student's t by degrees of freedom, from 1.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
ARMS = {
    "real": "real training images (55,000)", "diffusion": "diffusion images (30,720)",
    "one image": "crops of one photograph", "noise": "uniform noise",
}  # fmt: skip


class Grid:
    """Accuracies by cell, with an interval from the deviation pooled over all cells."""

    def __init__(self, rows: Iterable[Row], key: Callable[[Row], Any]) -> None:
        self.cells: dict[Any, list[float]] = {}
        for row in rows:
            self.cells.setdefault(key(row), []).append(100 * row["top1"])
        several = [found for found in self.cells.values() if len(found) > 1]
        self.freedom = sum(len(found) - 1 for found in several)
        squares = sum(statistics.variance(found) * (len(found) - 1) for found in several)
        self.deviation = math.sqrt(squares / self.freedom) if self.freedom else math.nan

    def mean(self, *cells: Any) -> float:
        """Mean over the seeds of some cells, in percent."""
        return statistics.mean(self.mean_of(cell) for cell in cells)

    def mean_of(self, cell: Any) -> float:
        """Mean over the seeds of one cell, in percent."""
        return statistics.mean(self.cells[cell])

    def half(self, *cells: Any) -> float:
        """Half of the 95 % interval of the mean over some cells."""
        variance = sum(1 / len(self.cells[cell]) for cell in cells) / len(cells) ** 2
        return t_975(self.freedom) * self.deviation * math.sqrt(variance)

    def text(self, cell: Any) -> str:
        """Mean and half-interval; empty if there is no row."""
        if cell not in self.cells:
            return ""
        mean = f"{self.mean_of(cell):.2f}"
        return f"{mean} ± {self.half(cell):.2f}" if self.freedom else mean

    def difference(self, one: list[Any], other: list[Any]) -> str:
        """Mean of some cells less that of others, with its interval."""
        gap = self.mean(*one) - self.mean(*other)
        if not self.freedom:  # one seed: nothing says how far off it is
            return f"{gap:+.2f}"
        return f"{gap:+.2f} ± {math.hypot(self.half(*one), self.half(*other)):.2f}"

    @property
    def seeds(self) -> str:
        """How many rows the cells have."""
        counts = sorted({len(found) for found in self.cells.values()})
        return " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))


def t_975(freedom: int) -> float:
    """97.5 % quantile of Student's t (Abramowitz & Stegun 26.7.5 beyond the table)."""
    if freedom <= len(T_975):
        return T_975[freedom - 1] if freedom else math.nan
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def finding_1(rows: list[Row]) -> str:
    """Arms of finding 1, and how far ours is from real images."""
    shown = [r for r in rows if "top1" in r]
    grid = Grid(shown, lambda r: r["arm"])
    body = []
    for arm, name in ARMS.items():
        found = grid.cells.get(arm)
        if found is None:
            continue
        deviation = f"{statistics.stdev(found):.2f}" if len(found) > 1 else ""
        agreement = statistics.mean(100 * r["agreement"] for r in shown if r["arm"] == arm)
        cells = [f"{statistics.mean(found):.2f}", deviation, str(len(found)), f"{agreement:.2f}"]
        body.append([name, *cells])
    note = f"LeNet-5 teaches LeNet-5-half, {shown[0]['views']:,} views. "
    pair = Grid([r for r in shown if r["arm"] in ("real", "diffusion")], lambda r: r["arm"])
    if len(pair.cells) == 2 and pair.freedom:
        note += f"Diffusion less real images: {pair.difference(['diffusion'], ['real'])}. "
    header = ["student sees", "top-1, %", "std", "seeds", "agreement with teacher, %"]
    return _table(header, body, note + _spent(rows))


def finding_2(rows: list[Row]) -> str:
    """Accuracy by guidance and steps, at equal views."""
    shown = [r for r in rows if r["part"] == "grid" and r["seed"] != "quality"]
    grid = Grid(shown, lambda r: (r["guidance_scale"], r["num_steps"]))
    scales, steps = _axes(shown, "guidance_scale"), _axes(shown, "num_steps")
    body = [[f"{s:g}", *(grid.text((s, k)) for k in steps)] for s in scales]
    low = [c for c in grid.cells if c[0] <= 1.5]
    high = [c for c in grid.cells if c[0] >= 2]
    note = (
        f"Student top-1 in %, ± 95 % interval (deviation pooled over the grid), {grid.seeds} seeds "
        f"a cell, {shown[0]['images']:,} images and {shown[0]['views']:,} views each. "
    )
    if low and high:
        note += (
            f"Guidance of at most 1.5 less guidance of at least 2: {grid.difference(low, high)}. "
        )
    few = [c for c in grid.cells if c[1] == min(steps)]
    many = [c for c in grid.cells if c[1] == max(steps)]
    note += f"{min(steps)} steps less {max(steps)} steps: {grid.difference(few, many)}. "
    return _table(["guidance", *(f"{k} steps" for k in steps)], body, note + _spent(rows))


def finding_2_quality(rows: list[Row]) -> str:
    """What the images of each cell are like."""
    shown = [r for r in rows if r["seed"] == "quality"]
    names = ("frechet", "precision", "recall", "confidence", "class_agreement")
    body = [
        [f"{r['guidance_scale']:g}", str(r["num_steps"]), *(f"{r[n]:.3f}" for n in names)]
        for r in sorted(shown, key=lambda r: (r["guidance_scale"], r["num_steps"]))
    ]
    header = ["guidance", "steps", "Frechet distance", "precision", "recall",
              "teacher confidence", "class agreement"]  # fmt: skip
    note = (
        f"{shown[0]['images']:,} generated and real test images, in the features of the embedded "
        "strong classifier (not Inception); confidence and agreement are that classifier's."
    )
    return _table(header, body, note)


def finding_2_checks(rows: list[Row]) -> str:
    """The same cells at equal compute, and the corners with the strong pair."""
    parts = {"compute": "LeNet-5, equal compute", "corners": "strong pair, equal views"}
    body, notes = [], []
    for part, name in parts.items():
        shown = [r for r in rows if r["part"] == part]
        grid = Grid(shown, lambda r: (r["guidance_scale"], r["num_steps"]))
        for cell in grid.cells:
            guidance, steps = cell
            count = next(
                r["images"] for r in shown if (r["guidance_scale"], r["num_steps"]) == cell
            )
            body.append([name, f"{guidance:g}", str(steps), f"{count:,}", grid.text(cell)])
        if shown:
            notes.append(f"{name}: {grid.seeds} seeds a cell, {shown[0]['views']:,} views.")
    return _table(["part", "guidance", "steps", "images", "top-1, %"], body, " ".join(notes))


def finding_3(rows: list[Row]) -> str:
    """Accuracy by student, teacher and temperature."""
    body, notes = [], []
    temperatures = _axes(rows, "temperature")
    for student in dict.fromkeys(r["student"] for r in rows):
        shown = [r for r in rows if r["student"] == student]
        grid = Grid(shown, lambda r: (r["teacher"], r["temperature"]))
        teachers = list(dict.fromkeys(r["teacher"] for r in shown))
        body += [[student, t, *(grid.text((t, k)) for k in temperatures)] for t in teachers]
        notes.append(f"{student}: {grid.seeds} seeds a cell, {shown[0]['views']:,} views.")
        if len(teachers) > 1 and {(teachers[-1], k) for k in temperatures} & grid.cells.keys():
            pair = (teachers[0], teachers[-1])
            common = [k for k in temperatures if all((t, k) in grid.cells for t in pair)]
            weak, strong = ([(t, k) for k in common] for t in pair)
            notes.append(
                f"{teachers[0]} less {teachers[-1]} teacher over the temperatures of both: "
                f"{grid.difference(weak, strong)}."
            )
    header = ["student", "teacher", *(f"T = {t:g}" for t in temperatures)]
    note = "Top-1 in %, ± 95 % interval (deviation pooled per student). " + " ".join(notes)
    return _table(header, body, f"{note} {_spent(rows)}")


def reuse(rows: list[Row]) -> str:
    """Frozen sets beside rings through which more images pass."""
    grid = Grid(rows, lambda r: (r["how"], r["held_images"]))
    body = []
    for size in _axes(rows, "held_images"):
        mib = size * 784 / 2**20
        cells = [grid.text(("frozen", size)), grid.text(("ring", size))]
        body.append([f"{size:,}", f"{mib:.1f}", f"{rows[0]['views'] / size:.0f}", *cells])
    total = max(r["images"] for r in rows)
    header = ["images in memory", "MiB", "views per image of a frozen set", "frozen set, top-1, %",
              f"ring, {total:,} images pass, top-1, %"]  # fmt: skip
    note = f"{rows[0]['views']:,} views, {grid.seeds} seeds a cell. "
    return _table(header, body, note + _spent(rows))


COST = {
    "batch": "training step, views a step", "capacity": "draw and views of 64, images in the ring",
    "pixels": "64 views, pixels an image", "sampled images": "sampler, images a call",
    "ranks": "training step of 64 views, ranks",
}  # fmt: skip


def cost(rows: list[Row]) -> str:
    """Time and memory along each axis, and the straight line through them."""
    rows = [row for row in rows if row["environment"] == rows[-1]["environment"]]
    body = []
    for axis, name in COST.items():
        shown = [r for r in rows if r["axis"] == axis]
        if not shown:
            continue
        values, ms = [r["value"] for r in shown], [r["median_ms"] for r in shown]
        fit = "-"
        if len(shown) > 2:
            start, slope, worst = line(values, ms)
            fit = f"{start:.3g} + {slope:.3g} x ({worst:.0%})"
        points = [f"{v:,}: {t:.3g}" for v, t in zip(values, ms, strict=True)]
        memory = f"{shown[0]['peak_memory_mib']:,} to {shown[-1]['peak_memory_mib']:,}"
        body.append([name, ", ".join(points), fit, memory])
    header = [
        "what, x",
        "ms at x",
        "ms as a line (worst point off by)",
        "peak memory of the process, MiB",
    ]
    stamp = rows[-1]["environment"]
    note = (
        f"Medians of {rows[0]['n']} (sampler {min(r['n'] for r in rows)}). {stamp['device']}, "
        f"{stamp['cores']} cores, {stamp['date']}."
    )
    return _table(header, body, note)


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """Intercept and slope of the line with the least relative errors, and the worst of them."""
    # Weighted by 1 / y^2, so that the small end counts as much as the large one.
    weights = [1 / y**2 for y in ys]
    total = sum(weights)
    x0 = sum(w * x for w, x in zip(weights, xs, strict=True)) / total
    y0 = sum(w * y for w, y in zip(weights, ys, strict=True)) / total
    pairs = list(zip(weights, xs, ys, strict=True))
    slope = sum(w * (x - x0) * (y - y0) for w, x, y in pairs) / sum(
        w * (x - x0) ** 2 for w, x, _ in pairs
    )
    start = y0 - slope * x0
    worst = max(abs(start + slope * x - y) / y for x, y in zip(xs, ys, strict=True))
    return start, slope, worst


def _axes(rows: list[Row], name: str) -> list[Any]:
    return sorted({row[name] for row in rows})


def _spent(rows: list[Row]) -> str:
    """What students took, and images where a row says so, and on which machine."""
    seconds = sum(row.get("cpu_s", 0.0) for row in rows)
    stamp = rows[-1]["environment"]
    return f"{seconds / 3600:.2f} CPU hours. {stamp['device']}, {stamp['date']}."


def _table(header: list[str], body: list[list[str]], note: str) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{note}\n"


STUDY_TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "finding-1": ("finding-1", finding_1),
    "finding-2": ("finding-2", finding_2),
    "finding-2-quality": ("finding-2", finding_2_quality),
    "finding-2-checks": ("finding-2", finding_2_checks),
    "finding-3": ("finding-3", finding_3),
    "reuse": ("reuse", reuse),
    "cost": ("cost", cost),
}
"""By the name in the text: which rows, all of them whenever they were measured, and the table."""
