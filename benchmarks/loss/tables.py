"""Tables of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.markdown import table, where

Row = dict[str, Any]


def kd_loss(rows: list[Row]) -> str:
    """Write the table of loss and gradient on a CPU."""
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
        times = {arm: found[shape, dtype, arm]["median_ms"] for arm in ("ours", "compile")}
        gain = found[shape, dtype, "ours"]["times_faster_than_eager"]
        compiled = times["compile"] / times["ours"]
        body.append([shape, dtype, *cells, f"{compiled:.1f}x", f"{gain:.1f}x"])
    header = [
        "B x C",
        "dtype",
        "eager",
        "torch.compile",
        "`kd_loss`",
        "`kd_loss_and_grad`",
        "copy of the bytes",
        "`kd_loss` vs compile",
        "`kd_loss` vs eager",
    ]
    counts = " to ".join(str(n) for n in sorted({r["n"] for r in rows}))
    note = (
        f"Loss and gradient, median ms of {counts}, interleaved. The times include allocating the "
        "outputs. Above 32 MiB, most systems map new memory at each call, which takes much of the "
        f"time. {where(rows)}."
    )
    return table(header, body, note)


def kd_loss_family(rows: list[Row]) -> str:
    """Write the table of the divergences beside forward KL and their eager definitions."""
    rows = [r for r in rows if r["threads"] == rows[-1]["threads"]]
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    found = {(r["arm"], r["shape"]): r for r in rows}
    body, header = [], ["divergence"]
    for shape in shapes:
        header += [f"{shape}, ms", "in units of forward KL", "vs eager"]
    for arm in dict.fromkeys(r["arm"] for r in rows):
        cells = [found[arm, shape] for shape in shapes]
        name = "forward_kl, standardized" if arm == "standardized" else arm
        body.append([f"`{name}`"])
        for r in cells:
            times, gain = r["times_forward_kl"], r["times_faster_than_eager"]
            body[-1] += [f"{r['median_ms']:.2f}", f"{times:.2f}", f"{gain:.1f}x"]
    counts = " to ".join(str(n) for n in sorted({r["n"] for r in rows}))
    note = (
        f"`kd_loss` and its backward pass in float32, medians of {counts}. Ours take turns, and "
        f"then the eager ones do: the textbook form of the same divergence with autograd. "
        f"{where(rows)}."
    )
    return table(header, body, note)


def kd_loss_linear(rows: list[Row]) -> str:
    """Write the table of two linear heads and the loss between them."""
    body = []
    notes = [f"{r['arm'].removeprefix('linear, ')}: {r['note']}." for r in rows if "note" in r]
    rows = [r for r in rows if "note" not in r]
    for r in rows:
        name = r["arm"].removeprefix("linear, ").replace("ours", "`linear_kd_loss`")
        share = f"{r['share_of_eagers_peak']:.0%}"
        body.append([name, f"{r['median_ms'] / 1e3:.2f}", f"{r['peak_mib']:,.0f}", share])
    count, width, classes = (f"{int(n):,}" for n in rows[-1]["shape"].split("x"))
    note = (
        f"{count} rows, hidden width {width}, {classes} classes, float32: loss and gradients of "
        f"the student's hidden states and weight. Memory beyond the inputs. {' '.join(notes)} "
        f"{where(rows)}."
    )
    return table(["arm", "s", "peak memory, MiB", "of eager's"], body, note)


def kd_loss_gpu(rows: list[Row]) -> str:
    """Write the table of loss and gradient on a GPU."""
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


def kd_loss_accuracy(rows: list[Row]) -> str:
    """Write the table of errors against float64."""
    found = {(r["temperature"], r["noise"], r["dtype"], r["arm"]): r for r in rows}
    body = []
    for case in dict.fromkeys((r["temperature"], r["noise"]) for r in rows):
        full = [found[*case, "float32", arm] for arm in ("eager", "kd_loss")]
        half = [
            found[*case, "bfloat16", arm] for arm in ("eager", "autocast", "kd_loss", "rounded")
        ]
        body.append(
            [
                f"{case[0]:g}, {case[1]:g}",
                " / ".join(f"{r['loss_error']:.1e}" for r in full),
                " / ".join(f"{r['gradient_error']:.1e}" for r in full),
                " / ".join(f"{r['gradient_error']:.2%}" for r in half),
            ]
        )
    header = [
        "T, noise",
        "fp32 loss: eager / ours",
        "fp32 gradient: eager / ours",
        "bf16 gradient: eager / autocast / ours / rounded",
    ]
    return table(header, body, f"Relative errors, one draw of logits a row. {where(rows)}.")


LOSS_TABLES: dict[str, Callable[[list[Row]], str]] = {
    "kd-loss": kd_loss,
    "kd-loss-accuracy": kd_loss_accuracy,
    "kd-loss-family": kd_loss_family,
    "kd-loss-gpu": kd_loss_gpu,
    "kd-loss-linear": kd_loss_linear,
}
