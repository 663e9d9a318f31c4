"""`dmkd pretrain fewstep` for models trained with DDPM's noise levels: DiTs, latents and UNets."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_models import class_unet_folder, dit_folder, small_dit

from dmkd_fast import cli
from dmkd_fast.config.jobs import PretrainFewstepConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.loading import load_denoiser
from dmkd_fast.denoisers.trainable import save_denoiser
from dmkd_fast.jobs.pretrain import loop
from dmkd_fast.jobs.pretrain.fewstep import Pool, _few_steps
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.sampling.arguments import Steps
from dmkd_fast.sampling.sampler import DiffusionSampler
from dmkd_fast.training.ema import WeightEMA

CPU = torch.device("cpu")
# Weak noise: random networks, which predict no noise, would blow up states at the usual levels.
LEVELS: dict[str, Any] = {"num_train_timesteps": 100, "beta_end": 0.05, "clip_sample": False}


def start(kind: str, folder: Path) -> dict[str, Any]:
    """Save a small random model, and return the section `denoiser` that loads it."""
    if kind == "pixels":
        dit = small_dit(in_channels=1, out_channels=1, patch_size=4, num_embeds_ada_norm=3)
        save_denoiser(dit, {"_class_name": "DDPMScheduler", **LEVELS}, folder)
    elif kind == "latents":
        scheduler = diffusers.PNDMScheduler(
            num_train_timesteps=100, beta_end=0.05, prediction_type="v_prediction"
        )
        dit_folder(folder, scheduler=scheduler, num_layers=1, num_embeds_ada_norm=3)
    else:
        scheduler = diffusers.DDIMScheduler(**LEVELS, timestep_spacing="leading", steps_offset=1)
        class_unet_folder(folder, scheduler, num_class_embeds=4, block_out_channels=(8, 16))
        return {"path": str(folder), "null_class": 3}
    return {"path": str(folder)}


def config_of(folder: Path, denoiser: dict[str, Any], **train: Any) -> str:
    settings = {
        "name": "few",
        "num_threads": 1,
        "dtype": "float32",
        "denoiser": denoiser,
        "sampler": {
            "num_steps": 4,
            "solver": "dpm++2m",
            "guidance_scale": 1.5,
            "micro_batch_images": 64,
            "compile": False,
        },
        "num_steps": 2,
        "pool_images": 64,
        "optim": {"name": "adamw", "lr": 5e-3, "ema_decay": 0.9},
        "train": {"batch_size": 32, "num_views": 256, "compile": False} | train,
    }
    path = folder / "few.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def fewstep(*arguments: str) -> int:
    return cli.main(["pretrain", "fewstep", *arguments, "--quiet"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (folder / "model").glob("*[te]/diffusion_pytorch_model.safetensors")
    return load_file(path)


def theirs(loaded: Denoiser, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Last state of the loop that diffusers' scheduler makes of the saved file."""
    scheduler: Any = diffusers.DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(2)
    x = DiffusionSampler(loaded, Steps(count=2), seed=3).trajectory(ids, ids % 3)[0]
    for timestep in scheduler.timesteps:
        output = loaded.module(x, timestep.float().expand(len(x)), ids % 3)
        x = scheduler.step(output[:, : x.shape[1]], timestep, x).prev_sample
    return x


