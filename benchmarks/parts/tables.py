"""Tables of the parts of a job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.markdown import is_gpu, table, where

COMPILED = "pipeline half compiled"
"""Arm of `sampler` that is timed on a CPU alone."""

Row = dict[str, Any]


def sampler(rows: list[Row]) -> str:
    """Write the table of sampling speeds."""
    arms = ["pipeline fp32", "pipeline half", COMPILED, "lean eager", "ours"]
    arms = [arm for arm in arms if any(r.get("arm") == arm for r in rows)]
    timed = [r for r in rows if r.get("arm") in arms and "steps" in r]
    found = {(r["model"], r["decoder"], r["steps"], r["arm"]): r for r in timed}
    body = []
    for key in dict.fromkeys((r["model"], r["decoder"], r["steps"]) for r in timed):
        per_s = {arm: found[(*key, arm)]["images_per_s"] for arm in arms}
        ours, half = found[(*key, "ours")], per_s["pipeline half"]
        body.append(
            [
                key[0],
                key[1],
                str(key[2]),
                str(ours["batch"]),
                *(f"{x:.3g}" for x in per_s.values()),
                f"{per_s['lean eager'] / half:.1f}x",
                *([f"{per_s['ours'] / per_s[COMPILED]:.1f}x"] if COMPILED in arms else []),
                f"{ours['share_of_ceiling']:.0%}",
            ]
        )
    half = "fp16" if is_gpu(rows[0]) else "bf16"
    header = [
        "model",
        "decoder",
        "steps",
        "batch",
        "diffusers fp32",
        f"diffusers {half}",
        *([f"diffusers {half}, compiled"] if COMPILED in arms else []),
        "ours, not compiled",
        "ours, compiled",
        "not compiled: gain",
        *(["compiled: gain"] if COMPILED in arms else []),
        "of GEMM ceiling",
    ]
    forward = [r for r in rows if r["model"] == "DiT-S/2 forward"]
    best = max(forward, key=lambda r: r["share_of_ceiling"])
    note = (
        f"Guided images/s, medians of {timed[0]['n']}, interleaved; gain over diffusers {half}. "
        "Compilation is not timed. "
        f"DiT-S/2 forward alone: {best['share_of_ceiling']:.0%} of the ceiling at batch "
        f"{best['batch']} (ceiling {best['ceiling_tflop_per_s']:.2f} TFLOP/s). {where(rows)}."
    )
    return table(header, body, note)


def views(rows: list[Row]) -> str:
    """Write the table of views per second."""
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


def ring(rows: list[Row]) -> str:
    """Write the table of what the ring costs."""
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


def cuda_facts(rows: list[Row]) -> str:
    """Write the table of the sampler on a GPU."""
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


def fp8_emulation(rows: list[Row]) -> str:
    """Write the table of emulated products in 8 bits."""
    header = [
        "job",
        "Frechet distance: float32",
        "bf16",
        "fp8",
        "levels from bf16: float32",
        "fp8",
        "student top-1: bf16",
        "fp8",
    ]
    body = []
    for row in rows:
        figures = [f"{row[f'frechet_{arm}']:.4f}" for arm in ("float32", "bf16", "fp8")]
        figures += [f"{row[f'levels_{arm}']:.3f}" for arm in ("float32", "fp8")]
        students = [row.get(f"top1_{arm}") for arm in ("bf16", "fp8")]
        figures += ["not run" if top1 is None else f"{top1:.4f}" for top1 in students]
        body.append([row["job"], *figures])
    note = (
        f"{rows[0]['images']:,} images per cell; distance to real test images in the strong "
        f"teacher's features; levels: mean absolute difference, of 255. {where(rows)}."
    )
    return table(header, body, note)


PART_TABLES: dict[str, Callable[[list[Row]], str]] = {
    "cuda-facts-gpu": cuda_facts,
    "fp8-emulation": fp8_emulation,
    "ring": ring,
    "ring-gpu": ring,
    "sampler": sampler,
    "sampler-gpu": sampler,
    "views": views,
    "views-gpu": views,
}
