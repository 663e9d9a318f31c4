"""Tables of studies about the generator: guidance, steps, cheaper steps, another loop."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from benchmarks.findings.tables import Grid, Row, axes, cell_of, spent
from benchmarks.markdown import table
from benchmarks.provenance import counted

MARGIN, GOAL = -0.5, 2.2


def finding_2(rows: list[Row]) -> str:
    """Accuracy by guidance and steps, at equal views."""
    shown = counted(rows, cell_of("finding-2"))
    grid = Grid(shown, lambda r: (r["guidance_scale"], r["num_steps"]))
    scales, steps = axes(shown, "guidance_scale"), axes(shown, "num_steps")
    body = [[f"{s:g}", *(grid.text((s, k)) for k in steps)] for s in scales]
    note = (
        f"Student top-1 in %, ± 95 % interval (deviation pooled over the grid, degrees of freedom "
        f"of the seeds), {grid.seeds} seeds a cell, {shown[0]['images']:,} images and "
        f"{shown[0]['views']:,} views each. Differences "
        f"of means over a row or column, paired by seed: {_contrasts(grid, CONTRASTS)}. "
    )
    return table(["guidance", *(f"{k} steps" for k in steps)], body, note + spent(rows))


def finding_2_quality(rows: list[Row]) -> str:
    """Write the quality of the images of each cell."""
    shown = counted(rows, cell_of("finding-2"))
    names = ("frechet", "precision", "recall", "confidence", "class_agreement")
    body = [
        [f"{r['guidance_scale']:g}", str(r["num_steps"]), *(f"{r[n]:.3f}" for n in names)]
        for r in sorted(shown, key=lambda r: (r["guidance_scale"], r["num_steps"]))
    ]
    header = [
        "guidance",
        "steps",
        "Frechet distance",
        "precision",
        "recall",
        "teacher confidence",
        "class agreement",
    ]
    note = (
        f"{shown[0]['images']:,} generated and real test images, in the features of the embedded "
        "strong classifier (not Inception); confidence and agreement are that classifier's."
    )
    return table(header, body, note)


def finding_2_checks(rows: list[Row]) -> str:
    """The same cells at equal compute, and the corners with the strong pair."""
    parts = {"compute": "LeNet-5, equal compute", "corners": "strong pair, equal views"}
    body, notes = [], []
    for part, name in parts.items():
        shown = counted((r for r in rows if r["part"] == part), cell_of("finding-2"))
        grid = Grid(shown, lambda r: (r["guidance_scale"], r["num_steps"]))
        for cell in grid.cells:
            guidance, steps = cell
            count = next(
                r["images"] for r in shown if (r["guidance_scale"], r["num_steps"]) == cell
            )
            body.append([name, f"{guidance:g}", str(steps), f"{count:,}", grid.text(cell)])
        if shown:
            notes.append(f"{name}: {grid.seeds} seeds a cell, {shown[0]['views']:,} views.")
        if part == "corners" and shown:
            wanted = ("guidance 1 less 4", "50 steps less 4")
            notes.append(f"Paired by seed: {_contrasts(grid, wanted)}.")
        elif shown:
            notes.append(f"Paired by seed: {_from_first(grid)}.")
    return table(["part", "guidance", "steps", "images", "top-1, %"], body, " ".join(notes))


def finding_2_ancestral(rows: list[Row]) -> str:
    """Few and many steps of an ancestral solver beside the grid's cells of equal guidance."""
    names = {"grid": "dpm++2m (deterministic)", "ancestral": "ddpm (ancestral)"}
    figures = ("frechet", "precision", "recall")
    students = [r for r in rows if r["seed"] != "quality"]
    shown = counted(students, cell_of("finding-2"))
    grid = Grid(shown, lambda r: (r["part"], r["num_steps"]))
    quality = {(r["part"], r["num_steps"]): r for r in rows if r["seed"] == "quality"}
    steps, body, notes = axes(shown, "num_steps"), [], []
    for part, solver in names.items():
        for k in steps:
            cells = (f"{quality[part, k][n]:.3f}" if (part, k) in quality else "" for n in figures)
            body.append([solver, str(k), grid.text((part, k)), *cells])
        most, least = (part, steps[-1]), (part, steps[0])
        if {most, least} <= grid.cells.keys() and most != least:
            gap = grid.difference([most], [least])
            notes.append(f"{solver}: {steps[-1]} steps less {steps[0]}: {gap}")
    header = ["solver", "steps", "student top-1, %", "Frechet distance", "precision", "recall"]
    note = (
        f"Guidance {shown[0]['guidance_scale']:g}, {grid.seeds} seeds a cell, ± 95 % interval "
        f"(deviation pooled; differences paired by seed). {'; '.join(notes)}. "
    )
    return table(header, body, note + spent(rows))


