"""Format rendered tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(header: Sequence[str], body: Sequence[Sequence[str]], note: str) -> str:
    """Format a table with a note below it."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{note}\n"


def where(rows: Sequence[dict[str, Any]]) -> str:
    """Return the machine, number of threads, version of PyTorch and dates of rows."""
    stamps = [row["environment"] for row in rows]
    parts = {
        "{}": [stamp["device"] for stamp in stamps],
        "{} threads": [stamp["threads"] for stamp in stamps],
        "torch {}": [stamp["torch"] for stamp in stamps],
        "on {}": [stamp["date"] for stamp in stamps],
    }
    return ", ".join(
        form.format(" and ".join(str(value) for value in dict.fromkeys(found)))
        for form, found in parts.items()
    )


def is_gpu(row: dict[str, Any]) -> bool:
    """Return whether a row was measured on a GPU."""
    return not row["environment"]["device"].startswith("CPU ")
