"""Knowledge distillation from diffusion-generated images.

    dmkd distill CONFIG                      run a whole job (shell command)
    from dmkd_fast import distill            run the same job from Python
    from dmkd_fast import kd_loss            use the fused loss in any training loop
    from dmkd_fast import Distiller, ...     use the parts with your own modules

Names are imported on first use, so `from dmkd_fast import kd_loss` needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmkd_fast.classifiers.ensemble import Teacher, Teachers
    from dmkd_fast.classifiers.loading import load_classifier, save_classifier
    from dmkd_fast.data.test_sets import EncodedSet, ImageSet, load_idx, open_set
    from dmkd_fast.denoisers.denoiser import Denoiser
    from dmkd_fast.denoisers.loading import load_denoiser
    from dmkd_fast.jobs.distill import distill
    from dmkd_fast.jobs.evaluate import evaluate
    from dmkd_fast.jobs.exchange.predict import predict
    from dmkd_fast.loader import GeneratedLoader
    from dmkd_fast.loss.functional import kd_loss, kd_loss_and_grad
    from dmkd_fast.loss.linear import linear_kd_loss
    from dmkd_fast.loss.module import DistillKL
    from dmkd_fast.loss.topk import kd_loss_topk
    from dmkd_fast.ring.buffer import RingBuffer
    from dmkd_fast.ring.plan import RingPlan
    from dmkd_fast.runtime.errors import UserError
    from dmkd_fast.sampling.arguments import Guidance, Steps
    from dmkd_fast.sampling.generated import GeneratedImages
    from dmkd_fast.sampling.hooks import Guide, Selection
    from dmkd_fast.sampling.labels import LabelStream
    from dmkd_fast.sampling.sampler import DiffusionSampler
    from dmkd_fast.training.distiller import Distiller
    from dmkd_fast.training.objective import Objective
    from dmkd_fast.training.schedule import Schedule
    from dmkd_fast.training.scoring import measure
    from dmkd_fast.training.student import StudentTrainer
    from dmkd_fast.training.targets import Targets
    from dmkd_fast.views.crops import Views, ViewSpec
    from dmkd_fast.views.mixing import Mixer
    from dmkd_fast.views.spec import InputSpec

__version__ = "0.1.0"

_HOMES = {
    "Denoiser": "denoisers.denoiser",
    "DiffusionSampler": "sampling.sampler",
    "DistillKL": "loss.module",
    "Distiller": "training.distiller",
    "EncodedSet": "data.test_sets",
    "Guidance": "sampling.arguments",
    "Guide": "sampling.hooks",
    "GeneratedImages": "sampling.generated",
    "GeneratedLoader": "loader",
    "ImageSet": "data.test_sets",
    "InputSpec": "views.spec",
    "LabelStream": "sampling.labels",
    "Mixer": "views.mixing",
    "Objective": "training.objective",
    "RingBuffer": "ring.buffer",
    "RingPlan": "ring.plan",
    "Schedule": "training.schedule",
    "Selection": "sampling.hooks",
    "Steps": "sampling.arguments",
    "StudentTrainer": "training.student",
    "Targets": "training.targets",
    "Teacher": "classifiers.ensemble",
    "Teachers": "classifiers.ensemble",
    "UserError": "runtime.errors",
    "ViewSpec": "views.crops",
    "Views": "views.crops",
    "distill": "jobs.distill",
    "evaluate": "jobs.evaluate",
    "kd_loss": "loss.functional",
    "kd_loss_and_grad": "loss.functional",
    "kd_loss_topk": "loss.topk",
    "linear_kd_loss": "loss.linear",
    "load_classifier": "classifiers.loading",
    "load_denoiser": "denoisers.loading",
    "load_idx": "data.test_sets",
    "measure": "training.scoring",
    "open_set": "data.test_sets",
    "predict": "jobs.exchange.predict",
    "save_classifier": "classifiers.loading",
}

__all__ = [
    "Denoiser",
    "DiffusionSampler",
    "DistillKL",
    "Distiller",
    "EncodedSet",
    "GeneratedImages",
    "GeneratedLoader",
    "Guidance",
    "Guide",
    "ImageSet",
    "InputSpec",
    "LabelStream",
    "Mixer",
    "Objective",
    "RingBuffer",
    "RingPlan",
    "Schedule",
    "Selection",
    "Steps",
    "StudentTrainer",
    "Targets",
    "Teacher",
    "Teachers",
    "UserError",
    "ViewSpec",
    "Views",
    "distill",
    "evaluate",
    "kd_loss",
    "kd_loss_and_grad",
    "kd_loss_topk",
    "linear_kd_loss",
    "load_classifier",
    "load_denoiser",
    "load_idx",
    "measure",
    "open_set",
    "predict",
    "save_classifier",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"dmkd_fast.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dmkd_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
