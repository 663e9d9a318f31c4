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


LOSS_TABLES: dict[str, Callable[[list[Row]], str]] = {
    "kd-loss": kd_loss,
    "kd-loss-gpu": kd_loss_gpu,
}
