"""Digests of all state of a run, and its statistics without times."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from dmkd_fast import Distiller

# State that depends on durations or on places on the disk.
APART = {"clock", "metrics/written", "ring/digests"}


def fingerprint(distiller: Distiller) -> dict[str, str]:
    """Hash every leaf of the state that a checkpoint holds, and the images in the ring."""
    found: dict[str, str] = {}
    for name, item in distiller._state().items():
        _walk(name, item.state_dict(), found)
    # Only slots that can be drawn, since the others are uninitialized memory.
    _walk("images", distiller.ring.images[: distiller.ring.num_filled], found)
    distiller.checkpoints.writer.close()
    return found


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of stats.jsonl without the values that depend on the clock."""
    lines = (run_dir / "stats.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("_s")} for line in lines]


def _walk(name: str, value: Any, found: dict[str, str]) -> None:
    if name in APART:
        return
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        layout = f"{value.dtype} {tuple(value.shape)} {value.stride()}"
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found[name] = hashlib.sha256(layout.encode() + data).hexdigest()
    elif isinstance(value, dict):
        for key, item in value.items():
            _walk(f"{name}/{key}", item, found)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _walk(f"{name}/{index}", item, found)
    else:
        found[name] = repr(value)
