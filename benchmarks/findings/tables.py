"""Tables of the studies: means over seeds with 95 % intervals, from whatever rows there are.

In a grid the deviation between seeds is pooled over its cells; the interval of one cell has the
degrees of freedom of the seeds. Differences between cells are paired by seed, because cells of one
seed share initial weights, draws and crops. Each table says its n.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.markdown import table
from benchmarks.provenance import counted

Row = dict[str, Any]
# 97.5 % quantiles of Student's t by degrees of freedom, from 1.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
ARMS = {
    "real": "real training images",
    "diffusion": "diffusion images",
    "other noise": "the same, of noise that the denoiser's training has not seen",
    "priors": "procedural images",
    "one image": "crops of one photograph",
    "noise": "uniform noise",
}


VIEWS, LONG_VIEWS = 384_000, 3 * 384_000
"""Views of the students of finding 1, and of its long trainings, which have their own table."""
# What a mean over seeds is taken over. A cell's figures of the images themselves have no seed.
CELLS = {
    "drawings": ("part", "arm"),
    "finding-1": ("arm", "views"),
    "finding-2": ("part", "guidance_scale", "num_steps", "noise_seed", "student"),
    "finding-3": ("student", "teacher", "temperature"),
    "finding-3-family": ("part", "student", "loss", "temperature", "teacher", "teacher_seed"),
    "levers": ("arm", "views"),
    "reuse": ("how", "held_images"),
    "selection": ("arm",),
    "stored-teacher": ("arm",),
    "cost": ("axis", "value"),
    "block-caching": ("arm",),
    "loader": ("arm",),
}


def cell_of(study: str) -> Callable[[Row], Any]:
    """The function that gives the cell of a study's row."""
    names = CELLS[study]
    return lambda row: (*(row.get(name) for name in names), row.get("seed") == "quality")


class Grid:
    """Accuracies by cell, with an interval from the deviation pooled over all cells.

    Cells of one seed share weights, draws and crops and err together, so the interval has the
    degrees of freedom of the seeds, not of all rows.
    """

    def __init__(self, rows: Iterable[Row], key: Callable[[Row], Any]) -> None:
        self.cells: dict[Any, list[float]] = {}
        self.by_seed: dict[Any, dict[Any, float]] = {}
        for row in rows:
            self.cells.setdefault(key(row), []).append(100 * row["top1"])
            self.by_seed.setdefault(key(row), {})[row.get("seed")] = 100 * row["top1"]
        several = [found for found in self.cells.values() if len(found) > 1]
        self.freedom = sum(len(found) - 1 for found in several)
        squares = sum(statistics.variance(found) * (len(found) - 1) for found in several)
        self.deviation = math.sqrt(squares / self.freedom) if self.freedom else math.nan
        seeds = {seed for found in self.by_seed.values() for seed in found}
        self.seeds_freedom = self.freedom if None in seeds else len(seeds) - 1

    def mean_of(self, cell: Any) -> float:
        """Mean over the seeds of one cell, in percent."""
        return statistics.mean(self.cells[cell])

    def half(self, cell: Any) -> float:
        """Half of the 95 % interval of the mean of one cell."""
        return t_975(self.seeds_freedom) * self.deviation / math.sqrt(len(self.cells[cell]))

    def text(self, cell: Any) -> str:
        """Mean and half-interval; empty if there is no row."""
        if cell not in self.cells:
            return ""
        mean = f"{self.mean_of(cell):.2f}"
        return f"{mean} ± {self.half(cell):.2f}" if self.freedom else mean

    def difference(self, one: list[Any], other: list[Any]) -> str:
        """Mean of some cells less that of others, paired by the seeds that all of them have."""
        gaps = self.gaps(one, other)
        if not gaps:
            return "no seed in common"
        gap = f"{statistics.mean(gaps):+.2f}"
        if len(gaps) == 1:
            return f"{gap} (1 seed)"
        return f"{gap} ± {self.half_of(gaps):.2f} ({len(gaps)} seeds)"

    def gaps(self, one: list[Any], other: list[Any]) -> list[float]:
        """Means of some cells less those of others, for each seed that all of them have."""
        cells = [self.by_seed[cell] for cell in (*one, *other)]
        return [
            statistics.mean(self.by_seed[cell][seed] for cell in one)
            - statistics.mean(self.by_seed[cell][seed] for cell in other)
            for seed in cells[0]
            if all(seed in cell for cell in cells)
        ]

    @staticmethod
    def half_of(gaps: list[float]) -> float:
        """Half of the 95 % interval of the mean of some differences."""
        return t_975(len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))

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
    """Write the arms of finding 1, and their distance from real images."""
    shown = counted((r for r in rows if "top1" in r), cell_of("finding-1"))
    grid = Grid(shown, lambda r: r["arm"])
    body = []
    for arm, name in ARMS.items():
        found = grid.cells.get(arm)
        if found is None:
            continue
        deviation = f"{statistics.stdev(found):.2f}" if len(found) > 1 else ""
        agreement = statistics.mean(100 * r["agreement"] for r in shown if r["arm"] == arm)
        cells = [f"{statistics.mean(found):.2f}", deviation, str(len(found)), f"{agreement:.2f}"]
        counts = sorted({r["images"] for r in shown if r["arm"] == arm and "images" in r})
        sees = f"{name} ({', '.join(f'{n:,}' for n in counts)})" if counts else name
        paired = arm != "real" and "real" in grid.cells
        body.append([sees, *cells, grid.difference([arm], ["real"]) if paired else ""])
    note = (
        f"LeNet-5 teaches LeNet-5-half, {shown[0]['views']:,} views. Differences are paired by "
        "seed, ± 95 % interval. "
    )
    if {"diffusion", "other noise"} <= grid.cells.keys():
        gap = grid.difference(["other noise"], ["diffusion"])
        note += f"Noise that the denoiser's training has not seen less noise that it has: {gap}. "
    header = [
        "student sees",
        "top-1, %",
        "std",
        "seeds",
        "agreement with teacher, %",
        "less real images",
    ]
    return table(header, body, note + spent(rows))


