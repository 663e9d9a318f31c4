"""Writes tables between `<!-- rows:NAME -->` and `<!-- end -->` in README and docs.

Each table shows the newest recorded rows of its measurement (those of the last commit and date)
that were measured on a CPU, NAME-gpu those on a GPU; tables of the studies, which take hours, show
all rows. Plots of the studies are drawn as well.
`--check` changes nothing and fails where a table and its rows disagree.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import read_rows
from benchmarks.study_plots import draw
from benchmarks.study_tables import STUDY_TABLES

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- rows:([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Row = dict[str, Any]
# Tables of one part of a measurement's rows.
PARTS = {"end-to-end": ("end-to-end", "whole"), "ladder": ("end-to-end", "ladder")}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks render", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether they agree")
    options = parser.parse_args(argv)
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        after = render(before)
        if before != after:
            stale.append(path.name)
            if not options.check:
                path.write_text(after, encoding="utf-8")
    if not options.check:
        draw(ROOT / "docs" / "images")
    if options.check and stale:
        names = ", ".join(stale)
        print(f"{names}: differ from their rows; run it without --check", file=sys.stderr)
    elif not options.check:
        print(f"{', '.join(stale) or 'nothing new'}: rendered", file=sys.stderr)
    return 1 if options.check and stale else 0


def render(text: str) -> str:
    """The text with every marked table written anew."""

    def replace(match: re.Match[str]) -> str:
        if match[2] in STUDY_TABLES:
            bench, table = STUDY_TABLES[match[2]]
            rows = read_rows(bench)
            return match[1] + (table(rows) if rows else "No rows yet.\n") + match[3]
        rows = latest(match[2])
        return match[1] + (TABLES[match[2]](rows) if rows else "No rows yet.\n") + match[3]

    return MARKED.sub(replace, text)


def latest(bench: str) -> list[Row]:
    """The rows recorded together with the last one on a CPU or, for `NAME-gpu`, on a GPU."""
    name = bench.removesuffix("-gpu")
    name, part = PARTS.get(name, (name, None))
    rows = [row for row in read_rows(name) if _is_gpu(row) == bench.endswith("-gpu")]
    rows = [row for row in rows if part is None or row["part"] == part]
    return [row for row in rows if row["environment"] == rows[-1]["environment"]]


def _table(header: list[str], body: list[list[str]], note: str) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{note}\n"


def _is_gpu(row: Row) -> bool:
    return not row["environment"]["device"].startswith("CPU ")


def _where(rows: list[Row]) -> str:
    stamp = rows[0]["environment"]
    return f"{stamp['device']}, {stamp['threads']} threads, torch {stamp['torch']}, {stamp['date']}"


def _embedded(rows: list[Row]) -> str:
    header = ["seed", "student top-1", "teacher top-1", "agreement", "generated images",
              "views", "wall s", "CPU s"]  # fmt: skip
    body = [
        [str(r["seed"]), f"{r['top1']:.4f}", f"{r['teacher_top1']:.4f}", f"{r['agreement']:.4f}",
         f"{r['generated_images']:,}", f"{r['views']:,}", f"{r['wall_s']:.0f}", f"{r['cpu_s']:.0f}"]
        for r in rows
    ]  # fmt: skip
    return _table(header, body, f"Last step, 10,000 real test images. {_where(rows)}.")


def _kd_loss(rows: list[Row]) -> str:
    arms = ["eager", "compile", "ours", "ours, one pass", "copy"]
    threads = rows[-1]["environment"]["threads"]
    rows = [r for r in rows if r.get("set", "allocated") == "allocated"
            and r.get("threads", threads) == threads]  # fmt: skip
    found = {(r["shape"], r["dtype"], r["arm"]): r for r in rows}
    body = []
    for shape, dtype in dict.fromkeys((r["shape"], r["dtype"]) for r in rows):
        cells = [f"{found[shape, dtype, arm]['median_ms']:.3f}" for arm in arms]
        gain = found[shape, dtype, "ours"]["times_faster_than_eager"]
        body.append([shape, dtype, *cells, f"{gain:.1f}x"])
    header = ["B x C", "dtype", "eager", "torch.compile", "`kd_loss`", "`kd_loss_and_grad`",
              "copy of the bytes", "`kd_loss` vs eager"]  # fmt: skip
    note = f"Loss and gradient, median ms of {rows[0]['n']}, interleaved. {_where(rows)}."
    return _table(header, body, note)


def _nearest(rows: list[Row]) -> str:
    header = ["images", "n", "min", "5 %", "median", "95 %"]
    body = [
        [r["images"], str(r["n"]), *(f"{r[k]:.3f}" for k in ("min", "p5", "median", "p95"))]
        for r in rows
    ]
    return _table(header, body, "RMS pixel distance in [0, 1] to the nearest training image.")


def _sampler(rows: list[Row]) -> str:
    arms = ["pipeline fp32", "pipeline half", "lean eager", "ours"]
    timed = [r for r in rows if r.get("arm") in arms and "steps" in r]
    found = {(r["model"], r["decoder"], r["steps"], r["arm"]): r for r in timed}
    body = []
    for key in dict.fromkeys((r["model"], r["decoder"], r["steps"]) for r in timed):
        per_s = [found[(*key, arm)]["images_per_s"] for arm in arms]
        ours = found[(*key, "ours")]
        body.append([
            key[0], key[1], str(key[2]), str(ours["batch"]), *(f"{x:.3g}" for x in per_s),
            f"{per_s[3] / per_s[0]:.1f}x / {per_s[3] / per_s[1]:.1f}x",
            f"{ours['share_of_ceiling']:.0%}",
        ])  # fmt: skip
    half = "fp16" if _is_gpu(rows[0]) else "bf16"
    header = ["model", "decoder", "steps", "batch", "diffusers fp32", f"diffusers {half}",
              "ours, not compiled", "ours", "gain", "of GEMM ceiling"]  # fmt: skip
    forward = [r for r in rows if r["model"] == "DiT-S/2 forward"]
    best = max(forward, key=lambda r: r["share_of_ceiling"])
    note = (
        f"Guided images/s, medians of {timed[0]['n']}, interleaved; gain over fp32 / {half}. "
        f"DiT-S/2 forward alone: {best['share_of_ceiling']:.0%} of the ceiling at batch "
        f"{best['batch']} (ceiling {best['ceiling_tflop_per_s']:.2f} TFLOP/s). {_where(rows)}."
    )
    return _table(header, body, note)


def _fidelity(rows: list[Row]) -> str:
    header = ["fidelity", "steps", "solver", "guidance", "forwards", "images/s",
              "Frechet distance", "student top-1"]  # fmt: skip
    body = [
        [r["fidelity"], str(r["num_steps"]), r["solver"], f"{r['guidance_scale']:g}",
         str(r["forwards_per_image"]), f"{r['images_per_s']:.0f}", f"{r['frechet']:.3f}",
         f"{r['top1']:.4f}"]
        for r in rows
    ]  # fmt: skip
    note = (
        f"{rows[0]['views']:,} views, {rows[0]['seeds']} seed(s); distance to real test images in "
        f"the strong teacher's features. {_where(rows)}."
    )
    return _table(header, body, note)


def _fewstep(rows: list[Row]) -> str:
    header = ["job", "seed", "top-1", "whole job, s", "CPU s", "s to the target", "target"]
    body = [
        [r["job"], str(r["seed"]), f"{r['top1']:.4f}", f"{r['wall_s']:.0f}", f"{r['cpu_s']:.0f}",
         "never" if r["s_to_target"] is None else f"{r['s_to_target']:.0f}", f"{r['target']:.4f}"]
        for r in rows
    ]  # fmt: skip
    return _table(header, body, f"Target: mean top-1 of the many-step job. {_where(rows)}.")


def _views(rows: list[Row]) -> str:
    arms = ["ours", "DALI", "torchvision", "eager", "copy"]
    found = {(r["case"], r["dtype"], r["arm"], r["set"]): r for r in rows}
    body = []
    for key in dict.fromkeys((r["case"], r["dtype"]) for r in rows):
        cells = [found.get((*key, arm, "fresh")) for arm in arms]
        gains = [r["ours_is_times_faster"] if r else None for r in cells[1:3]]
        reused = found[(*key, "ours", "reused")]["images_per_s"]
        body.append([
            *key, *(f"{r['images_per_s']:,}" if r else "" for r in cells), f"{reused:,}",
            " / ".join(f"{g:.1f}x" if g else "-" for g in gains),
        ])  # fmt: skip
    header = ["pixels", "dtype", "`Views`", "DALI, CPU", "torchvision per image", "eager",
              "strided copy", "`Views`, memory reused", "vs DALI / torchvision"]  # fmt: skip
    note = (
        f"Images/s at batch {rows[0]['batch']}, results allocated anew but for one column, medians "
        f"of {rows[0]['n']}, interleaved. {_where(rows)}."
    )
    return _table(header, body, note)


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
        f"loss {ms['loss']} ms. Medians of {steps['whole']['n']}, interleaved. {_where(rows)}."
    )
    return _table(["operation", *(f"{c:,} slots" for c in capacities)], body, note)


def _end_to_end(rows: list[Row]) -> str:
    header = ["way of working", "seed", "top-1", "images/s", "views/s", "generate s", "train s",
              "evaluate s", "whole, s", "CPU s", "disk MiB", "memory MiB", "s to target",
              "vs fp32 / bf16 baseline"]  # fmt: skip
    body = [
        [r["arm"], str(r["seed"]), f"{r['top1']:.4f}", f"{r['images_per_s']:.0f}",
         f"{r['views_per_s']:,.0f}", f"{r['generation_s']:.0f}", f"{r['training_s']:.0f}",
         f"{r['evaluation_s']:.0f}", f"{r['wall_s']:.0f}", f"{r['cpu_s']:.0f}",
         f"{r['disk_mib']:.0f}", f"{r['peak_memory_mib']:,}", _seconds(r["s_to_target"]),
         f"{_times(r['times_faster_than_fp32'])} / {_times(r['times_faster_than_bf16'])}"]
        for r in rows
    ]  # fmt: skip
    targets = ", ".join(f"{t:.4f}" for t in dict.fromkeys(r["target"] for r in rows))
    gaps = [r["resolution_s"] for r in rows]
    note = (
        f"{rows[0]['images']:,} images and {rows[0]['views']:,} views. Target "
        f"{targets}; evaluations are {min(gaps):.0f} to {max(gaps):.0f} s apart and count. Disk: "
        f"PNG files; of ours the run directory, checkpoints included. {_where(rows)}."
    )
    return _table(header, body, note)


def _ladder(rows: list[Row]) -> str:
    header = ["after", "this change", "seed", "top-1", "images/s", "views/s", "whole, s", "gain",
              "s to target", "seen in the run"]  # fmt: skip
    wall = {(r["arm"], r["seed"]): r["wall_s"] for r in rows}
    body = [
        [r["after"] or "-", r["arm"], str(r["seed"]), f"{r['top1']:.4f}",
         f"{r['images_per_s']:.0f}", f"{r['views_per_s']:,.0f}", f"{r['wall_s']:.0f}",
         f"{wall[r['after'], r['seed']] / r['wall_s']:.2f}x" if r["after"] else "-",
         _seconds(r["s_to_target"]), _seen(r["proof"])]
        for r in rows
    ]  # fmt: skip
    note = (
        "One change at a time; gain: seconds of the whole job before and after it. Images made "
        "alike were made once, and their time is part of each row. The compiled student is not "
        f"carried on: on a CPU `dmkd` does not compile it. {_where(rows)}."
    )
    return _table(header, body, note)


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x"


def _seen(proof: Row) -> str:
    """What a run was seen to do, in short."""
    parts = [proof["sampler"], proof["attention"], proof["sampler_dtype"]]
    parts.append(f"{proof['png_files']:,} PNG files" if proof["png_files"] else "ring")
    parts += [name.removeprefix("aten::") for name, calls in proof["ops"].items()
              if calls and "scalar" not in name]  # fmt: skip
    parts.append(f"{proof['teacher_batch_norms']} teacher norms")
    parts.append(f"{proof['page_faults_per_step']:,} page faults a step")
    return ", ".join([*parts, *(["compiled student"] if proof["compiled_graphs"] else [])])


def _kd_loss_gpu(rows: list[Row]) -> str:
    arms = list(dict.fromkeys(r["arm"] for r in rows if r["arm"] != "copy"))
    found = {(r["shape"], r["dtype"], r["arm"]): r for r in rows}
    body = []
    for shape, dtype in dict.fromkeys((r["shape"], r["dtype"]) for r in rows):
        cells = [found.get((shape, dtype, arm)) for arm in [*arms, "copy"]]
        body.append([
            shape, dtype,
            *(f"{r['us_per_step']:,.1f} ({r['share_of_copy']:.0%})" if r else "" for r in cells),
        ])  # fmt: skip
    note = (
        f"Loss and gradient, microseconds, and share of the copy's speed; medians of "
        f"{rows[0]['n']}, interleaved. {_where(rows)}."
    )
    return _table(["B x C", "dtype", *arms, "copy of the bytes"], body, note)


def _cuda_facts(rows: list[Row]) -> str:
    header = ["attention", "batch", "images/s", "host ms a batch", "waits", "allocations"]
    body = [
        [r["arm"], str(r["batch"]), f"{r['images_per_s']:.1f}", f"{r['host_ms_per_batch']:.2f}",
         str(r["syncs"]), str(r["allocations_per_batch"])]
        for r in rows
    ]  # fmt: skip
    note = f"DiT-XL/2, 256 x 256, latents only, {rows[0]['steps']} guided steps. {_where(rows)}."
    return _table(header, body, note)


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
    return _table(header, body, f"Random weights; `benchmarks/imagenet.py`. {_where(rows)}.")


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "cuda-facts-gpu": _cuda_facts,
    "embedded": _embedded,
    "end-to-end": _end_to_end,
    "fewstep": _fewstep,
    "fidelity": _fidelity,
    "imagenet-gpu": _imagenet,
    "kd-loss": _kd_loss,
    "ladder": _ladder,
    "kd-loss-gpu": _kd_loss_gpu,
    "nearest": _nearest,
    "ring": _ring,
    "ring-gpu": _ring,
    "sampler": _sampler,
    "sampler-gpu": _sampler,
    "views": _views,
    "views-gpu": _views,
}
