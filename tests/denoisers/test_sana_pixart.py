"""PixArt and Sana against their diffusers pipelines, at the same noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_scm
from pipeline_images import LABELS, images_of, noise_of, run, same_pixels
from text_models import PROMPTS, pixart, sana

from dmkd_fast import Steps, load_denoiser
from dmkd_fast.sampling.solvers import solver_table

pytestmark = pytest.mark.slow  # run by .ci/run

CPU = torch.device("cpu")
DPM: dict[str, Any] = {"solver_order": 2}
FLOW: dict[str, Any] = {
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "prediction_type": "flow_prediction",
}
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
    pipeline = sana(tmp_path, dpm(**FLOW), sample_size=16)
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
        scheduler = dpm(**(FLOW | {"flow_shift": shift}))
        scheduler.set_timesteps(num_steps)
        table = solver_table(
            dict(scheduler.config) | {"_class_name": "DPMSolverMultistepScheduler"},
            Steps(count=num_steps),
            CPU,
        )
        assert torch.equal(table.column("timestep"), scheduler.timesteps.float())
        torch.testing.assert_close(-table.column("out"), scheduler.sigmas[:-1])


BUILD: dict[str, Callable[[Path], Any]] = {
    "pixart": lambda path: pixart(path, dpm()),
    "sana": lambda path: sana(path, dpm(**FLOW)),
    "sprint": lambda path: sana(path, diffusers.SCMScheduler(), sprint=True),
}


@pytest.mark.parametrize("kind", BUILD)
def test_images_depend_on_no_other_and_classes_can_be_chosen(tmp_path: Path, kind: str) -> None:
    BUILD[kind](tmp_path)
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS)
    whole = images_of(loaded, count=2, scale=2.0)
    parts = images_of(loaded, micro_batch=8, count=2, scale=2.0)
    assert (whole.int() - parts.int()).abs().max() <= 1
    mapped = loaded.restricted((2, 0, 3, 1))
    turned = load_denoiser(tmp_path, CPU, prompts=[PROMPTS[c] for c in (2, 0, 3, 1)])
    got, expected = (images_of(model, count=2, scale=2.0) for model in (mapped, turned))
    assert (got.int() - expected.int()).abs().max() <= 1
    assert len(LABELS) == len(PROMPTS)


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


@pytest.mark.parametrize("kind", BUILD)
def test_a_forward_pass_is_one_graph_on_one_device(tmp_path: Path, kind: str) -> None:
    """On CUDA, the sampler compiles a step as one graph and captures it."""
    BUILD[kind](tmp_path)
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=24)
    inputs = [torch.randn(4, *loaded.latent_shape), torch.full((4,), 500.0), LABELS]
    inputs += [torch.full((4,), 3.5)] * loaded.takes_guidance
    graph = torch.compile(loaded.module, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(graph(*inputs), loaded.module(*inputs), rtol=1e-4, atol=1e-4)
        made = loaded.module.to("meta")(*(value.to("meta") for value in inputs))
    assert made.device.type == "meta"


def spoil(folder: Path, part: str, **values: Any) -> None:
    path = folder / part
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("kind", "how", "words"),
    [
        ("sana", "scheduler", "a Sana with 'SCMScheduler', expected DPMSolverMultistepScheduler"),
        ("sprint", "no encoder", "text_encoder/ or tokenizer/"),
        ("sana", "width", "embeddings of width 16, expected 24, as transformer/ takes"),
        ("sana", "vae", r"latent channels, expected the denoiser's 8"),
        ("pixart", "depth", "missing keys such as"),
        ("pixart", "vae class", "expected one of AutoencoderKL, AutoencoderTiny, AutoencoderDC"),
    ],
)
def test_wrong_folders_are_refused_in_one_line(
    tmp_path: Path, kind: str, how: str, words: str
) -> None:
    BUILD[kind](tmp_path)
    if how == "scheduler":
        diffusers.SCMScheduler().save_pretrained(tmp_path / "scheduler")
    elif how == "no encoder":
        shutil.rmtree(tmp_path / "text_encoder")
    elif how == "width":
        spoil(tmp_path, "transformer/config.json", caption_channels=24)
    elif how == "vae":
        spoil(tmp_path, "vae/config.json", latent_channels=4)
    elif how == "depth":
        spoil(tmp_path, "transformer/config.json", num_layers=3)
    else:
        spoil(tmp_path, "vae/config.json", _class_name="VQModel")
    with pytest.raises(ValueError, match=words) as error:
        load_denoiser(tmp_path, CPU, prompts=PROMPTS)
    assert "\n" not in str(error.value)
