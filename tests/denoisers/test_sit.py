"""SiT in its published layout, against a reference written from its paper."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from dit_reference import dit_reference
from safetensors.torch import load_file, save_file
from small_models import sit_folder
from torch import Tensor

from dmkd_fast import DiffusionSampler, Guidance, Steps, cli, load_denoiser
from dmkd_fast.denoisers.dit import LeanDiT

pytestmark = pytest.mark.slow  # run by .ci/run

CPU = torch.device("cpu")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def velocity(folder: Path, x: Tensor, time: float, labels: Tensor) -> Tensor:
    """SiT by its definition: image - noise at a time from 0 (noise) to 1 (image)."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    return dit_reference(load_file(folder / WEIGHTS), config, x, time, labels)[:, : x.shape[1]]


@torch.no_grad()
def images(folder: Path, noise: Tensor, labels: Tensor, steps: int, scale: float) -> Tensor:
    """Euler steps of the reference from noise, and the decoder."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    x, nulls = noise, torch.full_like(labels, config["num_classes"])
    for step in range(steps):
        v = velocity(folder, x, step / steps, labels)
        if scale != 1:
            none = velocity(folder, x, step / steps, nulls)
            v = none + scale * (v - none)
        x = x + v / steps
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    made = vae.decode(x / vae.config.scaling_factor).sample
    return ((made / 2 + 0.5).clamp(0, 1) * 255).round()


@pytest.mark.parametrize("changes", [{}, {"learn_sigma": False, "patch_size": 4, "num_heads": 4}])
@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (4, 1.5)])
def test_images_equal_the_reference(
    changes: dict[str, Any], steps: int, scale: float, tmp_path: Path
) -> None:
    folder = sit_folder(tmp_path, **changes)
    loaded = load_denoiser(folder, CPU)
    assert isinstance(loaded.module, LeanDiT)
    assert (loaded.num_classes, loaded.null_class) == (5, 5)
    sampler = DiffusionSampler(
        loaded, Steps(count=steps), Guidance(scale=scale), micro_batch_images=4
    )
    ids, labels = torch.arange(6) + 10, torch.tensor([0, 4, 2, 1, 3, 3])
    out = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    sampler.sample(ids, labels, out=out)
    expected = images(folder, sampler._noise(ids, 0), labels, steps, scale)
    assert (out.float() - expected).abs().max() <= 1
    assert expected.std() > 1

    alone = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert torch.equal(sampler.sample(ids[4:5], labels[4:5], out=alone)[0], out[4])
    mapped = loaded.restricted((3, 0))
    sampler = DiffusionSampler(mapped, Steps(count=steps), Guidance(scale=scale))
    sampler.sample(ids[4:5], torch.tensor([0]), out=alone)
    assert (alone[0].int() - out[4].int()).abs().max() <= 1


def test_a_model_without_dropped_labels_has_no_null_class(tmp_path: Path) -> None:
    loaded = load_denoiser(sit_folder(tmp_path, class_dropout_prob=0.0), CPU)
    assert (loaded.num_classes, loaded.null_class) == (5, None)


def test_the_published_pickle_becomes_a_folder(tmp_path: Path) -> None:
    """The file of SiT's own code, beside the configs of a folder without weights."""
    folder = sit_folder(tmp_path / "whole")
    torch.save(load_file(folder / WEIGHTS), tmp_path / "SiT.pt")
    configs = tmp_path / "configs"
    shutil.copytree(folder, configs, ignore=shutil.ignore_patterns("*.safetensors"))
    vae = ["--vae", str(folder / "vae")]
    out = str(tmp_path / "out")
    assert (
        cli.main(["import", "denoiser", f"{tmp_path}/SiT.pt", out, "--config", str(configs), *vae])
        == 0
    )
    got, expected = (load_denoiser(path, CPU) for path in (Path(out), folder))
    for name, value in got.module.state_dict().items():
        assert torch.equal(value, expected.module.state_dict()[name])
    assert got.decoder is not None


def spoil(folder: Path, how: str) -> None:
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    if how == "one name":
        weights = load_file(folder / WEIGHTS)
        weights["blocks.0.attn.q_norm.weight"] = torch.ones(8)
        save_file(weights, folder / WEIGHTS)
    elif how == "scheduler":
        diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    elif how == "depth":
        path.write_text(json.dumps(config | {"depth": 3}))
    elif how == "norm":
        path.write_text(json.dumps(config | {"norm_type": "rms"}))
    elif how == "size":
        path.write_text(json.dumps(config | {"hidden_size": "16"}))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("one name", "blocks.0.attn.q_norm.weight: got .*, expected nothing"),
        ("scheduler", "a SiT with 'DDIMScheduler', expected FlowMatchEulerDiscreteScheduler"),
        ("depth", r"blocks.2.adaLN_modulation.1.bias: got nothing, expected \(96,\)"),
        ("norm", "norm_type='rms', expected 4 and 'ln'"),
        ("size", "hidden_size: got "),
    ],
)
def test_wrong_folders_are_refused_in_one_line(how: str, words: str, tmp_path: Path) -> None:
    spoil(sit_folder(tmp_path), how)
    with pytest.raises(ValueError, match=words) as error:
        load_denoiser(tmp_path, CPU)
    assert "\n" not in str(error.value)
