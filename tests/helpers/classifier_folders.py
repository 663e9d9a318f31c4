"""Build small classifier folders and change their files."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dmkd_fast.classifiers.loading import build_classifier, save_classifier
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.runtime.errors import UserError

CPU = torch.device("cpu")
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}


def spec(architecture: str = "cifar_resnet8", **changes: Any) -> ClassifierSpec:
    base: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": 4,
        "in_chans": 3,
        "input_size": 32,
        "mean": (0.5, 0.5, 0.4),
        "std": (0.3, 0.3, 0.3),
    }
    return ClassifierSpec(**(base | changes))


def saved(folder: Path, changes: dict[str, Any] | None = None, **fields: Any) -> Path:
    """Save a small ResNet with `save_classifier`, then change its config.json."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    made = spec("resnet18", model_args=RESNET, **fields)
    save_classifier(build_classifier(made), made, folder)
    edit(folder, changes or {})
    return folder


def edit(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split(".")
        place = values
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(values))


def trap(path: Path, canary: Path) -> Path:
    """Write a pickle that creates the folder `canary` when it is loaded."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(canary),)

    path.write_bytes(pickle.dumps(Trap()))
    return path


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert type(error.value) is UserError and "\n" not in str(error.value)
    return str(error.value)
