"""Tables of whole jobs: the embedded job, few steps, the ladder, fidelity; and what they share."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.findings.tables import t_975
from benchmarks.markdown import table, where
from dmkd_fast import assets

Row = dict[str, Any]
DRIFT = 1.2
"""Smaller gains may be drift where each arm ran once: in two runs of whole jobs the same arm
differed by more."""


def embedded(rows: list[Row]) -> str:
    """Accuracy and time of the embedded job by seed, and their mean and deviation."""
    names = {
        "top1": ".4f",
        "teacher_top1": ".4f",
        "agreement": ".4f",
        "generated_images": ",",
        "views": ",",
        "wall_s": ".0f",
        "cpu_s": ".0f",
    }
    body = [[str(r["seed"]), *(format(r[n], form) for n, form in names.items())] for r in rows]
    if len(rows) > 1:
        body.append(["mean ± std", *(spread(rows, n, form) for n, form in names.items())])
    header = [
        "seed",
        "student top-1",
        "teacher top-1",
        "agreement",
        "generated images",
        "views",
        "wall s",
        "CPU s",
    ]
    note = "Accuracy after the last step, on 10,000 real test images. "
    if len(rows) > 1:
        note += "± is the standard deviation over seeds. "
    if points := rows[0]["arguments"].get("points"):
        note += f"The times include {points} evaluations on the way. "
    if every := rows[0]["arguments"].get("every"):
        note += f"The times include an evaluation every {every:,} views. "
    return table(header, body, f"{note}{where(rows)}.")


def fewstep(rows: list[Row]) -> str:
    """The many-step and the few-step job, and what the few-step denoiser cost."""
    header = ["job", "seed", "top-1", "whole job, s", "CPU s", "s to the target", "target"]
    body, jobs = [], list(dict.fromkeys(r["job"] for r in rows))
    for job in jobs:
        shown = [r for r in rows if r["job"] == job]
        body += [
            [
                job,
                str(r["seed"]),
                f"{r['top1']:.4f}",
                f"{r['wall_s']:.0f}",
                f"{r['cpu_s']:.0f}",
                _seconds(r["s_to_target"]),
                f"{r['target']:.4f}",
            ]
            for r in shown
        ]
        names = {"top1": ".4f", "wall_s": ".0f", "cpu_s": ".0f"}
        cells = [spread(shown, n, form) for n, form in names.items()]
        count = sum(r["s_to_target"] is not None for r in shown)
        body.append([job, "mean ± std", *cells, f"{count} of {len(shown)} reach it", ""])
    many, few = (statistics.mean(r["cpu_s"] for r in rows if r["job"] == job) for job in jobs)
    note = (
        f"Target: mean top-1 of the many-step job. {less(rows, jobs)}{break_even([many - few])} "
        f"{where(rows)}."
    )
    return table(header, body, note)


def less(rows: list[Row], jobs: Sequence[str]) -> str:
    """Compare the second job with the first, paired by seed; empty for one seed."""
    first, second = ({r["seed"]: r for r in rows if r["job"] == job} for job in jobs)
    seeds = first.keys() & second.keys()
    if len(seeds) < 2:
        return ""
    said = []
    for name, unit, scale in (("top1", "points", 100.0), ("wall_s", "s", 1.0)):
        gaps = [scale * (second[seed][name] - first[seed][name]) for seed in sorted(seeds)]
        half = t_975(len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
        said.append(f"{statistics.mean(gaps):+.2f} ± {half:.2f} {unit}")
    names = f"{jobs[1].capitalize()} less {jobs[0]}"
    return f"{names}, paired by seed, ± 95 % interval: {' and '.join(said)}. "


def ratio_interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return lower end of the 95 % interval, geometric mean, and upper end."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.mean(logs)
    half = t_975(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean - half), math.exp(mean), math.exp(mean + half)


def factor(ratios: Sequence[float]) -> str:
    """Write ratios of seeds: geometric mean and 95 % interval, which one seed does not have."""
    if len(ratios) < 2:
        return f"{ratios[0]:.1f}x" if ratios else "-"
    low, mean, high = ratio_interval(ratios)
    return f"{mean:.2f}x" if low == high else f"{mean:.2f}x ({low:.2f} to {high:.2f})"


def by_arm(rows: list[Row], name: str) -> str:
    """A figure of the first arm, and the arms that have another one."""
    first, *others = dict.fromkeys(r[name] for r in rows)
    said = []
    for value in others:
        arms = dict.fromkeys(f'"{r["arm"]}"' for r in rows if r[name] == value)
        said.append(f"{value:,} in {' and '.join(arms)}")
    return f"{first:,} ({'; '.join(said)})" if said else f"{first:,}"


def breakdown(rows: list[Row], causes: Sequence[tuple[str, str, str, str]]) -> str:
    """Split the gain over the eager bfloat16 baseline into its causes; empty without their arms."""
    said = []
    for name, before, after, figure in causes:
        found = [[r[figure] for r in rows if r["arm"] == arm] for arm in (before, after)]
        # The time of a run that never reaches the target is unknown.
        if all(found) and None not in [*found[0], *found[1]]:
            was, now = (statistics.median(times) for times in found)
            said.append(f"{name} {was:.0f} to {now:.0f} s ({was / now:.1f}x)")
    gain = "Where the gain over eager bf16 comes from, by medians: "
    return f"{gain}{'; '.join(said)}. " if said else ""


def break_even(saved_cpu_s: Sequence[float]) -> str:
    """Say after how many jobs the few-step denoiser has paid for its own training.

    Args:
        saved_cpu_s: Processor seconds that a job with it spends less than one with many steps.
    """
    wall, cpu = (asset_figure("fewstep", name) for name in ("wall_s", "cpu_s"))
    said = (
        f"The few-step denoiser itself took {wall:,.0f} s on one thread ({cpu:,.0f} CPU s), which "
        "no row counts."
    )
    if not saved_cpu_s or min(saved_cpu_s) <= 0:
        return said
    saved = _range(saved_cpu_s, lambda s: f"{s:.0f}")
    jobs = _range([cpu / s for s in reversed(saved_cpu_s)], lambda n: str(math.ceil(n)))
    return f"{said} A job with it takes {saved} CPU s less, which repays that after {jobs} jobs."


def asset_figure(asset: str, name: str) -> float:
    """A figure of how an embedded network was made, from its README."""
    text = (assets.resolve(f"embedded:fashion_mnist/{asset}") / "README.md").read_text("utf-8")
    found = re.search(rf"^\| {name} \| ([0-9.]+) \|$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"README of {asset}: expected a row {name}; render it again")
    return float(found[1])


def ladder(rows: list[Row]) -> str:
    """Write the table from the baseline to ours, one change at a time."""
    header = [
        "after",
        "this change",
        "seed",
        "top-1",
        "images/s",
        "views/s",
        "whole, s",
        "gain",
        "s to target",
        "seen in the run",
    ]
    wall = {(r["arm"], r["seed"]): r["wall_s"] for r in rows}
    once = len({r["seed"] for r in rows}) == 1
    noise = "; noise: the 95 % interval over seeds contains 1"
    if once:
        noise = f"; a factor within {DRIFT:g} of 1 is noise, since each rung ran once"
    gains: dict[str, list[float]] = {}
    for r in rows:
        if r["after"]:
            gains.setdefault(r["arm"], []).append(wall[r["after"], r["seed"]] / r["wall_s"])
    body = [
        [
            r["after"] or "-",
            r["arm"],
            str(r["seed"]),
            f"{r['top1']:.4f}",
            f"{r['images_per_s']:.0f}",
            f"{r['views_per_s']:,.0f}",
            f"{r['wall_s']:.0f}",
            _gain(wall[r["after"], r["seed"]] / r["wall_s"], gains[r["arm"]])
            if r["after"]
            else "-",
            _seconds(r["s_to_target"]),
            _seen(r["proof"]),
        ]
        for r in rows
    ]
    note = (
        f"Gain: seconds of the whole job before the change over those after it{noise}. Images made "
        "alike were made once, and their time is part of each row. The compiled student is not "
        f"carried on: on a CPU `dmkd` does not compile it. {where(rows)}."
    )
    return table(header, body, note)


def step(rows: list[Row]) -> str:
    """A training step alone, one change at a time."""
    body = [
        [
            r["arm"],
            f"{r['median_ms']:.1f}",
            f"{r['p20_ms']:.1f} to {r['p80_ms']:.1f}",
            f"{r['times_faster_than_published']:.2f}x",
        ]
        for r in rows
    ]
    header = ["step", "ms", "20 % to 80 %", "vs as published"]
    note = f"Each row adds one change. Medians of {rows[0]['n']}, interleaved. {where(rows)}."
    return table(header, body, note)


def fidelity(rows: list[Row]) -> str:
    """Write the table of what each preset costs and teaches."""
    header = [
        "fidelity",
        "steps",
        "solver",
        "guidance",
        "forwards",
        "images/s",
        "Frechet distance",
        "student top-1",
    ]
    body = [
        [
            r["fidelity"],
            str(r["num_steps"]),
            r["solver"],
            f"{r['guidance_scale']:g}",
            str(r["forwards_per_image"]),
            f"{r['images_per_s']:.0f}",
            f"{r['frechet']:.3f}",
            f"{r['top1']:.4f}",
        ]
        for r in rows
    ]
    seeds = rows[0]["seeds"]
    counted = "one seed, so an observation without an interval" if seeds == 1 else f"{seeds} seeds"
    note = (
        f"{rows[0]['views']:,} views, {counted}; distance to real test images in the strong "
        f"teacher's features. {where(rows)}."
    )
    return table(header, body, note)


def spread(rows: Sequence[Row], name: str, form: str) -> str:
    """Mean and standard deviation; the value alone where all are equal."""
    values = [row[name] for row in rows]
    if len(set(values)) == 1:
        return format(values[0], form)
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"


def reached(rows: Sequence[Row], name: str) -> str:
    """Median seconds to an accuracy, where a run that never reaches it takes longest."""
    count = sum(r[name] is not None for r in rows)
    middle = statistics.median(math.inf if r[name] is None else r[name] for r in rows)
    said = "-" if math.isinf(middle) else f"{middle:.0f}"
    return said if count == len(rows) else f"{said} ({count} of {len(rows)} reach it)"


def _range(values: Sequence[float], text: Callable[[float], str]) -> str:
    """Smallest and largest of some values."""
    return " to ".join(dict.fromkeys((text(min(values)), text(max(values)))))


def _gain(factor: float, every: Sequence[float]) -> str:
    """Write a gain, and call it noise if the gains of all seeds do not show one."""
    low, _, high = ratio_interval(every) if len(every) > 1 else (factor / DRIFT, 1, factor * DRIFT)
    return f"{factor:.2f}x" + (" (noise)" if low < 1 < high else "")


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f}"


def _seen(proof: Row) -> str:
    """Return a short description of what a run was observed to do."""
    parts = [proof["sampler"], proof["attention"], proof["sampler_dtype"]]
    parts.append(f"{proof['png_files']:,} PNG files" if proof["png_files"] else "ring")
    parts += [
        name.removeprefix("aten::")
        for name, calls in proof["ops"].items()
        if calls and "scalar" not in name
    ]
    parts.append(f"{proof['teacher_batch_norms']} teacher norms")
    parts.append(f"{proof['page_faults_per_step']:,} page faults a step")
    if proof.get("channels_last"):
        parts.append("channels-last")
    return ", ".join([*parts, *(["compiled student"] if proof["compiled_graphs"] else [])])


def imagenet(rows: list[Row]) -> str:
    """Write the table at ImageNet size."""
    body = []
    for r in (r for r in rows if r["part"] == "sampler"):
        what = f"{r['model']}, {r['side']} pixels, {r['steps']} guided steps, batch {r['batch']}"
        body.append([what, r["arm"], f"{r['images_per_s']:,.2f} images/s", f"{r['peak_mib']:,.0f}"])
    for r in (r for r in rows if r["part"] == "training"):
        what = f"{r['teacher']} -> {r['student']}, {r['pixels']} pixels, batch {r['batch']}"
        body.append([what, r["arm"], f"{r['views_per_s']:,.0f} views/s", f"{r['peak_mib']:,.0f}"])
    for r in (r for r in rows if r["part"] == "outside"):
        what = f"{r['teacher']} -> {r['student']}: share of a step outside the networks"
        body.append([what, "ours", f"{r['share_outside_networks']:.1%}", ""])
    for r in (r for r in rows if r["part"].startswith("job")):
        what = (
            f"whole job by arithmetic: {r['images']:,} images at {r['steps']} steps, reuse "
            f"{r['reuse']}, {r['student']}"
        )
        parts = f"{r['generation_h']:,.1f} h + {r['training_h']:,.1f} h"
        body.append([what, f"{r['images_by']}, {r['arm']}", parts, ""])
    header = ["what", "arm", "figure", "peak MiB"]
    return table(header, body, f"Random weights; `benchmarks/job/imagenet.py`. {where(rows)}.")


JOB_TABLES: dict[str, Callable[[list[Row]], str]] = {
    "imagenet-gpu": imagenet,
    "embedded": embedded,
    "fewstep": fewstep,
    "fidelity": fidelity,
    "ladder": ladder,
    "step": step,
}