def finding_3(rows: list[Row]) -> str:
    """Accuracy by student, teacher and temperature."""
    current = counted(rows, cell_of("finding-3"))
    body, notes = [], []
    temperatures = axes(current, "temperature")
    for student in dict.fromkeys(r["student"] for r in current):
        shown, every = ([r for r in some if r["student"] == student] for some in (current, rows))
        grid, whole = (Grid(s, lambda r: (r["teacher"], r["temperature"])) for s in (shown, every))
        teachers = list(dict.fromkeys(r["teacher"] for r in every))
        body += [[student, t, *(grid.text((t, k)) for k in temperatures)] for t in teachers]
        notes.append(f"{student}: {grid.seeds} seeds a cell, {shown[0]['views']:,} views.")
        gaps = []
        for other in teachers[:0:-1]:
            common = [
                k for k in temperatures if {(teachers[0], k), (other, k)} <= grid.cells.keys()
            ]
            if common:
                pair = [(teachers[0], k) for k in common], [(other, k) for k in common]
                each = (grid.difference([one], [two]) for one, two in zip(*pair, strict=True))
                by_t = (f"T = {k:g}: {gap}" for k, gap in zip(common, each, strict=True))
                gaps.append(f"{teachers[0]} less {other} teacher {grid.difference(*pair)}")
                gaps[-1] += f" [{', '.join(by_t)}]" if len(common) > 1 else ""
                if (with_all := whole.difference(*pair)) != grid.difference(*pair):
                    gaps[-1] += f", including the cells left out: {with_all}"
        if gaps:
            notes.append(
                f"Over the temperatures that both have, paired by seed: {'; '.join(gaps)}."
            )
    header = ["student", "teacher", *(f"T = {t:g}" for t in temperatures)]
    note = "Top-1 in %, ± 95 % interval (deviation pooled per student). " + " ".join(notes)
    return table(header, body, f"{note} {spent(rows)}")


