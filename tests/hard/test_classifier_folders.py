"""Damaged classifier folders: each loads, or is one line."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dmkd_fast.classifiers.loading import (
    build_classifier,
    classifier_license,
    load_classifier,
    save_classifier,
)
from dmkd_fast.classifiers.spec import MODEL_ARGS, ClassifierSpec

pytestmark = pytest.mark.hard
CPU = torch.device("cpu")
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    10**6,
    10**9,
    2**63,
    10**400,
    0.0,
    -0.5,
    1e-300,
    1e30,
    float("nan"),
    float("inf"),
    "",
    "a",
    "0",
    "10",
    "../../etc/passwd",
    "/etc/passwd",
    "x" * 5000,
    "\ud800",
    "\x00",
    "resnet18",
    "lenet5",
    "avg",
    "gelu",
    [],
    [1],
    ["a"],
    [[1]],
    [None],
    [3, 8, 8],
    [3, 2**40, 8],
    [0.5, 0.5, 0.5],
    {},
    {"a": 1},
    {"input_size": [3, 8, 8]},
    [[]] * 50,
]
SMALL = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}


def specs() -> list[ClassifierSpec]:
    """One network of each library, small."""
    base: dict[str, Any] = {
        "num_classes": 3,
        "in_chans": 3,
        "input_size": 32,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    vit = {"embed_dim": 12, "depth": 1, "num_heads": 2, "img_size": 32, "patch_size": 8}
    return [
        ClassifierSpec(architecture="resnet18", model_args=SMALL, stem="conv3", **base),
        ClassifierSpec(architecture="vit_tiny_patch16_224", model_args=vit, **base),
        ClassifierSpec(architecture="lenet5", **base),
        ClassifierSpec(architecture="torchvision:squeezenet1_1", **base),
    ]


def places(values: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    found: list[tuple[Any, Any]] = []
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        found.append((values, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


def mutated(values: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """One to three changes: another value, a field less, a field more."""
    values = copy.deepcopy(values)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        options = places(values)
        if not options:
            break
        container, key = chance.choice(options)
        kind = chance.random()
        if kind < 0.65:
            container[key] = copy.deepcopy(chance.choice(VALUES))
        elif kind < 0.8:
            del container[key]
        else:
            target = chance.choice([values, values.get("model_args"), values.get("pretrained_cfg")])
            names = [
                *MODEL_ARGS,
                "checkpoint_path",
                "crop_mode",
                "test_input_size",
                "label_names",
                "labels",
                "base",
                "stem",
                "license",
                "in_chans",
                "num_classes",
            ]
            if isinstance(target, dict):
                target[chance.choice(names)] = copy.deepcopy(chance.choice(VALUES))
    return values


def outcome(call: Callable[[], object]) -> str:
    """Empty if the call gives something or one line of ValueError; else what is wrong with it."""
    try:
        call()
    except ValueError as error:
        wrong = len(str(error).splitlines()) != 1
        return f"{type(error).__name__}: {error}" if wrong else ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def folders(root: Path) -> list[Path]:
    made = []
    for number, spec in enumerate(specs()):
        (root / str(number)).mkdir()
        save_classifier(build_classifier(spec), spec, root / str(number))
        made.append(root / str(number))
    return made


def test_a_changed_config_loads_or_is_one_line(
    num_cases: Callable[[int, int], int],
    record_property: Callable[[str, Any], None],
    tmp_path: Path,
) -> None:
    count, chance, failed, loaded = num_cases(3000, 400), random.Random(1), [], 0
    made = folders(tmp_path)
    originals = [json.loads((folder / "config.json").read_text()) for folder in made]
    for case in range(count):
        folder, original = made[case % len(made)], originals[case % len(made)]
        values = mutated(original, chance)
        text = json.dumps(values)
        if chance.random() < 0.1:  # not even JSON
            text = text[: chance.randrange(len(text))]
        (folder / "config.json").write_text(text)

        def load(folder: Path = folder) -> None:
            nonlocal loaded
            load_classifier(folder, CPU)
            classifier_license(folder)
            loaded += 1

        if wrong := outcome(load):
            failed.append(f"case {case}: {text[:600]}: {wrong}")
    record_property("claim", "a changed config.json loads or is one line")
    record_property("cases", count)
    record_property("failures", len(failed))
    assert not failed, failed[0]
    assert count / 50 < loaded < count / 2


def test_changed_weights_load_or_are_one_line(
    num_cases: Callable[[int, int], int],
    record_property: Callable[[str, Any], None],
    tmp_path: Path,
) -> None:
    """Header fields, flipped bytes, and files cut or prolonged."""
    count, chance, failed = num_cases(3000, 400), random.Random(2), []
    made = folders(tmp_path)
    originals = [(folder / "model.safetensors").read_bytes() for folder in made]
    for case in range(count):
        folder, data = made[case % len(made)], bytearray(originals[case % len(made)])
        length = int.from_bytes(data[:8], "little")
        kind = chance.random()
        if kind < 0.5:
            header = json.loads(data[8 : 8 + length])
            container, key = chance.choice(places(header))
            if chance.random() < 0.8:
                dtypes = ["F32", "I8", "I64", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "X", "F64"]
                container[key] = chance.choice([*VALUES, *dtypes])
            else:
                del container[key]
            text = json.dumps(header).encode()
            data = bytearray(len(text).to_bytes(8, "little") + text + data[8 + length :])
        elif kind < 0.8:
            for _ in range(chance.choice([1, 4, 64])):
                data[chance.randrange(min(len(data), 8 + length))] = chance.randrange(256)
        elif kind < 0.9:
            del data[chance.randrange(len(data)) :]
        else:
            data += bytes(chance.randrange(1, 99))
        (folder / "model.safetensors").write_bytes(data)
        if wrong := outcome(lambda folder=folder: load_classifier(folder, CPU)):
            failed.append(f"case {case}: {wrong}")
    record_property("claim", "a changed model.safetensors loads or is one line")
    record_property("cases", count)
    record_property("failures", len(failed))
    assert not failed, failed[:3]
