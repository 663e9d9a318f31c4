"""Predict how fast the loss runs on a GPU, from its ahead-of-time builds.

No GPU is asked. The facts of a build (registers, shared memory, instructions) are counted in the
machine code for sm_90; the rates of the GPU below are a data sheet's or assumed. The result is the
share of a copy's speed by row length, and the goal that `kd_loss_gpu` sets is below it.

Loss and gradient read both logits and write the gradient: 3 values a logit. Rows that do not fit
into registers are read in two sweeps. What the second sweep reads comes from the L2 cache, if the
rows that all programs work on at a time fit into it.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.harness import ROOT

GOLDEN = ROOT / "tests" / "golden" / "kd_loss_predicted.json"
LENGTHS = (100, 1000, 21841, 32000, 128256)
BYTES = {"float32": 4, "bfloat16": 2}
CASES = [(classes, dtype) for classes in LENGTHS for dtype in BYTES]

# An H100 SXM. Clock, registers and SMs are the data sheet's.
SMS, REGISTERS, SHARED, WARPS, CLOCK_GHZ = 132, 65536, 227 * 1024, 64, 1.755
SPECIAL_PER_CLOCK = 16  # exponentials and the like, per SM
WARPS_PER_CLOCK = 4  # instructions that an SM issues, each for the 32 threads of a warp
GB_PER_S, COPY = 3350.0, 0.92  # a copy reaches this part of it
# Assumed: part of the L2 cache that rows may fill, its speed, time until a read arrives, and
# issued instructions per clock in a kernel with reductions, as a part of the most.
L2_BYTES, L2_GB_PER_S, LATENCY_NS, ISSUE = 0.6 * 50e6, 5500.0, 700.0, 0.7
MARGIN = 0.9  # part of the prediction that is the goal


def key(classes: int, dtype: str) -> str:
    """Return the name of a case in the golden file."""
    return f"C={classes} {dtype}"


def predict(classes: int, dtype: str, build: dict[str, Any]) -> dict[str, Any]:
    """Predict the speed of the one-pass loss of many rows.

    Args:
        classes: Length of a row.
        dtype: Dtype of the logits.
        build: Facts of the build, as `tests/helpers/aot_predicted.py` counts them.

    Returns:
        bytes_per_logit (from memory), blocks_per_sm, occupancy, what bounds the speed, and
        share_of_copy.
    """
    size, warps, logits = BYTES[dtype], build["warps"], build["logits"]
    by_registers = REGISTERS // (32 * warps * -(-build["registers"] // 8) * 8)
    blocks = min(by_registers, WARPS // warps, SHARED // max(1, build["shared"]))
    hit = 0.0
    if build["is_long"]:
        hit = min(1.0, L2_BYTES / (blocks * SMS * 2 * classes * size))
    from_memory = size * (3 + (2 * (1 - hit) if build["is_long"] else 0))
    # Nanoseconds per logit on one SM, were it bound by one thing alone. Padding works as well.
    padded = 1.0
    if not build["is_long"]:
        padded = logits / (classes * max(1, logits // _padded(classes)))
    per_ns = GB_PER_S * COPY / SMS
    issued = build["instructions"] * warps / (WARPS_PER_CLOCK * ISSUE * CLOCK_GHZ) / logits
    special = build["special"] * warps * 32 / (SPECIAL_PER_CLOCK * CLOCK_GHZ) / logits
    sweeps = 2 if build["is_long"] else 1
    times = {
        "memory": from_memory / per_ns,
        "L2": size * 2 * hit * build["is_long"] * SMS / L2_GB_PER_S + from_memory / per_ns,
        "instructions": padded * issued,
        "exponentials": padded * special,
        "latency": sweeps * padded * (LATENCY_NS / logits) / blocks + issued / blocks,
    }
    bound = max(times, key=lambda name: times[name])
    return {
        "bytes_per_logit": round(from_memory, 2),
        "blocks_per_sm": blocks,
        "occupancy": round(blocks * warps / WARPS, 3),
        "bound": bound,
        "share_of_copy": round(3 * size / per_ns / times[bound], 2),
    }


def goal(classes: int, dtype: str) -> float | None:
    """Return the share of a copy's speed to reach; None for a length without a prediction."""
    found = json.loads(GOLDEN.read_text(encoding="utf-8")).get(key(classes, dtype))
    return None if found is None else round(MARGIN * found["share_of_copy"], 2)


def table() -> str:
    """Write the prediction as a table."""
    found = json.loads(GOLDEN.read_text(encoding="utf-8"))
    lines = [
        "| classes | dtype | bytes a logit, from memory | programs an SM | occupancy | bound by | "
        "share of a copy's speed, predicted | goal |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for classes, dtype in CASES:
        row = found[key(classes, dtype)]
        lines.append(
            f"| {classes:,} | {dtype} | {row['bytes_per_logit']:.1f} | {row['blocks_per_sm']} | "
            f"{row['occupancy']:.0%} | {row['bound']} | {row['share_of_copy']:.0%} | "
            f"{goal(classes, dtype):.0%} |"
        )
    return "\n".join(lines)


def _padded(classes: int) -> int:
    """Return the columns that a tile has for a row."""
    return max(16, 1 << (classes - 1).bit_length())