def reuse(rows: list[Row]) -> str:
    """Frozen sets beside rings through which more images pass."""
    current = counted(rows, cell_of("reuse"))
    grid = Grid(current, lambda r: (r["how"], r["held_images"]))
    views, total = current[0]["views"], max(r["images"] for r in current)
    body = []
    for how, size in sorted(grid.cells):
        held = images_in_memory(
            next(r for r in current if (r["how"], r["held_images"]) == (how, size))
        )
        cells = [f"{held:,}", f"{held * 784 / 2**20:.1f}"]
        name = f"ring, {total:,} pass" if how == "ring" else "frozen set"
        all_at_once = ("frozen", total)
        less = "" if (how, size) == all_at_once else grid.difference([(how, size)], [all_at_once])
        uses = f"{views / (total if how == 'ring' else size):.0f}"
        body.append([name, *cells, uses, grid.text((how, size)), less])
    header = [
        "student sees",
        "images in memory",
        "MiB",
        "views an image",
        "top-1, %",
        f"less all {total:,} at once",
    ]
    note = (
        f"{views:,} views, {grid.seeds} seeds a cell, ± 95 % interval (deviation pooled; "
        "differences paired by seed). "
    )
    sizes = [size for how, size in sorted(grid.cells) if how == "ring"]
    pairs = [(size, ("ring", size), ("frozen", size)) for size in sizes]
    gaps = [
        f"{size:,}: {grid.difference([ring], [frozen])}"
        for size, ring, frozen in pairs
        if frozen in grid.cells
    ]
    if gaps:
        note += f"Ring less frozen set of as many images: {'; '.join(gaps)}. "
    return table(header, body, note + spent(rows))


def stored_teacher(rows: list[Row]) -> str:
    """Students of stored logits beside those of a live teacher, and what the sets took."""
    shown = counted((r for r in rows if "top1" in r), cell_of("stored-teacher"))
    sets = {r["arm"]: r for r in rows if r["seed"] == "set"}
    grid, body = Grid(shown, lambda r: r["arm"]), []
    for arm in grid.cells:
        own = [r for r in shown if r["arm"] == arm]
        made = sets[arm]
        less = "" if arm == "live" else grid.difference([arm], ["live"])
        cells = [grid.text(arm), less, f"{statistics.mean(r['cpu_s'] for r in own):.1f}"]
        body.append([arm, *cells, f"{made['cpu_s']:.1f}", f"{made['bytes'] / made['images']:.1f}"])
    header = [
        "teacher",
        "top-1, %",
        "less live",
        "CPU s a student",
        "CPU s to make the set",
        "bytes of logits an image",
    ]
    note = (
        f"{shown[0]['images']:,} images, {shown[0]['views']:,} views a student, {grid.seeds} seeds "
        "an arm, ± 95 % interval (deviation pooled; differences paired by seed). "
    )
    return table(header, body, note + spent(rows))


def images_in_memory(row: Row) -> int:
    """Images that a row's ring held at a time."""
    held: int = row["held_images"]
    return held + 512 if row.get("superseded") == "ring of N + 512" else held


COST = {
    "batch": "training step, views a step",
    "capacity": "draw and views of 64, images in the ring",
    "pixels": "64 views, pixels an image",
    "sampled images": "sampler, images a call",
    "ranks": "training step of 64 views, ranks",
}


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
    return table(header, body, note)


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


def axes(rows: list[Row], name: str) -> list[Any]:
    """Return the different values of a field, in order."""
    return sorted({row[name] for row in rows})


def spent(rows: list[Row]) -> str:
    """Return the cost of students and of recorded images, and the machines."""
    seconds = sum(row.get("cpu_s", 0.0) for row in rows)
    stamps = [row["environment"] for row in rows]
    devices, dates = (dict.fromkeys(stamp[name] for stamp in stamps) for name in ("device", "date"))
    return f"{seconds / 3600:.2f} CPU hours. {' and '.join(devices)}, {' and '.join(dates)}."


def nearest_table(rows: list[Row]) -> str:
    """Write the distances of generated images to the nearest training images."""
    header = ["images", "n", "min", "5 %", "median", "95 %"]
    body = [
        [r["images"], str(r["n"]), *(f"{r[k]:.3f}" for k in ("min", "p5", "median", "p95"))]
        for r in rows
    ]
    return table(header, body, "RMS pixel distance in [0, 1] to the nearest training image.")


STUDY_TABLES: dict[str, tuple[str, Callable[[Row], bool], Callable[[list[Row]], str]]] = {
    "finding-1": ("finding-1", lambda r: r.get("views", VIEWS) == VIEWS, finding_1),
    "finding-1-long": ("finding-1", lambda r: r.get("views") == LONG_VIEWS, finding_1),
    "finding-3": ("finding-3", lambda r: True, finding_3),
    "reuse": ("reuse", lambda r: True, reuse),
    "stored-teacher": ("stored-teacher", lambda r: True, stored_teacher),
    "cost": ("cost", lambda r: True, cost),
}
"""By the name in the text: the study, which of its rows (of any date), and the table."""
