"""Facts of the loss's builds for one GPU, and the share of a copy's speed that they predict.

After a deliberate change of the kernels or of the prediction, write the golden file again with

    python tests/helpers/aot_predicted.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import aot

from benchmarks.loss import predicted

CASES = [(90, classes, dtype, "one_pass") for classes, dtype in predicted.CASES]


def facts(case: tuple[int, int, str, str]) -> dict[str, Any]:
    """Return what a build takes of an SM, and its instructions per thread and pass over a row."""
    architecture, *rest = case
    launch = aot.plan(*rest)
    found = aot.inspect(launch, architecture)
    _, code = aot.machine_code(launch, architecture)
    names = executed(code)
    tile = launch.constants.get("ROWS", 1) * launch.constants["BLOCK"]
    return {
        "registers": found["registers"],
        "shared": found["shared"],
        "warps": found["warps"],
        "logits": tile,
        "instructions": len(names),
        "special": names.count("MUFU"),
        "is_long": launch.kernel is aot.triton_long.two_pass,
    }


def executed(code: str) -> list[str]:
    """Return the instructions of all loops; of code without a loop, those before the ticket.

    What follows the ticket is run by the last program alone, and what is outside of the loops once
    in a row. The loop over partial sums follows the ticket.
    """
    names: list[str] = []
    labels: dict[str, int] = {}
    inside: set[int] = set()
    for line in code.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        found = re.match(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(.*)", line)
        if not found:
            continue
        if found[1].startswith("ATOM"):
            break
        target = re.search(r"\.L_x_\d+", found[2])
        if found[1] == "BRA" and target and target[0] in labels:
            inside.update(range(labels[target[0]], len(names) + 1))
        names.append(found[1])
    return [name for k, name in enumerate(names) if not inside or k in inside]


def main() -> None:
    found = {}
    for case in CASES:
        build = facts(case)
        key = predicted.key(case[1], case[2])
        found[key] = {"build": build, **predicted.predict(case[1], case[2], build)}
    aot.write(predicted.GOLDEN, found)


if __name__ == "__main__":
    main()
