"""Write tables between `<!-- rows:NAME -->` and `<!-- end -->` in README and docs.

Each table shows the newest recorded rows of its measurement (those of the last commit and date)
that were measured on a CPU, NAME-gpu those on a GPU; tables of the studies, which take hours, show
all rows. Below each table stands the command that made its rows, and whether they are superseded
(`provenance.py`). Plots of the studies are drawn as well.
`--check` changes nothing and fails where a table and its rows disagree, where rows were made with
arguments other than the defaults of their command, and where a row has an unknown mark.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import provenance
from benchmarks.__main__ import NAMES
from benchmarks.findings.plots import draw
from benchmarks.findings.tables import STUDY_TABLES, cell_of
from benchmarks.harness import read_rows
from benchmarks.job.tables import JOB_TABLES
from benchmarks.markdown import table, where

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- rows:([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Source of a table's rows."""

    bench: str
    """Name of the measurement and of its file in results/."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Fields that the rows must have."""
    required: tuple[str, ...] = ()
    """Arguments of the command that have no default."""
    all_runs: bool = False
    """Show the rows of all dates instead of those of the last one."""


# Tables that do not show all rows of the measurement of the same name. Of several sources, the
# first with rows that are not superseded counts.
SOURCES = {
    "embedded": (Source(bench="embedded"), Source(bench="fewstep", only={"job": "few steps"})),
    "end-to-end": (
        # Single runs, far apart: one of them alone would hide how much they differ.
        Source(
            bench="end-to-end", only={"part": "whole"}, required=("--part", "whole"), all_runs=True
        ),
    ),
    "ladder": (Source(bench="end-to-end", only={"part": "ladder"}, required=("--part", "ladder")),),
    "finding-1": (Source(bench="finding-1", required=("--data", "DIR")),),
    "nearest": (Source(bench="nearest", required=("--data", "DIR")),),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks render", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail where rows and tables disagree"
    )
    options = parser.parse_args(argv)
    stale = []
    shown: set[str] = set()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        after = render(before)
        shown.update(match[2] for match in MARKED.finditer(before))
        if before != after:
            stale.append(path.name)
            if not options.check:
                path.write_text(after, encoding="utf-8")
    if not options.check:
        draw(ROOT / "docs" / "images")
    faults = check(shown)
    if options.check and stale:
        faults.append(f"{', '.join(stale)}: differ from their rows; run it without --check")
    elif not options.check:
        print(f"{', '.join(stale) or 'nothing new'}: rendered", file=sys.stderr)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if options.check and faults else 0


def check(tables: Iterable[str]) -> list[str]:
    """Return one line for each unknown mark, and each table whose rows have other arguments."""
    faults = provenance.unknown_marks()
    for name in sorted(tables):
        rows, source = rows_of(name)
        faults += provenance.other_arguments(command_of(name, source), rows, source.required)
    return faults


def render(text: str) -> str:
    """Write every marked table of a text again."""

    def replace(match: re.Match[str]) -> str:
        name = match[2]
        rows, source = rows_of(name)
        if not rows:
            return match[1] + "No rows yet.\n" + match[3]
        if name in STUDY_TABLES:
            bench, is_shown, write = STUDY_TABLES[name]
            every, cell = [row for row in read_rows(bench) if is_shown(row)], cell_of(bench)
            text, awaited = write(every), provenance.awaited(every, cell)
        else:
            text, awaited = TABLES[name](rows), provenance.awaited(rows)
        said = [
            provenance.remarks(awaited),
            provenance.made_by(command_of(name, source), rows, source.required),
        ]
        return match[1] + " ".join([text.rstrip("\n"), *filter(None, said)]) + "\n" + match[3]

    return MARKED.sub(replace, text)


def rows_of(name: str) -> tuple[list[Row], Source]:
    """Return the rows that a table shows, and their source."""
    if name in STUDY_TABLES:
        bench, is_shown, _ = STUDY_TABLES[name]
        (source,) = SOURCES.get(name, (Source(bench=bench),))
        rows = [row for row in read_rows(bench) if is_shown(row)]
        return provenance.counted(rows, cell_of(bench)), source
    return latest(name)


