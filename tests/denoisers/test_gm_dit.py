"""pi-Flow's one-step DiT in its published layout, against a reference written from its paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from dit_reference import dit_reference
from safetensors.torch import load_file, save_file
from small_models import gm_dit_folder
from torch import Tensor

from dmkd_fast import DiffusionSampler, Guidance, Steps, load_denoiser

pytestmark = pytest.mark.slow  # run by .ci/run

CPU = torch.device("cpu")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LINEAR = {
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "norm1.linear": "adaLN_modulation.1",
}


def sit_names(weights: dict[str, Tensor], config: dict[str, Any], out: str) -> dict[str, Tensor]:
    """The same DiT for `dit_reference`, with one of its output layers."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    embed = diffusers.models.embeddings.PatchEmbed(
        height=config["sample_size"],
        width=config["sample_size"],
        patch_size=config["patch_size"],
        in_channels=config["in_channels"],
        embed_dim=width,
    )
    result = {
        "pos_embed": embed.pos_embed,
        "y_embedder.embedding_table.weight": weights["emb.class_embedder.embedding_table.weight"],
    }
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        out: "final_layer.linear",
    }
    for i in range(config["num_layers"]):
        names |= {f"transformer_blocks.{i}.{a}": f"blocks.{i}.{b}" for a, b in LINEAR.items()}
        for kind in ("weight", "bias"):
            rows = [weights[f"transformer_blocks.{i}.attn1.to_{p}.{kind}"] for p in "qkv"]
            result[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(rows)
    for kind in ("weight", "bias"):
        result |= {f"{new}.{kind}": weights[f"{old}.{kind}"] for old, new in names.items()}
    return result


@torch.no_grad()
def images(folder: Path, noise: Tensor, labels: Tensor) -> Tensor:
    """Follow the mixture from noise to image by Bayes' rule, in float64."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    weights = load_file(folder / WEIGHTS)
    sit = {
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "num_heads": config["num_attention_heads"],
        "patch_size": config["patch_size"],
        "depth": config["num_layers"],
        "input_size": config["sample_size"],
    }
    means, logits = (
        dit_reference(
            sit_names(weights, config, f"proj_out_{part}"), sit, noise, 1000.0, labels, 1e-5
        ).double()
        for part in ("means", "logweights")
    )
    count = config["num_gaussians"]
    means = noise[:, None].double() - means.view(len(noise), count, *noise.shape[1:])
    angles = 1000 * 10_000 ** (-torch.arange(128) / 128)
    value = torch.cat((angles.cos(), angles.sin()))
    for name in ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2"):
        value = F.linear(value, weights[f"{name}.weight"], weights[f"{name}.bias"])
        value = F.silu(value) if name.endswith("1") else value
    value = value + weights["emb.class_embedder.embedding_table.weight"][labels]
    for place in (1, 3):
        name = f"proj_out_logstds.{place}"
        value = F.linear(F.silu(value), weights[f"{name}.weight"], weights[f"{name}.bias"])
    variance = (2 * value.double()).exp()[:, :, None, None, None]  # (B, 1, 1, 1, 1)
    x = noise.double()
    for step in range(128):
        sigma = 1 - step / 128
        alpha = 1 - sigma
        # p(x | k) is normal around alpha * mean; p(image | x, k) has the product's mean.
        total = sigma**2 + alpha**2 * variance
        away = (x[:, None] - alpha * means).square().sum(dim=2, keepdim=True)
        share = (logits[:, :, None] - away / (2 * total)).softmax(dim=1)
        each = means + alpha * variance / total * (x[:, None] - alpha * means)
        x = x - (x - (share * each).sum(dim=1)) / sigma / 128
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    made = vae.decode(x.float() / vae.config.scaling_factor).sample
    return ((made / 2 + 0.5).clamp(0, 1) * 255).round()


@pytest.mark.parametrize("changes", [{}, {"num_gaussians": 5, "patch_size": 4}])
def test_images_equal_the_reference(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = gm_dit_folder(tmp_path, **changes)
    loaded = load_denoiser(folder, CPU)
    assert (loaded.num_classes, loaded.null_class) == (5, None)
    sampler = DiffusionSampler(loaded, Steps(count=1), micro_batch_images=4)
    ids, labels = torch.arange(6) + 10, torch.tensor([0, 4, 2, 1, 3, 3])
    out = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    sampler.sample(ids, labels, out=out)
    expected = images(folder, sampler._noise(ids, 0), labels)
    assert (out.float() - expected).abs().max() <= 1
    assert expected.std() > 1
    alone = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert torch.equal(sampler.sample(ids[4:5], labels[4:5], out=alone)[0], out[4])


def test_other_steps_and_guidance_are_refused(tmp_path: Path) -> None:
    loaded = load_denoiser(gm_dit_folder(tmp_path), CPU)
    with pytest.raises(ValueError, match="distilled to 1 steps"):
        DiffusionSampler(loaded, Steps(count=2))
    with pytest.raises(ValueError, match="without a null"):
        DiffusionSampler(loaded, Steps(count=1), Guidance(scale=2.0))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"num_layers": 3}, "transformer_blocks.2.attn1.to_k.bias: got nothing"),
        ({"num_gaussians": 4}, r"proj_out_logweights.bias: got \(12,\), expected \(16,\)"),
        (
            {"constant_logstd": -1.0},
            "expected FlowMatchEulerDiscreteScheduler and no constant_logstd",
        ),
        ({"in_channels": "4"}, "in_channels: got "),
        (None, "ff.net.1.weight: got .*, expected nothing"),
    ],
    ids=str,
)
def test_wrong_folders_are_refused_in_one_line(
    how: dict[str, Any] | None, words: str, tmp_path: Path
) -> None:
    path = gm_dit_folder(tmp_path) / "transformer" / "config.json"
    if how is None:
        weights = load_file(tmp_path / WEIGHTS) | {"ff.net.1.weight": torch.ones(2)}
        save_file(weights, tmp_path / WEIGHTS)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | how))
    with pytest.raises(ValueError, match=words) as error:
        load_denoiser(tmp_path, CPU)
    assert "\n" not in str(error.value)
