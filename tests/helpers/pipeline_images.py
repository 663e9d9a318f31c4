"""Make images of four prompts with a sampler and with a diffusers pipeline, and compare them."""

from __future__ import annotations

from typing import Any

import torch
from small_jobs import sampler_from
from text_encoders import PROMPTS
from torch import Tensor

from dmkd_fast import Denoiser
from dmkd_fast.rng import philox

LABELS = torch.tensor([2, 0, 3, 1])


def noise_of(step: int, shape: tuple[int, ...]) -> Tensor:
    count = shape[0] * shape[1] * shape[2]
    return philox.normal(0, torch.arange(4), step=step, count=count).view(4, *shape)


def images_of(loaded: Denoiser, micro_batch: int = 4, **settings: Any) -> Tensor:
    sampler = sampler_from(**(vars(loaded) | {"micro_batch_images": micro_batch} | settings))
    out = torch.empty(len(LABELS), *loaded.image_shape, dtype=torch.uint8)
    return sampler.sample(torch.arange(len(LABELS)), LABELS, out=out)


def same_pixels(got: Tensor, pipeline_images: Any, *, levels: int = 2) -> None:
    """At most `levels` apart; `pipeline_images` are (B, H, W, C) in [0, 1]."""
    expected = (torch.as_tensor(pipeline_images).permute(0, 3, 1, 2) * 255).round()
    difference = (got.float() - expected).abs()
    assert expected.std() > 10  # pictures of nothing would prove nothing
    assert difference.max() <= levels and (difference > 0).float().mean() < 5e-3


def run(pipeline: Any, **arguments: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    prompts = [PROMPTS[label] for label in LABELS]
    return pipeline(prompts, output_type="np", **arguments).images