def latest(name: str) -> tuple[list[Row], Source]:
    """Return the rows recorded with the last one on a CPU or, for `NAME-gpu`, on a GPU.

    Superseded rows are shown only where there are no others.
    """
    is_gpu, bench = name.endswith("-gpu"), name.removesuffix("-gpu")
    for source in SOURCES.get(bench, (Source(bench=bench),)):
        rows = provenance.counted(
            row
            for row in read_rows(source.bench)
            if _is_gpu(row) == is_gpu and all(row.get(k) == v for k, v in source.only.items())
        )
        if not source.all_runs:
            rows = [row for row in rows if row["environment"] == rows[-1]["environment"]]
        if rows and "superseded" not in rows[-1]:
            break
    return rows, source


def command_of(name: str, source: Source) -> str:
    """Return the name of the measurement of a table; some measurements have a variant for GPUs."""
    return name if name.endswith("-gpu") and name in NAMES else source.bench


def _is_gpu(row: Row) -> bool:
    return not row["environment"]["device"].startswith("CPU ")


def _kd_loss(rows: list[Row]) -> str:
    arms = ["eager", "compile", "ours", "ours, one pass", "copy"]
    threads = rows[-1]["environment"]["threads"]
    rows = [
        r
        for r in rows
        if r.get("set", "allocated") == "allocated" and r.get("threads", threads) == threads
    ]
    found = {(r["shape"], r["dtype"], r["arm"]): r for r in rows}
    body = []
    for shape, dtype in dict.fromkeys((r["shape"], r["dtype"]) for r in rows):
        cells = [f"{found[shape, dtype, arm]['median_ms']:.3f}" for arm in arms]
        gain = found[shape, dtype, "ours"]["times_faster_than_eager"]
        body.append([shape, dtype, *cells, f"{gain:.1f}x"])
    header = [
        "B x C",
        "dtype",
        "eager",
        "torch.compile",
        "`kd_loss`",
        "`kd_loss_and_grad`",
        "copy of the bytes",
        "`kd_loss` vs eager",
    ]
    note = f"Loss and gradient, median ms of {rows[0]['n']}, interleaved. {where(rows)}."
    return table(header, body, note)


def _nearest(rows: list[Row]) -> str:
    header = ["images", "n", "min", "5 %", "median", "95 %"]
    body = [
        [r["images"], str(r["n"]), *(f"{r[k]:.3f}" for k in ("min", "p5", "median", "p95"))]
        for r in rows
    ]
    return table(header, body, "RMS pixel distance in [0, 1] to the nearest training image.")


def _sampler(rows: list[Row]) -> str:
    arms = ["pipeline fp32", "pipeline half", "lean eager", "ours"]
    timed = [r for r in rows if r.get("arm") in arms and "steps" in r]
    found = {(r["model"], r["decoder"], r["steps"], r["arm"]): r for r in timed}
    body = []
    for key in dict.fromkeys((r["model"], r["decoder"], r["steps"]) for r in timed):
        per_s = [found[(*key, arm)]["images_per_s"] for arm in arms]
        ours = found[(*key, "ours")]
        body.append(
            [
                key[0],
                key[1],
                str(key[2]),
                str(ours["batch"]),
                *(f"{x:.3g}" for x in per_s),
                f"{per_s[3] / per_s[0]:.1f}x / {per_s[3] / per_s[1]:.1f}x",
                f"{ours['share_of_ceiling']:.0%}",
            ]
        )
    half = "fp16" if _is_gpu(rows[0]) else "bf16"
    header = [
        "model",
        "decoder",
        "steps",
        "batch",
        "diffusers fp32",
        f"diffusers {half}",
        "ours, not compiled",
        "ours",
        "gain",
        "of GEMM ceiling",
    ]
    forward = [r for r in rows if r["model"] == "DiT-S/2 forward"]
    best = max(forward, key=lambda r: r["share_of_ceiling"])
    note = (
        f"Guided images/s, medians of {timed[0]['n']}, interleaved; gain over fp32 / {half}. "
        f"DiT-S/2 forward alone: {best['share_of_ceiling']:.0%} of the ceiling at batch "
        f"{best['batch']} (ceiling {best['ceiling_tflop_per_s']:.2f} TFLOP/s). {where(rows)}."
    )
    return table(header, body, note)


