"""Denoisers, steps and guidance are checked when they are made, and against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_jobs import TinyDenoiser, tiny_sampler
from torch import nn

from dmkd_fast import Denoiser, DiffusionSampler, Guidance, Steps
from dmkd_fast.jobs.pretrain.denoiser import FLOW

PLAIN: dict[str, Any] = {"module": TinyDenoiser(), "scheduler": FLOW, "latent_shape": (1, 8, 8)}


def test_three_facts_describe_a_pixel_model_of_your_own() -> None:
    denoiser = Denoiser(**PLAIN)
    assert (denoiser.image_shape, denoiser.num_classes) == ((1, 8, 8), 1)
    sampler = DiffusionSampler(denoiser)
    assert (sampler.steps, sampler.guidance) == (Steps(), Guidance())
    ids, out = torch.arange(4), torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    assert sampler.sample(ids, torch.zeros_like(ids), out=out).float().std() > 1
    with pytest.raises(ValueError, match="labels: got 3, expected 0 to 0"):
        sampler.sample(ids, ids, out=out)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"module": len}, "module: got builtin_function_or_method, expected Module"),
        ({"scheduler": "FLOW"}, "scheduler: got str, expected dict"),
        ({"latent_shape": (1, 8)}, "latent_shape: got"),
        ({"latent_shape": (1, 2**19, 2**19)}, "latent_shape: got .* at most 268,435,456"),
        ({"image_shape": (3, 16, 16)}, "image_shape: got .* without a decoder"),
        ({"image_shape": (0, 16, 16), "decoder": nn.Identity()}, "image_shape: got 0"),
        ({"num_classes": 0}, "num_classes: got 0"),
        ({"null_class": -1}, "null_class: got -1"),
        ({"class_map": (3, 4)}, "class_map: got 2 entries, expected .* num_classes=1"),
        ({"class_map": (-3,)}, "class_map: got -3"),
        ({"class_map": ("a",)}, "class_map: got 'a'"),
    ],
)
def test_wrong_facts_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        Denoiser(**(PLAIN | changes))


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (Steps, {"count": 0}, "steps.count: got 0"),
        (Steps, {"solver": "heun"}, "steps.solver: got 'heun', expected one of auto, ddpm"),
        (Guidance, {"scale": -1.0}, "guidance.scale: got -1.0"),
        (Guidance, {"scale": float("nan")}, "guidance.scale: got nan"),
        (Guidance, {"by_class": [2.0]}, "guidance.by_class: got list"),
        (Guidance, {"by_class": {-1: 2.0}}, "guidance.by_class: got -1"),
        (Guidance, {"by_class": {1: "a"}}, "guidance.by_class: got 'a'"),
        (Guidance, {"interval": 0.5}, "guidance.interval: got 0.5, expected two numbers"),
        (Guidance, {"interval": (0.5, 0.2)}, "guidance.interval: .* start < stop"),
        (Guidance, {"channels": 0}, "guidance.channels: got 0"),
    ],
)
def test_wrong_steps_and_guidance_are_refused(
    kind: Any, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        kind(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"by_class": {4: 2.0}}, "guidance.by_class: got class 4, expected 0 to 3"),
        ({"null_class": None}, "guidance.scale: got 2.0 for a model without a null class"),
        (
            {"null_class": None, "scale": 1.0, "by_class": {0: 1.0, 1: 3.0}},
            "guidance.by_class: got 3.0 for a model without a null class",
        ),
        ({"count": 1001}, "steps.count: got 1001, expected 1 to 1000"),
        ({"solver": "ddim"}, "steps.solver: got 'ddim' for a model with FlowMatchEuler"),
        ({"dtype": torch.int64}, "dtype: got torch.int64"),
        ({"seed": -1}, "seed: got -1"),
        ({"micro_batch_images": 0}, "micro_batch_images: got 0"),
    ],
)
def test_what_a_model_does_not_support_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_sampler(**changes)


def test_a_scale_by_class_is_no_whole_number_beside_a_whole_one() -> None:
    ids = torch.arange(16)
    got = tiny_sampler(scale=2, by_class={1: 1.5}).trajectory(ids, ids % 4)
    expected = tiny_sampler(scale=1.5).trajectory(ids, ids % 4)
    assert torch.equal(got[:, 1::4], expected[:, 1::4])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 1, 8)])
def test_images_of_another_shape_than_stated_are_refused(shape: tuple[int, int, int]) -> None:
    sampler = tiny_sampler(decoder=nn.Conv2d(1, 3, 3, padding=1), image_shape=shape)
    ids = torch.arange(4)
    with pytest.raises(ValueError, match=r"denoiser.image_shape: got .*, expected \(3, 8, 8\)"):
        sampler.sample(ids, ids, out=torch.zeros(4, *shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="out: got"):
        sampler.sample(ids, ids, out=torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
