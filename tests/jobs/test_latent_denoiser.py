"""Denoisers on the latents of a frozen autoencoder: trained on a folder, resumed, in few steps."""

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
from small_models import VAE, spread

from dmkd_fast import cli
from dmkd_fast.denoisers.loading import load_denoiser, load_encoder
from dmkd_fast.jobs.pretrain import denoiser as denoiser_module
from dmkd_fast.jobs.pretrain import real_data
from dmkd_fast.sampling.arguments import Steps
from dmkd_fast.sampling.sampler import DiffusionSampler
from dmkd_fast.training.ema import WeightEMA

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {
    "num_threads": 1,
    "dtype": "float32",
    "optim": {"name": "adamw", "lr": 1e-3, "ema_decay": 0.9},
    "train": {"batch_size": 8, "num_views": 96, "compile": False, "log_every_steps": 2},
}
WEIGHTS = "model/transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small random autoencoder of 4 x 8 x 8 latents for color images of 16 pixels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spread(diffusers.AutoencoderKL(**VAE), seed=1).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def config_of(folder: Path, kind: str, **settings: Any) -> Path:
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump({"name": kind, **COMMON, **settings}))
    return path


def denoiser_config(autoencoder: Path, **changes: Any) -> Path:
    settings = {
        "vae": str(autoencoder),
        "data": {"image_size": 16, "held_out": 0.25},
        "patch_size": 2,
        "num_layers": 1,
        "num_heads": 2,
        "head_dim": 8,
    }
    return config_of(autoencoder.parent, "denoiser", **(settings | changes))


def pretrain(kind: str, *arguments: str) -> int:
    return cli.main(["pretrain", kind, *arguments, "--quiet"])


@pytest.mark.slow
def test_latent_denoiser_trains_resumes_bit_for_bit_samples_and_takes_few_steps(
    folder: Path, vae: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, config = vae.parent, str(denoiser_config(vae))
    data = ("--data", str(folder))
    assert pretrain("denoiser", config, f"run_dir={root}/whole", *data) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["held_out_loss"] > 0

    update, calls = WeightEMA.update, []

    def interrupted(self: WeightEMA, taken: torch.Tensor) -> None:
        update(self, taken)
        calls.append(1)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)

    # The second run reads the latents from their file.
    monkeypatch.setattr(denoiser_module.Encoder, "forward", lambda *_: pytest.fail("encoded again"))
    monkeypatch.setattr(WeightEMA, "update", interrupted)
    assert pretrain("denoiser", config, f"run_dir={root}/broken", *data) == 130
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "other-cache"))  # the latents are made again
    assert pretrain("denoiser", config, f"run_dir={root}/broken", "--resume", *data) == 0
    whole, broken = (load_file(root / name / WEIGHTS) for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)

    few = {
        "denoiser": {"path": f"{root}/whole/model"},
        "sampler": {"num_steps": 2, "micro_batch_images": 8, "compile": False},
        "num_steps": 1,
        "pool_images": 8,
    }
    assert pretrain("fewstep", str(config_of(root, "fewstep", **few)), f"run_dir={root}/few") == 0
    for name, steps in (("whole", 4), ("few", 1)):
        loaded = load_denoiser(root / name / "model", CPU)
        assert loaded.latent_shape == (4, 8, 8) and loaded.image_shape == (3, 16, 16)
        out = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
        ids = torch.arange(4)
        DiffusionSampler(loaded, Steps(count=steps)).sample(ids, ids % 3, out=out)
        assert out.float().std() > 1
        assert (root / name / "model" / "classes.txt").read_text().split() == ["ant", "bee", "cat"]


def test_the_encoder_is_the_inverse_of_what_the_decoder_takes(vae: Path) -> None:
    """Latents are scaled as diffusers scales them."""
    model = diffusers.AutoencoderKL.from_pretrained(vae)
    encoder, shape = load_encoder(vae, CPU, (3, 16, 16))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        wanted = model.encode(images).latent_dist.mean * model.config.scaling_factor
        torch.testing.assert_close(encoder(images), wanted)
    assert shape == wanted.shape[1:]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"image_size": 15}}, "data.image_size: got 15, expected a multiple of 2"),
        ({"data": {"image_size": 16, "channels": 1}}, "vae: got 3 input channels, expected the"),
        ({"patch_size": 3}, "a divisor of the images' 8 cells of latents"),
        ({"vae": "nowhere"}, "nowhere"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused_before_an_image_is_read(
    changes: dict[str, Any],
    words: str,
    folder: Path,
    vae: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(real_data, "_decoded", lambda *_: pytest.fail("decoded"))
    config = str(denoiser_config(vae, **changes))
    assert pretrain("denoiser", config, f"run_dir={vae.parent}/run", "--data", str(folder)) == 2
    assert words in capsys.readouterr().err
    assert not (vae.parent / "run").exists()
