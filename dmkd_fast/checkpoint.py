"""Saves and restores any objects that have `state_dict` and `load_state_dict`.

Stands on floor 2. A checkpoint is a folder `step-N` with `state.safetensors` and `state.json`
(everything that is not a tensor, and the SHA-256 of the tensors). It is written under another
name, flushed to disk and renamed, so a crash leaves the old one or the new one, never a mix.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, REST = "state.safetensors", "state.json"


class Stateful(Protocol):
    """What can be saved."""

    def state_dict(self) -> dict[str, Any]:
        """Everything the object needs to go on."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Inverse of `state_dict`."""
        ...


def save(folder: Path, step: int, objects: Mapping[str, Stateful], *, keep: int = 2) -> Path:
    """Write checkpoint `folder/step-N` and delete all but the newest `keep`.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step-{step:09d}"
    if final.exists():
        return final
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    rest = {name: _split(item.state_dict(), name, tensors) for name, item in objects.items()}
    save_file(tensors, partial / TENSORS)
    record = {"sha256": _sha256(partial / TENSORS), "step": step, "objects": rest}
    (partial / REST).write_text(json.dumps(record), encoding="utf-8")
    for path in (partial / TENSORS, partial / REST, partial):
        _flush(path)
    os.rename(partial, final)
    _flush(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def restore(folder: Path, objects: Mapping[str, Stateful]) -> int:
    """Load the newest checkpoint of `folder` into `objects`.

    Returns:
        Its step.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    found = sorted(folder.glob("step-*"))
    if not found:
        raise ValueError(f"{folder}: got no checkpoint, expected step-N folders; start a new run")
    newest = found[-1]
    try:
        record = json.loads((newest / REST).read_text(encoding="utf-8"))
        intact = record["sha256"] == _sha256(newest / TENSORS)
        tensors = load_file(newest / TENSORS) if intact else {}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoint {newest}: damaged ({error}); delete that folder") from None
    if not intact:
        raise ValueError(f"checkpoint {newest}: damaged (wrong SHA-256); delete that folder")
    for name, item in objects.items():
        item.load_state_dict(_join(record["objects"][name], tensors))
    return int(record["step"])


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with each tensor moved to `tensors` and each dictionary turned into pairs."""
    if isinstance(value, Tensor):
        # Files hold dense tensors only, but fused optimizers walk a parameter and its moments in
        # memory order: a moment that came back in another layout would be applied scrambled.
        channels_last = value.ndim == 4 and not value.is_contiguous()
        tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": path, "channels_last": channels_last}
    if isinstance(value, Mapping):
        return {"pairs": [[k, _split(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_split(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    return value


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of `_split`; tuples come back as lists."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        if value["channels_last"]:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor
    if "pairs" in value:
        return {k: _join(v, tensors) for k, v in value["pairs"]}
    return [_join(v, tensors) for v in value["list"]]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
