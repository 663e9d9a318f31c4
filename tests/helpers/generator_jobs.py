"""Short jobs with the small models of `families`: a teacher of four classes, a few real images."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from classifier_folders import saved
from families import FAMILIES
from real_sets import picture

JOB: dict[str, Any] = {
    "name": "tiny",
    "num_threads": 1,
    "dtype": "float32",
    "sampler": {"num_steps": 2, "guidance_scale": 2, "micro_batch_images": 8, "compile": False},
    "ring": {"capacity_images": 32, "min_fill_images": 16, "samples_per_insert": 4},
    "views": {"size": 16, "pad": 1},
    "student": {"arch": "cifar_resnet8"},
    "optim": {"name": "adamw", "lr": 1.0e-3},
    "train": {"batch_size": 8, "num_views": 128, "compile": False, "log_every_steps": 4},
}


@functools.cache
def shared_parts() -> Path:
    """Save a teacher of four classes and eight test images once a process."""
    root = Path(tempfile.mkdtemp(prefix="generator-job-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for label in range(4):
        folder = root / "test" / f"class {label}"
        folder.mkdir(parents=True)
        for number in range(2):
            picture(2 * label + number, 16, 16).save(folder / f"{number}.png")
    saved(root / "teacher", input_size=16)
    return root


def config_of(name: str, model: Path, folder: Path, **denoiser: Any) -> Path:
    """Write the config of a job with the model of a family to `folder`.

    Args:
        name: Name of the family.
        model: Path of its model.
        folder: Folder for the config.
        denoiser: Settings of `denoiser` to change.
    """
    root, family, values = shared_parts(), FAMILIES[name], json.loads(json.dumps(JOB))
    values["teacher"] = {"path": str(root / "teacher")}
    values["eval"] = {"path": str(root / "test"), "num_points": 1}
    values["denoiser"] = {"path": str(model)} | family.settings
    if not family.has_prompts:
        values["denoiser"]["class_map"] = [3, 1, 4, 2]
    values["denoiser"] |= denoiser
    own: dict[str, Any] = {"num_steps": family.count, "guidance_scale": family.scale}
    if family.own is not None:
        own = dict.fromkeys(own, "auto")
    values["sampler"] |= own
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
