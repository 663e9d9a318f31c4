"""Layouts in which denoisers are published, and wrong paths: loaded, or one line that helps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from families import copy_of, load
from safetensors.torch import load_file, save_file
from small_models import VAE, class_unet_folder, dit_folder, small_dit, spread
from torch import Tensor

from dmkd_fast import Denoiser, DiffusionSampler, Guidance, Steps, load_denoiser
from dmkd_fast.config.networks import DenoiserConfig
from dmkd_fast.denoisers import attention
from dmkd_fast.denoisers.dit import lean_dit
from dmkd_fast.denoisers.families.text_unet import _guidance_waves
from dmkd_fast.denoisers.wrappers import Decoder
from dmkd_fast.jobs.images import open_denoiser

CPU = torch.device("cpu")
STEM = "diffusion_pytorch_model"


def trajectory(loaded: Denoiser, labels: Tensor, scale: float) -> Tensor:
    sampler = DiffusionSampler(loaded, Steps(count=3), Guidance(scale=scale), micro_batch_images=4)
    return sampler.trajectory(torch.arange(4), labels)[-1]


@pytest.mark.parametrize("null_class", [10, 0, 4])
def test_a_unet_with_a_null_class_is_guided_by_it(tmp_path: Path, null_class: int) -> None:
    folder = class_unet_folder(tmp_path, diffusers.DDIMScheduler(), num_class_embeds=11)
    loaded = open_denoiser(DenoiserConfig(path=str(folder), null_class=null_class), CPU)
    assert (loaded.num_classes, loaded.null_class) == (10, null_class)
    labels = torch.tensor([0, 3, 9, 4])
    got = trajectory(loaded, labels, scale=2.0)
    plain = load_denoiser(folder, CPU)
    own = torch.tensor([c for c in range(11) if c != null_class])[labels]
    plain = replace(plain, null_class=null_class)
    sampler = DiffusionSampler(plain, Steps(count=3), Guidance(scale=2.0), micro_batch_images=4)
    assert torch.equal(got, sampler.trajectory(torch.arange(4), own)[-1])


def test_a_null_class_is_no_class_of_the_job(tmp_path: Path) -> None:
    folder = class_unet_folder(tmp_path / "unet", diffusers.DDIMScheduler(), num_class_embeds=11)
    loaded = load_denoiser(folder, CPU, null_class=4)
    assert loaded.restricted((10, 3)).class_map == (10, 3)
    with pytest.raises(ValueError, match=r"class_map: .* from 0 to 10 without 4"):
        loaded.restricted((3, 4))
    with pytest.raises(ValueError, match="null_class: got 11, expected 0 to 10"):
        load_denoiser(folder, CPU, null_class=11)
    with pytest.raises(ValueError, match="null_class: got 3 for a model whose null class is 1000"):
        load_denoiser(dit_folder(tmp_path / "dit"), CPU, null_class=3)


# What facebook/DiT-XL-2-256 has beside the sizes, and PixArt with ada_norm_single.
PUBLISHED = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "cross_attention_dim": None,
    "norm_num_groups": 32,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": False,
}


@pytest.mark.parametrize(
    ("name", "kept"),
    [("DiT", ()), pytest.param("PixArt", ("cross_attention_dim",), marks=pytest.mark.slow)],
)
def test_the_class_name_of_published_configs_is_read(
    tmp_path: Path, name: str, kept: tuple[str, ...]
) -> None:
    expected = load(name).module
    folder = copy_of(name, tmp_path)
    path, index = folder / "transformer" / "config.json", folder / "model_index.json"
    config = json.loads(path.read_text())
    changes = {key: value for key, value in PUBLISHED.items() if key not in kept}
    path.write_text(json.dumps(config | changes))
    index.write_text(
        json.dumps(
            json.loads(index.read_text()) | {"transformer": ["diffusers", "Transformer2DModel"]}
        )
    )
    got = load(name, folder).module
    assert type(got) is type(expected)
    for a, b in zip(got.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    path.write_text(json.dumps(config | changes | {"norm_type": "layer_norm"}))
    with pytest.raises(ValueError, match="got _class_name 'Transformer2DModel', expected one of"):
        load(name, folder)


def shard(folder: Path, infix: str = "") -> None:
    """Split the weights of one part in two, as diffusers saves large models."""
    path = folder / f"{STEM}.safetensors"
    weights = load_file(path)
    path.unlink()
    names = sorted(weights)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    where = {}
    for number, part in enumerate(parts, 1):
        file = f"{STEM}{infix}-0000{number}-of-00002.safetensors"
        save_file({n: weights[n] for n in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / f"{STEM}.safetensors.index{infix}.json").write_text(json.dumps(index))


def halve(folder: Path) -> None:
    """Keep the float16 variant only."""
    path = folder / f"{STEM}.safetensors"
    weights = {n: w.half() for n, w in load_file(path).items()}
    save_file(weights, folder / f"{STEM}.fp16.safetensors", metadata={"format": "pt"})
    path.unlink()


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_sharded_weights_are_the_same_weights(tmp_path: Path, part: str) -> None:
    whole = load_denoiser(dit_folder(tmp_path), CPU)
    shard(tmp_path / part)
    again = load_denoiser(tmp_path, CPU)
    assert whole.decoder is not None and again.decoder is not None
    for old, new in ((whole.module, again.module), (whole.decoder, again.decoder)):
        for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_float16_variants_are_read_where_there_is_nothing_else(tmp_path: Path, part: str) -> None:
    whole = load_denoiser(dit_folder(tmp_path), CPU)
    halve(tmp_path / part)
    again = load_denoiser(tmp_path, CPU)
    name = "module" if part == "transformer" else "decoder"
    old, new = getattr(whole, name).state_dict(), getattr(again, name).state_dict()
    for a, b in zip(old.values(), new.values(), strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-3)


def spoil(folder: Path, how: str) -> Path:
    """Break a whole folder; returns the path to load."""
    transformer, file = folder / "transformer", f"{STEM}.safetensors"
    if how == "part":
        return transformer
    if how == "file":
        return transformer / file
    if how == "absent":
        return folder / "nothing"
    if how == "transformers":
        (folder / "other").mkdir()
        (folder / "other" / "config.json").write_text('{"architectures": ["CLIPModel"]}')
        return folder / "other"
    if how == "pickle":
        (transformer / file).rename(transformer / f"{STEM}.bin")
    elif how == "shard gone":
        shard(transformer)
        next(transformer.glob("*-00002-of-*")).unlink()
    elif how == "whole beside shards":
        path = folder / "vae" / file
        data = path.read_bytes()
        shard(path.parent)
        path.write_bytes(data)
    elif how == "shard elsewhere":
        index = {"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}}
        (transformer / file).unlink()
        (transformer / f"{file}.index.json").write_text(json.dumps(index))
    elif how == "normalized latents":
        config = json.loads((folder / "vae" / "config.json").read_text())
        config["latents_mean"] = [0.0] * 4
        (folder / "vae" / "config.json").write_text(json.dumps(config))
    elif how == "far too large":
        config = json.loads((transformer / "config.json").read_text())
        config["attention_head_dim"] = 40_000
        (transformer / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("part", r"one part of a model \(DiTTransformer2DModel\), .*; give the folder above it"),
        ("file", "got a file, .*; give its folder, or rewrite .* dmkd import denoiser"),
        ("absent", "no such folder, .*; check denoiser.path"),
        ("transformers", "a transformers or timm model, .* use a diffusion model"),
        ("pickle", r"diffusion_pytorch_model.bin, a pickle, .* dmkd import denoiser SOURCE OUT"),
        ("shard gone", "no such file, but diffusion_pytorch_model.safetensors.index.json names it"),
        (
            "whole beside shards",
            r"vae: got .*\.safetensors beside .*\.json, expected one of the two",
        ),
        ("shard elsewhere", "expected one without folders"),
        ("normalized latents", "latents_mean: got"),
        ("far too large", "got a config of .* weights, but .* holds"),
    ],
)
def test_a_wrong_path_or_part_is_one_line_that_helps(tmp_path: Path, how: str, words: str) -> None:
    path = spoil(dit_folder(tmp_path), how)
    with pytest.raises(ValueError, match=words) as error:
        load_denoiser(path, CPU)
    assert "\n" not in str(error.value)


def test_an_inpainting_unet_is_refused(tmp_path: Path) -> None:
    folder = class_unet_folder(tmp_path, diffusers.DDIMScheduler(), out_channels=5)
    with pytest.raises(ValueError, match="got 3 input and 5 output channels"):
        load_denoiser(folder, CPU)


def test_a_decoder_undoes_scale_and_shift() -> None:
    """As the pipelines of autoencoders with a shift: latents / scale + shift."""
    vae = spread(diffusers.AutoencoderKL(**VAE, scaling_factor=0.5, shift_factor=0.7))
    reference = spread(diffusers.AutoencoderKL(**VAE))
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        got, expected = Decoder(vae)(latents), reference.decode(latents * 2 + 0.7).sample
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eps", [0.1, 1e-5])
def test_lean_dits_have_the_norm_eps_of_the_config(eps: float) -> None:
    dit = small_dit(norm_eps=eps)
    lean = lean_dit(dit)
    assert lean is not None
    with torch.no_grad():
        # Small numbers, beside which eps is not small.
        for block in dit.transformer_blocks:
            block.attn1.to_out[0].weight *= 0.01
        x, t, y = 0.01 * torch.randn(4, 4, 8, 8), torch.full((4,), 300.0), torch.arange(4)
        torch.testing.assert_close(
            lean(x, t, y), dit(x, timestep=t, class_labels=y).sample, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("width", [12, 13])
def test_guidance_as_an_input_is_embedded_as_the_pipeline_does(width: int) -> None:
    scales = torch.tensor([1.0, 3.5, 7.5])
    theirs = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(
        None,  # type: ignore[arg-type]
        scales - 1,
        embedding_dim=width,
    )
    torch.testing.assert_close(_guidance_waves(scales - 1, width), theirs, rtol=1e-4, atol=1e-4)


def test_short_attention_is_chosen_up_to_its_longest_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention.kernels, "has_short_attention", lambda *_: True)
    for amx, most in ((True, 128), (False, 1024)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        kinds = [
            attention.resolve(
                "auto", device=CPU, dtype=torch.float32, num_tokens=n, num_heads=2, head_dim=8
            )
            for n in (most, most + 1)
        ]
        assert kinds == ["short", "sdpa"]