def finding_2_samples(rows: list[Row]) -> str:
    """Guidance 2 less 4 over several samples of images, for each pair of networks."""
    body = []
    for student in dict.fromkeys(r["student"] for r in rows):
        shown = [r for r in rows if r["student"] == student]
        means = over_student_seeds(shown)
        grid = Grid(means, lambda r: r["guidance_scale"])
        gap = grid.difference([2.0], [4.0]) if {2.0, 4.0} <= grid.cells.keys() else ""
        apart = " ".join(f"{gap:+.2f}" for gap in grid.gaps([2.0], [4.0])) if gap else ""
        cells = [f"{grid.mean_of(s):.2f}" if s in grid.cells else "" for s in (2.0, 4.0)]
        body.append([student, *cells, gap.replace("seeds", "noise seeds"), apart])
    header = ["student", "guidance 2", "guidance 4", "2 less 4", "by noise seed"]
    seeds = [len({r[name] for r in rows}) for name in ("noise_seed", "seed")]
    note = (
        f"Student top-1 in %: {seeds[0]} samples of {rows[0]['images']:,} images, {seeds[1]} "
        f"student seeds on each, {rows[0]['num_steps']} steps. The 95 % interval is over samples "
        "of images, after a mean over student seeds. "
    )
    return table(header, body, note + spent(rows))


def over_student_seeds(rows: list[Row]) -> list[Row]:
    """Return one row for each guidance and noise seed, with the mean over student seeds."""
    found: dict[tuple[float, int], list[float]] = {}
    for row in rows:
        found.setdefault((row["guidance_scale"], row["noise_seed"]), []).append(row["top1"])
    return [
        {"guidance_scale": scale, "seed": seed, "top1": statistics.mean(values)}
        for (scale, seed), values in found.items()
    ]


def _from_first(grid: Grid) -> str:
    """Differences of the first cell of guidance and steps from each of the others."""
    first, *others = grid.cells
    said = (f"guidance {s:g}, {k} steps: {grid.difference([first], [(s, k)])}" for s, k in others)
    return f"guidance {first[0]:g}, {first[1]} steps less {'; less '.join(said)}"


# Contrast: two means over the cells (guidance, steps) of a row or a column.
CONTRASTS = ("guidance 2 less 4", "guidance 1 less 2", "guidance 1 less 4", "50 steps less 4")


def _contrasts(grid: Grid, names: Sequence[str]) -> str:
    """Differences between rows and columns of a grid of guidance and steps."""
    said = []
    for name in names:
        one, other = (float(word) for word in name.split() if word.isdigit())
        place = 0 if name.startswith("guidance") else 1
        sides = [[c for c in grid.cells if c[place] == value] for value in (one, other)]
        if all(sides):
            said.append(f"{name}: {grid.difference(*sides)}")
    return "; ".join(said) or "none"


def block_caching(rows: list[Row]) -> str:
    """Speed, arithmetic and distance of each schedule, and its student less the unchanged one's."""
    costs = {r["arm"]: r for r in rows if r["seed"] == "quality"}
    shown = counted((r for r in rows if "top1" in r), cell_of("block-caching"))
    grid = Grid(shown, lambda r: r["arm"])
    body = []
    for arm, row in costs.items():
        paired = arm != "neither" and {arm, "neither"} <= grid.cells.keys()
        body.append(
            [
                arm,
                f"{row['forwards']:g}",
                f"{row['images_per_s']:.0f}",
                f"{row['times_neither']:.2f}x",
                f"{row['times_diffusers']:.2f}x",
                f"{row['frechet']:.3f}" if "frechet" in row else "",
                grid.text(arm),
                grid.difference([arm], ["neither"]) if paired else "",
            ]
        )
    header = [
        "blocks reused, steps guided",
        "forwards",
        "images/s",
        "vs neither",
        "vs diffusers bf16",
        "Frechet distance",
        "student top-1, %",
        "less neither",
    ]
    first = next(iter(costs.values()))
    note = (
        f"The embedded denoiser, {first['num_steps']} guided steps; forwards are the arithmetic of "
        "an image over that of one forward. "
    )
    if shown:
        note += (
            f"{shown[0]['images']:,} images and {shown[0]['views']:,} views a student, "
            f"{grid.seeds} seeds an arm, ± 95 % interval (deviation pooled; differences paired by "
            f"seed). {_verdict(costs, grid)}"
        )
    return table(header, body, note + spent(rows))


