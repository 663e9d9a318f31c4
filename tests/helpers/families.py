"""A small random model of each family of denoisers, with what its tests need to know.

To add a family, add a line to `FAMILIES`: a function that saves a model of 16-pixel color images in
a folder, and the facts of a `Family`. All tests of families then run with it.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from small_models import class_unet_folder, dit_folder, gm_dit_folder, sit_folder
from text_encoders import PROMPTS
from text_models import flux, pixart, sana, sd3, sdxl, stable_diffusion

from dmkd_fast import Denoiser, load_denoiser


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a small model is saved and loaded, and which settings it takes."""

    build: Callable[[Path], Any]
    """Saves the model in a folder; returns its pipeline if diffusers has one."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of `load_denoiser`, which are settings of `denoiser` as well."""
    count: int = 2
    """Number of steps of its images in tests."""
    scale: float = 2.0
    """Guidance scale of its images in tests; 1 for a model that cannot be guided."""
    own: tuple[int, float] | None = None
    """Steps and scale of a few-step model, which its files tell."""

    @property
    def has_prompts(self) -> bool:
        """Whether its classes are prompts."""
        return "prompts" in self.settings


TEXT: dict[str, Any] = {"prompts": PROMPTS}
SIZED = TEXT | {"image_size": 16}
DYNAMIC: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 4,
    "max_image_seq_len": 64,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
SDXL_BASE: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
SDXL_TURBO = SDXL_BASE | {"timestep_spacing": "trailing"}
SANA_FLOW: dict[str, Any] = {
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "prediction_type": "flow_prediction",
}
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
DPM = diffusers.DPMSolverMultistepScheduler
UNET = {"sample_size": 16, "num_class_embeds": 11}

FAMILIES: dict[str, Family] = {
    "DiT": Family(build=dit_folder),
    "class UNet": Family(
        build=lambda path: class_unet_folder(path, diffusers.DDPMScheduler(), **UNET),
        settings={"null_class": 10},
    ),
    "consistency": Family(
        build=lambda path: class_unet_folder(
            path, diffusers.CMStochasticIterativeScheduler(), sample_size=16
        ),
        scale=1.0,
    ),
    "SiT": Family(build=sit_folder),
    "pi-Flow": Family(build=gm_dit_folder, count=1, scale=1.0, own=(1, 1.0)),
    "Stable Diffusion": Family(
        build=lambda path: stable_diffusion(path, diffusers.DDIMScheduler(clip_sample=False)),
        settings=TEXT,
    ),
    "SDXL": Family(
        build=lambda path: sdxl(path, diffusers.EulerDiscreteScheduler(**SDXL_BASE)), settings=TEXT
    ),
    "SDXL-Turbo": Family(
        build=lambda path: sdxl(path, diffusers.EulerAncestralDiscreteScheduler(**SDXL_TURBO)),
        settings=TEXT,
        own=(4, 1.0),
    ),
    "Stable Diffusion 3": Family(build=lambda path: sd3(path, FLOW(shift=3.0)), settings=TEXT),
    "FLUX.1 schnell": Family(
        build=lambda path: flux(path, FLOW(), guidance_embeds=False),
        settings=SIZED,
        scale=1.0,
        own=(4, 1.0),
    ),
    "FLUX.1 dev": Family(
        build=lambda path: flux(path, FLOW(**DYNAMIC), guidance_embeds=True), settings=SIZED
    ),
    "PixArt": Family(build=lambda path: pixart(path, DPM()), settings=TEXT),
    "Sana": Family(build=lambda path: sana(path, DPM(**SANA_FLOW)), settings=TEXT),
    "Sana-Sprint": Family(
        build=lambda path: sana(path, diffusers.SCMScheduler(), sprint=True), settings=TEXT
    ),
}


@functools.cache
def folder_of(name: str) -> Path:
    """Save the model of a family once a process; a test that changes files needs a copy."""
    folder = Path(tempfile.mkdtemp(prefix="family-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    FAMILIES[name].build(folder / "model")
    return folder / "model"


def copy_of(name: str, folder: Path) -> Path:
    """Return a copy of the model of a family in `folder`, whose files a test may change."""
    return Path(shutil.copytree(folder_of(name), folder / "model"))


def load(name: str, folder: Path | None = None) -> Denoiser:
    """Load the model of a family."""
    where = folder_of(name) if folder is None else folder
    return load_denoiser(where, torch.device("cpu"), **FAMILIES[name].settings)
