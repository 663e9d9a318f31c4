"""Build samplers that several tests share."""

from __future__ import annotations

from typing import Any

import torch
from small_jobs import sampler_from
from small_models import small_dit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dmkd_fast import DiffusionSampler, load_denoiser
from dmkd_fast.assets import resolve
from dmkd_fast.denoisers.dit import LeanDiT, lean_dit

DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False}


def dit_sampler(**changes: Any) -> DiffusionSampler:
    """Build a sampler of a small DiT on 4 x 8 x 8 latents, with learned variances.

    The DiT has 1000 classes and a null class.
    """
    lean = lean_dit(small_dit())
    assert lean is not None
    settings: dict[str, Any] = {
        "module": lean,
        "scheduler": DDIM,
        "latent_shape": (4, 8, 8),
        "num_classes": 1000,
        "null_class": 1000,
        "count": 4,
        "scale": 2.0,
        "micro_batch_images": 4,
    } | changes
    return sampler_from(**settings)


def embedded(**changes: Any) -> DiffusionSampler:
    loaded = load_denoiser(resolve("embedded:fashion_mnist/denoiser"), torch.device("cpu"))
    assert isinstance(loaded.module, LeanDiT)
    loaded.module.attention = "short"
    settings: dict[str, Any] = {
        **vars(loaded),
        "count": 2,
        "scale": 1.5,
        "micro_batch_images": 8,
        "solver": "dpm++2m",
    } | changes
    return sampler_from(**settings)


def make(sampler: DiffusionSampler, ids: Tensor, classes: int) -> Tensor:
    out = torch.empty(len(ids), *sampler.denoiser.image_shape, dtype=torch.uint8)
    return sampler.sample(ids, ids % classes, out=out)


class Counts(TorchDispatchMode):
    """Records ATen calls; with `ban`, calls that wait for the device raise an error."""

    def __init__(self, *, ban: bool = False) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.ban = ban

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.calls.append(name)
        if self.ban and any(word in name for word in ("_local_scalar_dense", "nonzero", "item")):
            raise AssertionError(f"{name} waits for the device")
        result = func(*args, **(kwargs or {}))
        if self.ban and isinstance(result, Tensor) and result.device.type == "cpu":
            inputs = [a for a in args if isinstance(a, Tensor)]
            if any(a.device.type == "cuda" for a in inputs):
                raise AssertionError(f"{name} copies to the CPU")
        return result
