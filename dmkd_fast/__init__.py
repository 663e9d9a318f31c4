"""Knowledge distillation from diffusion-generated images.

    dmkd distill CONFIG                      the whole job
    from dmkd_fast import kd_loss            the fused loss for any training loop
    from dmkd_fast import Distiller, ...     the parts, with your own modules

Names are imported on first use, so `from dmkd_fast import kd_loss` needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmkd_fast.denoisers import load_denoiser
    from dmkd_fast.distill import Distiller
    from dmkd_fast.evaluate import measure
    from dmkd_fast.image_sets import EncodedSet, ImageSet, load_idx, open_set
    from dmkd_fast.inputs import InputSpec
    from dmkd_fast.labels import LabelStream
    from dmkd_fast.mix import Mixer
    from dmkd_fast.models import load_classifier, save_classifier
    from dmkd_fast.ops.kd_loss import DistillKL, kd_loss, kd_loss_and_grad
    from dmkd_fast.ring_buffer import RingBuffer
    from dmkd_fast.sampler import DiffusionSampler
    from dmkd_fast.schedule import Schedule
    from dmkd_fast.teachers import Teacher, Teachers
    from dmkd_fast.views import Views, ViewSpec

__version__ = "0.1.0"

_HOMES = {
    "DiffusionSampler": "sampler",
    "DistillKL": "ops.kd_loss",
    "Distiller": "distill",
    "EncodedSet": "image_sets",
    "ImageSet": "image_sets",
    "InputSpec": "inputs",
    "LabelStream": "labels",
    "Mixer": "mix",
    "RingBuffer": "ring_buffer",
    "Schedule": "schedule",
    "Teacher": "teachers",
    "Teachers": "teachers",
    "ViewSpec": "views",
    "Views": "views",
    "kd_loss": "ops.kd_loss",
    "kd_loss_and_grad": "ops.kd_loss",
    "load_classifier": "models",
    "load_denoiser": "denoisers",
    "load_idx": "image_sets",
    "measure": "evaluate",
    "open_set": "image_sets",
    "save_classifier": "models",
}

__all__ = [
    "DiffusionSampler",
    "DistillKL",
    "Distiller",
    "EncodedSet",
    "ImageSet",
    "InputSpec",
    "LabelStream",
    "Mixer",
    "RingBuffer",
    "Schedule",
    "Teacher",
    "Teachers",
    "ViewSpec",
    "Views",
    "kd_loss",
    "kd_loss_and_grad",
    "load_classifier",
    "load_denoiser",
    "load_idx",
    "measure",
    "open_set",
    "save_classifier",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"dmkd_fast.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dmkd_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