def _verdict(costs: dict[str, Row], grid: Grid) -> str:
    """Name the fastest arm whose student is not worse by more than the margin."""
    within = [
        arm for arm in grid.cells if arm in costs and (arm == "neither" or _low(grid, arm) > MARGIN)
    ]
    if not within:
        return ""
    fastest = max(within, key=lambda arm: costs[arm]["times_diffusers"])
    factor = costs[fastest]["times_diffusers"]
    return (
        f"Fastest arm with the lower end of its difference above {MARGIN:g} points: {fastest}, "
        f"{factor:.2f}x diffusers (goal {GOAL:g}x, {'met' if factor >= GOAL else 'not met'}). "
    )


def _low(grid: Grid, arm: str) -> float:
    """Lower end of the 95 % interval of an arm's difference from the unchanged one."""
    gaps = grid.gaps([arm], ["neither"]) if "neither" in grid.cells else []
    if len(gaps) < 2:
        return float("-inf")
    return statistics.mean(gaps) - grid.half_of(gaps)


def loader(rows: list[Row]) -> str:
    """Speed and accuracy of an ordinary loop beside the Distiller."""
    arms = ("Distiller", "ordinary loop")
    shown = counted((r for r in rows if "top1" in r), cell_of("loader"))
    grid = Grid(shown, lambda r: r["arm"])
    speed = next((r for r in rows if r["arm"] == "speed"), None)
    body = []
    for arm in arms:
        rate = f"{speed[f'{arm} views/s']:,}" if speed else ""
        paired = arm != arms[0] and set(arms) <= grid.cells.keys()
        body.append(
            [arm, rate, grid.text(arm), grid.difference([arm], [arms[0]]) if paired else ""]
        )
    note = "The student of the embedded job, on the same views. "
    # The command below the table leaves out what chooses among its rows.
    if speed:
        note += (
            f"Speed of the loop: {speed['times_distiller']:.3f} of the Distiller's (median of "
            f"{speed['n']} pieces in turn, 20 to 80 %: {speed['p20']:.3f} to {speed['p80']:.3f}; "
            f"`--part speed --threads {speed['environment']['threads']}`). "
        )
    if shown:
        note += (
            f"Students: {shown[0]['views']:,} views each, {grid.seeds} seeds an arm, ± 95 % "
            "interval (deviation pooled; differences paired by seed; `--part accuracy --threads "
            f"{shown[0]['environment']['threads']}`). "
        )
    header = ["loop", "views/s", "student top-1, %", "less the Distiller"]
    return table(header, body, note + spent(rows))


GENERATOR_TABLES: dict[str, tuple[str, Callable[[Row], bool], Callable[[list[Row]], str]]] = {
    "finding-2": ("finding-2", lambda r: r["part"] == "grid" and r["seed"] != "quality", finding_2),
    "finding-2-quality": (
        "finding-2",
        lambda r: r["part"] == "grid" and r["seed"] == "quality",
        finding_2_quality,
    ),
    "finding-2-ancestral": (
        "finding-2",
        lambda r: r["part"] == "ancestral" or (r["part"] == "grid" and r["guidance_scale"] == 2),
        finding_2_ancestral,
    ),
    "finding-2-checks": (
        "finding-2",
        lambda r: r["part"] in ("compute", "corners"),
        finding_2_checks,
    ),
    "finding-2-samples": ("finding-2", lambda r: r["part"] == "samples", finding_2_samples),
    "block-caching": ("block-caching", lambda r: True, block_caching),
    "loader": ("loader", lambda r: True, loader),
}
