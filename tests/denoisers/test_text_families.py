"""Every family of text-to-image models against its diffusers pipeline, at the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from families import DYNAMIC, SDXL_BASE, SDXL_TURBO, load
from pipeline_images import images_of, noise_of, run, same_pixels
from small_jobs import sampler_from
from text_encoders import PROMPTS
from text_models import flux, packed, sd3, sdxl

from dmkd_fast import load_denoiser
from dmkd_fast.runtime.errors import UserError

pytestmark = pytest.mark.slow  # run by .ci/run

CPU = torch.device("cpu")


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "empty prompt"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_sdxl(tmp_path: Path, scale: float, zeros: bool) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**SDXL_BASE)
    pipeline = sdxl(tmp_path, scheduler, force_zeros_for_empty_prompt=zeros)
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS)
    got = images_of(loaded, count=5, scale=scale)
    latents = noise_of(0, (4, 8, 8))
    same_pixels(got, run(pipeline, guidance_scale=scale, num_inference_steps=5, latents=latents))


@pytest.mark.parametrize(("num_steps", "scale"), [(1, 1.0), (4, 1.0), (3, 2.5)])
def test_sdxl_turbo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int, scale: float
) -> None:
    pipeline = sdxl(tmp_path, diffusers.EulerAncestralDiscreteScheduler(**SDXL_TURBO))
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS)
    got = images_of(loaded, count=num_steps, scale=scale)
    drawn = (noise_of(step, (4, 8, 8)) for step in range(1, 9))
    monkeypatch.setattr(
        scheduling_euler_ancestral_discrete, "randn_tensor", lambda *_, **__: next(drawn)
    )
    same_pixels(
        got,
        run(
            pipeline,
            guidance_scale=scale,
            num_inference_steps=num_steps,
            latents=noise_of(0, (4, 8, 8)),
        ),
    )


def test_sdxl_is_told_another_size(tmp_path: Path) -> None:
    pipeline = sdxl(tmp_path, diffusers.EulerDiscreteScheduler(**SDXL_BASE))
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=24)
    assert (loaded.latent_shape, loaded.image_shape) == ((4, 12, 12), (3, 24, 24))
    got = images_of(loaded, count=3, scale=2.0)
    latents = noise_of(0, (4, 12, 12))
    same_pixels(
        got,
        run(
            pipeline,
            guidance_scale=2.0,
            num_inference_steps=3,
            latents=latents,
            height=24,
            width=24,
        ),
    )
    with pytest.raises(UserError, match="image_size: got 25, expected a multiple of 2"):
        load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=25)


@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize(
    ("shift", "changes"),
    [({"shift": 3.0}, {}), (DYNAMIC, {"qk_norm": "rms_norm", "dual_attention_layers": (0,)})],
    ids=["3", "3.5"],
)
def test_sd3(tmp_path: Path, shift: dict[str, Any], changes: dict[str, Any], scale: float) -> None:
    pipeline = sd3(tmp_path, diffusers.FlowMatchEulerDiscreteScheduler(**shift), **changes)
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS)
    got = images_of(loaded, count=5, scale=scale)
    latents = noise_of(0, (16, 8, 8))
    same_pixels(got, run(pipeline, guidance_scale=scale, num_inference_steps=5, latents=latents))


def test_sd3_without_t5(tmp_path: Path) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = sd3(tmp_path, scheduler, with_t5=False)
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=24)
    got = images_of(loaded, count=3, scale=4.5)
    latents = noise_of(0, (16, 12, 12))
    same_pixels(
        got,
        run(
            pipeline,
            guidance_scale=4.5,
            num_inference_steps=3,
            latents=latents,
            height=24,
            width=24,
        ),
    )


@pytest.mark.parametrize(
    ("guidance_embeds", "shift", "scale", "num_steps"),
    [
        (False, {"shift": 1.0}, 1.0, 4),
        (False, {"shift": 1.0}, 1.0, 1),
        (True, DYNAMIC, 3.5, 5),
        (True, DYNAMIC | {"time_shift_type": "linear"}, 1.0, 3),
    ],
    ids=["schnell", "schnell, one step", "dev", "linear shift"],
)
def test_flux(
    tmp_path: Path, guidance_embeds: bool, shift: dict[str, Any], scale: float, num_steps: int
) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**shift)
    pipeline = flux(tmp_path, scheduler, guidance_embeds=guidance_embeds)
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=16)
    assert loaded.takes_guidance == guidance_embeds
    got = images_of(loaded, count=num_steps, scale=scale)
    same_pixels(
        got,
        run(
            pipeline,
            guidance_scale=scale,
            num_inference_steps=num_steps,
            latents=packed(noise_of(0, (16, 8, 8))),
            height=16,
            width=16,
            max_sequence_length=512 if guidance_embeds else 256,
        ),
    )


def test_flux_makes_images_of_128_latents_by_default(tmp_path: Path) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    flux(tmp_path, scheduler, guidance_embeds=False)
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS)
    assert (loaded.latent_shape, loaded.image_shape) == ((16, 128, 128), (3, 256, 256))
    with pytest.raises(UserError, match="without a null class"):
        sampler_from(**vars(loaded), scale=2.0)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("SDXL", (50, 5.0)),
        ("Stable Diffusion 3", (28, 7.0)),
        ("FLUX.1 dev", (28, 3.5)),
        ("SDXL-Turbo", (4, 1.0)),
        ("FLUX.1 schnell", (4, 1.0)),
        ("Stable Diffusion", (50, 7.5)),
        ("PixArt", (20, 4.5)),
        ("Sana", (20, 4.5)),
        ("Sana-Sprint", (2, 4.5)),
    ],
)
def test_steps_and_guidance_are_those_of_the_model(name: str, own: tuple[int, float]) -> None:
    loaded = load(name)
    assert (loaded.own_steps, loaded.own_guidance_scale) == own