@pytest.mark.parametrize(
    "kind",
    ["latents", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("pixels", "unet"))],
)
def test_few_steps_come_closer_to_many_than_the_given_model_does(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectories, used = Pool.trajectories, []
    monkeypatch.setattr(
        Pool, "trajectories", lambda *a: (used.append(int(a[1].min())), trajectories(*a))[1]
    )
    given = start(kind, tmp_path / "given")
    config = config_of(tmp_path, given, num_views=2048)
    assert fewstep(config, f"run_dir={tmp_path}/run") == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    # Trained on, and held out; the noise of jobs, whose ids count from 0, is neither.
    assert {first >> 40 for first in used} == {2, 1} and used[0] == 2**41
    assert facts["rms_to_teacher"] < 0.8 * facts["rms_without_training"]

    folder = tmp_path / "run" / "model"
    loaded = load_denoiser(folder, CPU, null_class=given.get("null_class"))
    assert loaded.num_classes == 3
    assert loaded.scheduler["distilled_guidance_scale"] == 1.5
    ids = torch.arange(5)
    with torch.no_grad():
        mine = DiffusionSampler(loaded, Steps(count=2), seed=3).trajectory(ids, ids % 3)[-1]
        torch.testing.assert_close(mine, theirs(loaded, folder, ids), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="distilled to 2 steps"):
        DiffusionSampler(loaded, Steps(count=4))
    out = torch.zeros(5, *loaded.image_shape, dtype=torch.uint8)
    assert DiffusionSampler(loaded, Steps(count=2)).sample(ids, ids % 3, out=out).float().std() > 1


@pytest.mark.parametrize(
    "trained",
    [
        {"beta_start": 1e-3, "beta_end": 0.1},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": torch.linspace(0.01, 0.03, 100).tolist()},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
    ids=lambda trained: next(iter(trained)),
)
def test_the_saved_scheduler_makes_first_order_steps_at_the_teachers_levels(
    trained: dict[str, Any], tmp_path: Path
) -> None:
    """A step of DDIM is the first-order step from a level to another."""
    path = config_of(tmp_path, {"path": "x"})
    config = load_config(PretrainFewstepConfig, path, ["num_steps=4"])
    given: Any = diffusers.DDIMScheduler(
        num_train_timesteps=100, clip_sample=False, timestep_spacing="trailing", **trained
    )
    few = _few_steps({**given.config, "_class_name": "DDIMScheduler"}, config)
    saved: Any = diffusers.DPMSolverMultistepScheduler.from_config(few)
    torch.manual_seed(0)
    mine = theirs = torch.randn(2, 1, 4, 4)
    for scheduler in (given, saved):
        scheduler.set_timesteps(4)
    assert given.timesteps.tolist() == saved.timesteps.tolist()
    for timestep in given.timesteps:
        theirs = given.step(torch.tanh(theirs), timestep, theirs).prev_sample
        mine = saved.step(torch.tanh(mine), timestep, mine).prev_sample
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_a_pool_is_used_in_several_passes_and_has_the_noise_of_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[tuple[int, int]] = []

    def train(*_: Any, before_step: Any) -> None:
        for number in range(7):
            before_step(torch.tensor([number, number + 1]))
        raise UserError("seen")

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(Pool, "make", lambda pool, number: made.append((number, pool.sampler.seed)))
    config = config_of(tmp_path, start("pixels", tmp_path / "given"))
    assert fewstep(config, f"run_dir={tmp_path}/run", "reuse=3", "seed=7") == 2
    assert "seen" in capsys.readouterr().err
    assert made == [(number, 7) for number in (0, 0, 0, 1, 1, 1, 2)]


@pytest.mark.slow
def test_a_resumed_run_of_a_latent_v_model_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, start("latents", tmp_path / "given"))
    assert fewstep(config, f"run_dir={tmp_path}/whole") == 0
    update, calls = WeightEMA.update, []

    def interrupted(self: WeightEMA, taken: torch.Tensor) -> None:
        update(self, taken)
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(WeightEMA, "update", interrupted)
    assert fewstep(config, f"run_dir={tmp_path}/broken") == 130
    monkeypatch.undo()
    assert fewstep(config, f"run_dir={tmp_path}/broken", "--resume") == 0
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["sampler.solver=ddpm"], "sampler.solver: got ddpm, expected a solver without"),
        (["sampler.solver=euler"], "sampler.solver: got euler, expected"),
    ],
)
def test_trajectories_that_cannot_be_followed_are_refused(
    changes: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, start("pixels", tmp_path / "given"))
    assert fewstep(config, f"run_dir={tmp_path}/run", *changes) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