def _views(rows: list[Row]) -> str:
    arms = ["ours", "DALI", "torchvision", "eager", "copy"]
    found = {(r["case"], r["dtype"], r["arm"], r["set"]): r for r in rows}
    body = []
    for key in dict.fromkeys((r["case"], r["dtype"]) for r in rows):
        cells = [found.get((*key, arm, "fresh")) for arm in arms]
        gains = [r["ours_is_times_faster"] if r else None for r in cells[1:3]]
        reused = found[(*key, "ours", "reused")]["images_per_s"]
        body.append(
            [
                *key,
                *(f"{r['images_per_s']:,}" if r else "" for r in cells),
                f"{reused:,}",
                " / ".join(f"{g:.1f}x" if g else "-" for g in gains),
            ]
        )
    header = [
        "pixels",
        "dtype",
        "`Views`",
        "DALI, CPU",
        "torchvision per image",
        "eager",
        "strided copy",
        "`Views`, memory reused",
        "vs DALI / torchvision",
    ]
    note = (
        f"Images/s at batch {rows[0]['batch']}, a new result each time except in one column, "
        f"medians of {rows[0]['n']}, interleaved. {where(rows)}."
    )
    return table(header, body, note)


def _ring(rows: list[Row]) -> str:
    timed = [r for r in rows if "operation" in r]
    capacities = list(dict.fromkeys(r["capacity"] for r in timed))
    found = {(r["operation"], r["capacity"]): r["us"] for r in timed}
    body = [
        [name, *(f"{found[name, c]:.1f}" for c in capacities)]
        for name in dict.fromkeys(r["operation"] for r in timed)
    ]
    steps = {r["step"]: r for r in rows if "step" in r}
    ms = {name: f"{row['median_ms']:.2f}" for name, row in steps.items()}
    note = (
        f"Microseconds a call. Step of the embedded student (batch {steps['whole']['batch']}, "
        f"{steps['whole']['dtype']}): {ms['whole']} ms, on ready views with a ready gradient "
        f"{ms['bare']} ms; alone, the draw takes {ms['draw']} ms, the views {ms['views']} ms, the "
        f"loss {ms['loss']} ms. Medians of {steps['whole']['n']}, interleaved. {where(rows)}."
    )
    return table(["operation", *(f"{c:,} slots" for c in capacities)], body, note)


def _kd_loss_gpu(rows: list[Row]) -> str:
    arms = list(dict.fromkeys(r["arm"] for r in rows if r["arm"] != "copy"))
    found = {(r["shape"], r["dtype"], r["arm"]): r for r in rows}
    body = []
    for shape, dtype in dict.fromkeys((r["shape"], r["dtype"]) for r in rows):
        cells = [found.get((shape, dtype, arm)) for arm in [*arms, "copy"]]
        body.append(
            [
                shape,
                dtype,
                *(
                    f"{r['us_per_step']:,.1f} ({r['share_of_copy']:.0%})" if r else ""
                    for r in cells
                ),
            ]
        )
    note = (
        f"Loss and gradient, microseconds, and share of the copy's speed; medians of "
        f"{rows[0]['n']}, interleaved. {where(rows)}."
    )
    return table(["B x C", "dtype", *arms, "copy of the bytes"], body, note)


def _cuda_facts(rows: list[Row]) -> str:
    header = ["attention", "batch", "images/s", "host ms a batch", "waits", "allocations"]
    body = [
        [
            r["arm"],
            str(r["batch"]),
            f"{r['images_per_s']:.1f}",
            f"{r['host_ms_per_batch']:.2f}",
            str(r["syncs"]),
            str(r["allocations_per_batch"]),
        ]
        for r in rows
    ]
    note = f"DiT-XL/2, 256 x 256, latents only, {rows[0]['steps']} guided steps. {where(rows)}."
    return table(header, body, note)


def _imagenet(rows: list[Row]) -> str:
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


TABLES: dict[str, Callable[[list[Row]], str]] = {
    **JOB_TABLES,
    "cuda-facts-gpu": _cuda_facts,
    "imagenet-gpu": _imagenet,
    "kd-loss": _kd_loss,
    "kd-loss-gpu": _kd_loss_gpu,
    "nearest": _nearest,
    "ring": _ring,
    "ring-gpu": _ring,
    "sampler": _sampler,
    "sampler-gpu": _sampler,
    "views": _views,
    "views-gpu": _views,
}
