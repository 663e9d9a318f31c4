"""`dmkd generate` and `dmkd distill`, end to end, with a tiny random model of each family.

To add a family, add a line to `GENERATORS`: a function that saves a model of 16-pixel color images
to a folder, and the changes of the config that it needs. Class-conditional models need a
`denoiser.class_map` of four classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from classifier_folders import saved
from real_sets import picture
from small_models import dit_folder, gm_dit_folder, sit_folder, stable_diffusion
from text_models import PROMPTS, flux, pixart, sana, sd3, sdxl

from dmkd_fast import cli
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.jobs import memory
from dmkd_fast.jobs.build import make_sampler
from dmkd_fast.jobs.parts import prepare

pytestmark = pytest.mark.slow
TEXT = {"denoiser.prompts": PROMPTS}
OWN_STEPS = {"sampler.num_steps": "auto", "sampler.guidance_scale": "auto"}
FLOW = {"shift": 3.0}
GENERATORS: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "DiT": (dit_folder, {"denoiser.class_map": [3, 1, 4, 2]}),
    "Stable Diffusion": (lambda path: stable_diffusion(path, diffusers.DDIMScheduler()), TEXT),
    "SDXL": (lambda path: sdxl(path, diffusers.EulerDiscreteScheduler()), TEXT),
    "SDXL-Turbo": (
        lambda path: sdxl(
            path, diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
        ),
        TEXT | OWN_STEPS,
    ),
    "Stable Diffusion 3": (
        lambda path: sd3(path, diffusers.FlowMatchEulerDiscreteScheduler(**FLOW)),
        TEXT,
    ),
    "FLUX.1 schnell": (
        lambda path: flux(path, diffusers.FlowMatchEulerDiscreteScheduler(), guidance_embeds=False),
        TEXT | OWN_STEPS | {"denoiser.image_size": 16},
    ),
    "FLUX.1 dev": (
        lambda path: flux(
            path,
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            guidance_embeds=True,
        ),
        TEXT | {"denoiser.image_size": 16},
    ),
}
SANA = diffusers.DPMSolverMultistepScheduler(
    use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
)
GENERATORS |= {
    "pi-Flow": (gm_dit_folder, OWN_STEPS | {"denoiser.class_map": [3, 1, 4, 2]}),
    "SiT": (sit_folder, {"denoiser.class_map": [3, 1, 4, 2]}),
    "PixArt": (lambda path: pixart(path, diffusers.DPMSolverMultistepScheduler()), TEXT),
    "Sana": (lambda path: sana(path, SANA), TEXT),
    "Sana-Sprint": (lambda path: sana(path, diffusers.SCMScheduler(), sprint=True), TEXT),
}
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


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A job with a teacher of four classes and a few real images to test on."""
    root = tmp_path_factory.mktemp("job")
    for label in range(4):
        folder = root / "test" / f"class {label}"
        folder.mkdir(parents=True)
        for number in range(2):
            picture(2 * label + number, 16, 16).save(folder / f"{number}.png")
    teacher = saved(root / "teacher", input_size=16)
    paths = {
        "teacher": {"path": str(teacher)},
        "eval": {"path": str(root / "test"), "num_points": 1},
    }
    return JOB | paths


def config_of(folder: Path, job: dict[str, Any], changes: dict[str, Any]) -> Path:
    values = json.loads(json.dumps(job | {"denoiser": {"path": str(folder / "model")}}))
    for name, value in changes.items():
        section, _, key = name.partition(".")
        values[section][key] = value
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("name", GENERATORS)
def test_a_family_generates_and_teaches(
    tmp_path: Path, job: dict[str, Any], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    build, changes = GENERATORS[name]
    build(tmp_path / "model")
    config = config_of(tmp_path, job, changes)
    resolved, parts = prepare(load_config(DistillConfig, config))
    denoiser = parts.origin
    assert isinstance(denoiser, Denoiser) and denoiser.image_shape == (3, 16, 16)
    if "sampler.num_steps" in changes:  # all were distilled to a few steps without guidance
        own = (1 if name == "pi-Flow" else 4), 1
        assert (resolved.config.sampler.num_steps, resolved.config.sampler.guidance_scale) == own
    plan = memory.plan(resolved, parts)
    modules = [module for module in (denoiser.module, denoiser.decoder) if module is not None]
    assert plan["denoiser"] == 4 * sum(p.numel() for m in modules for p in m.parameters())
    if "denoiser.prompts" in changes:
        rows = len(denoiser.module.prompts)
        assert rows == len(PROMPTS) + (denoiser.null_class is not None)
        assert plan["prompts"] >= 4 * denoiser.module.prompts.numel()

    out, run = tmp_path / "images", tmp_path / "run"
    command = ["generate", str(config), "--out", str(out), "--num-images", "16", "--quiet"]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_images"] == 16
    assert cli.main(["distill", str(config), f"run_dir={run}", "--quiet"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= summary["top1"] <= 1


def test_each_image_has_a_prompt_of_its_class_in_the_manifest(
    tmp_path: Path, job: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    stable_diffusion(tmp_path / "model", diffusers.DDIMScheduler())
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class {label}\n" for label in range(4)))
    changes = {
        "denoiser.prompts": ["a {name}, {style}"],
        "denoiser.prompt_attributes": {"style": ["red", "blue", "green"]},
        "eval.classes": str(names),
    }
    config = config_of(tmp_path, job, changes)
    for part in ("0/2", "1/2"):
        command = ["generate", str(config), "--out", str(tmp_path / "images"), "--quiet"]
        command += ["--num-images", "32", "--images-per-shard", "16", "--shard", part]
        assert cli.main(command) == 0
    rows = pq.read_table(tmp_path / "images" / "manifest").to_pylist()
    resolved, parts = prepare(load_config(DistillConfig, config))
    assert isinstance(parts.origin, Denoiser)
    sampler = make_sampler(resolved, parts.origin)
    own = sampler.own_indices(torch.arange(32), torch.tensor([row["class"] for row in rows]))
    assert [row["prompt"] for row in rows] == [parts.origin.prompts[i] for i in own.tolist()]
    assert all(row["prompt"].startswith(f"a class {row['class']}, ") for row in rows)
    assert len({row["prompt"] for row in rows}) > 6
