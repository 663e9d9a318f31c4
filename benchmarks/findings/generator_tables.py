"""Tables of the studies about the generator: cheaper steps, and its images in another loop."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.findings.tables import Grid, Row, cell_of, spent
from benchmarks.markdown import table
from benchmarks.provenance import counted

MARGIN, GOAL = -0.5, 2.2


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
    if speed:
        note += (
            f"Speed of the loop: {speed['times_distiller']:.3f} of the Distiller's (median of "
            f"{speed['n']} pieces in turn, 20 to 80 %: {speed['p20']:.3f} to {speed['p80']:.3f}). "
        )
    if shown:
        note += (
            f"{shown[0]['views']:,} views a student, {grid.seeds} seeds an arm, ± 95 % interval "
            "(deviation pooled; differences paired by seed). "
        )
    header = ["loop", "views/s", "student top-1, %", "less the Distiller"]
    return table(header, body, note + spent(rows))


GENERATOR_TABLES: dict[str, tuple[str, Callable[[Row], bool], Callable[[list[Row]], str]]] = {
    "block-caching": ("block-caching", lambda r: True, block_caching),
    "loader": ("loader", lambda r: True, loader),
}
