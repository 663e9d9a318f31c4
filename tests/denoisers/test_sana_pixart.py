"""PixArt and Sana against their diffusers pipelines, at the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_scm
from families import SANA_FLOW
from pipeline_images import images_of, noise_of, run, same_pixels
from text_encoders import PROMPTS
from text_models import pixart, sana

from dmkd_fast import Steps, load_denoiser
from dmkd_fast.sampling.solvers import solver_table

pytestmark = pytest.mark.slow  # run by .ci/run

CPU = torch.device("cpu")
DPM: dict[str, Any] = {"solver_order": 2}
# These are told the size of the image, by embeddings of a third of the width each.
TOLD: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 16,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
}
PLAIN: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False}


def dpm(**settings: Any) -> Any:
    return diffusers.DPMSolverMultistepScheduler(**(DPM | settings))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("PixArtAlphaPipeline", {}),
        pytest.param("PixArtAlphaPipeline", TOLD, marks=pytest.mark.slow),
        ("PixArtSigmaPipeline", {"use_additional_conditions": False}),
    ],
    ids=["alpha", "alpha 1024", "sigma"],
)
@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_pixart(tmp_path: Path, name: str, changes: dict[str, Any], scale: float) -> None:
    pipeline = pixart(tmp_path, dpm(), name=name, **changes)
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS)
    side = changes.get("sample_size", 8)
    assert (loaded.latent_shape, loaded.image_shape) == ((4, side, side), (3, 2 * side, 2 * side))
    got = images_of(loaded, count=3, scale=scale)
    latents = noise_of(0, loaded.latent_shape)
    settings = PLAIN | {"guidance_scale": scale, "num_inference_steps": 3, "latents": latents}
    same_pixels(got, run(pipeline, **settings))


@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize("num_steps", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_sana(tmp_path: Path, scale: float, num_steps: int) -> None:
    pipeline = sana(tmp_path, dpm(**SANA_FLOW), sample_size=16)
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS)
    assert (loaded.latent_shape, loaded.image_shape) == ((8, 16, 16), (3, 32, 32))
    got = images_of(loaded, count=num_steps, scale=scale)
    settings = {
        "guidance_scale": scale,
        "num_inference_steps": num_steps,
        "latents": noise_of(0, (8, 16, 16)),
        "height": 32,
        "width": 32,
    }
    same_pixels(got, run(pipeline, **(PLAIN | settings)))


@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize("num_steps", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_sana_sprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float, num_steps: int
) -> None:
    pipeline = sana(tmp_path, diffusers.SCMScheduler(), sprint=True, sample_size=16)
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS)
    assert loaded.takes_guidance and loaded.null_class is None
    got = images_of(loaded, count=num_steps, scale=scale)
    drawn = (noise_of(step, (8, 16, 16)) for step in range(1, 9))
    monkeypatch.setattr(scheduling_scm, "randn_tensor", lambda *_, **__: next(drawn))
    settings = {
        "guidance_scale": scale,
        "num_inference_steps": num_steps,
        "intermediate_timesteps": 1.3 if num_steps == 2 else None,
        "latents": noise_of(0, (8, 16, 16)),
        "height": 32,
        "width": 32,
    }
    same_pixels(got, run(pipeline, **(PLAIN | settings)))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_of_flow_models_with_a_dpm_scheduler(shift: float) -> None:
    """Timesteps, too, which diffusers cuts to whole numbers."""
    for num_steps in (1, 3, 14, 20, 37):
        scheduler = dpm(**(SANA_FLOW | {"flow_shift": shift}))
        scheduler.set_timesteps(num_steps)
        table = solver_table(
            dict(scheduler.config) | {"_class_name": "DPMSolverMultistepScheduler"},
            Steps(count=num_steps),
            CPU,
        )
        assert torch.equal(table.column("timestep"), scheduler.timesteps.float())
        torch.testing.assert_close(-table.column("out"), scheduler.sigmas[:-1])


def test_another_size_than_the_configs(tmp_path: Path) -> None:
    pipeline = pixart(tmp_path, dpm())
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=24)
    assert (loaded.latent_shape, loaded.image_shape) == ((4, 12, 12), (3, 24, 24))
    got = images_of(loaded, count=2, scale=2.0)
    settings = {
        "guidance_scale": 2.0,
        "num_inference_steps": 2,
        "latents": noise_of(0, (4, 12, 12)),
    }
    same_pixels(got, run(pipeline, height=24, width=24, **(PLAIN | settings)))
