"""Any value of any key in the JSON files of a denoiser folder: loaded, or one ValueError line."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, folder_of

from dmkd_fast import DiffusionSampler, Steps, load_denoiser

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    10**9,
    10**400,
    1.5,
    -0.5,
    1e30,
    float("nan"),
    float("inf"),
    "",
    "a",
    "4",
    "../x",
    [],
    [1],
    [1, 2, 3],
    ["a"],
    [None],
    {},
    {"a": 1},
    [[]],
    [10**9],
    [2.0, 2.0],
]
FILES = ("config.json", "scheduler_config.json", "model_index.json")
CPU = torch.device("cpu")


def mutate(config: Any, pick: random.Random) -> str:
    """Change, add or remove one value; returns what was done."""
    keys = [k for k in config if not k.startswith("_") or k == "_class_name"]
    key, value = pick.choice(keys), pick.choice(VALUES)
    what = pick.random()
    if what < 0.1:
        del config[key]
        return f"without {key}"
    if what < 0.25 and isinstance(config[key], list) and config[key]:
        config[key] = [*config[key]]
        config[key][pick.randrange(len(config[key]))] = value
        return f"one of {key} = {value!r:.40}"
    config[key] = value
    return f"{key} = {value!r:.40}"


def use(folder: Path, arguments: dict[str, Any]) -> None:
    """Load a denoiser and make one micro-batch."""
    loaded = load_denoiser(folder, CPU, **arguments)
    sampler = DiffusionSampler(loaded, Steps(count=2), micro_batch_images=4)
    if max(loaded.image_shape) <= 64:
        ids = torch.zeros(4, dtype=torch.int64)
        sampler.sample(ids, ids, out=torch.empty(4, *loaded.image_shape, dtype=torch.uint8))


@pytest.mark.hard
@pytest.mark.filterwarnings("ignore")
def test_every_mutation_loads_or_is_one_line(
    tmp_path: Path, num_cases: Callable[[int, int], int], record_property: Any
) -> None:
    families = {
        name: family.settings
        for name, family in FAMILIES.items()
        if name not in ("SDXL-Turbo", "FLUX.1 schnell")
    }
    for name in families:
        shutil.copytree(folder_of(name), tmp_path / name)
    pick, cases = random.Random(0), num_cases(300, 40)
    failures = []
    for case in range(cases):
        name = pick.choice(list(families))
        path = pick.choice(
            [p for p in sorted((tmp_path / name).rglob("*.json")) if p.name in FILES]
        )
        original = path.read_text()
        config = json.loads(original)
        done = mutate(config, pick)
        if pick.random() < 0.03:
            config, done = pick.choice(VALUES), "another top level"
        path.write_text(json.dumps(config))
        try:
            use(tmp_path / name, families[name])
        except ValueError as error:
            if "\n" in str(error) or not str(error):
                failures.append(f"{case}: {path.relative_to(tmp_path)}: {done}: {error}")
        except Exception as error:
            failures.append(
                f"{case}: {path.relative_to(tmp_path)}: {done}: {type(error).__name__}: {error}"
            )
        finally:
            path.write_text(original)
    shutil.rmtree(tmp_path)
    record_property("claim", "JSON of a denoiser folder: loads or one line")
    record_property("cases", cases)
    record_property("failures", len(failures))
    print("\n".join(failures))
    assert not failures
