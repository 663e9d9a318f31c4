"""`dmkd import denoiser`: the written folder makes the images of its source."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from classifier_folders import trap
from command_line import one_line
from safetensors.torch import load_file, save_file
from small_jobs import ROOT
from small_models import VAE, class_unet_folder, dit_folder, spread
from text_encoders import PROMPTS
from text_models import sdxl, stable_diffusion
from torch import Tensor

from dmkd_fast import assets, cli
from dmkd_fast.cli.parser import new_parser
from dmkd_fast.denoisers.loading import load_denoiser

CPU = torch.device("cpu")


def pickled(folder: Path, *, shards: int = 1) -> Path:
    """Replace all safetensors files of a pipeline by files of torch.save, as in older models."""
    for path in folder.rglob("*.safetensors"):
        weights = load_file(path)
        stem = "pytorch_model" if path.stem == "model" else path.stem
        path.unlink()
        names = sorted(weights)
        where = {name: f"{stem}-{i % shards}.bin" for i, name in enumerate(names)}
        if shards == 1:
            torch.save(weights, path.with_name(f"{stem}.bin"))
            continue
        for file in set(where.values()):
            torch.save({n: weights[n] for n in names if where[n] == file}, path.with_name(file))
        index = path.with_name(f"{stem}.bin.index.json")
        index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": where}))
    return folder


def imported(source: Path, out: Path, *options: str) -> None:
    assert cli.main(["import", "denoiser", str(source), str(out), *options]) == 0
    suffixes = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".txt", ".md"}


@torch.no_grad()
def dit_images(folder: Path, **options: Any) -> Tensor:
    pipeline = diffusers.DiTPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    made = pipeline([3, 7], generator=generator, num_inference_steps=2, output_type="np")
    return torch.from_numpy(made.images)


@pytest.mark.parametrize("shards", [1, 2])
def test_dit_xl_2_in_the_published_layout_makes_the_same_images(
    shards: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """facebook/DiT-XL-2-256 has transformer/ and vae/ in diffusion_pytorch_model.bin."""
    source = pickled(dit_folder(tmp_path / "published"), shards=shards)
    (source / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    imported(source, tmp_path / "out")
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["license"] == "cc-by-nc-4.0" and facts["num_classes"] == 1000
    assert facts["pickles"] == 2 * shards and facts["image_shape"] == [3, 16, 16]
    if shards == 1:  # diffusers reads whole pickles by itself
        expected = dit_images(source, use_safetensors=False)
        assert torch.equal(dit_images(tmp_path / "out", use_safetensors=True), expected)
    again = load_denoiser(dit_folder(tmp_path / "same"), CPU).module.state_dict()
    for name, value in load_denoiser(tmp_path / "out", CPU).module.state_dict().items():
        assert torch.equal(value, again[name])


@pytest.mark.slow
def test_all_encoders_of_a_text_model_are_rewritten(tmp_path: Path) -> None:
    source = tmp_path / "published"
    sdxl(source, diffusers.EulerDiscreteScheduler())
    expected = load_denoiser(source, CPU, prompts=PROMPTS).module.state_dict()
    imported(pickled(source), tmp_path / "out")
    for name, value in (
        load_denoiser(tmp_path / "out", CPU, prompts=PROMPTS).module.state_dict().items()
    ):
        assert torch.equal(value, expected[name])


def test_the_papers_decoder_and_schedule_are_put_in(tmp_path: Path) -> None:
    """The command in configs/paper/imagenet.yaml, at reduced size."""
    source = pickled(dit_folder(tmp_path / "published"))
    other = spread(diffusers.AutoencoderKL(**VAE), seed=9)
    other.save_pretrained(tmp_path / "vae")
    pickled(tmp_path / "vae")
    changes = ["_class_name=DDPMScheduler", "variance_type=learned_range", "clip_sample=false"]
    options = ["--vae", str(tmp_path / "vae"), "--scheduler", *changes, "beta_end=0.02"]
    imported(source, tmp_path / "out", *options)
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipeline.scheduler, diffusers.DDPMScheduler)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert pipeline.scheduler.config.clip_sample is False
    for name, value in pipeline.vae.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_the_command_in_the_papers_config_is_complete() -> None:
    text = (ROOT / "configs" / "paper" / "imagenet.yaml").read_text()
    lines = [line.removeprefix("#").strip() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("dmkd import denoiser"))
    end = next(i for i in range(start, len(lines)) if not lines[i].endswith("\\"))
    words = " ".join(line.rstrip("\\") for line in lines[start : end + 1]).split()
    options = new_parser().parse_args(words[1:])
    assert str(options.out) == "models/dit_xl_2_256"
    assert [assets.split_commit(name)[0] for name in (options.source, options.vae)] == [
        "hf-hub:facebook/DiT-XL-2-256",
        "hf-hub:stabilityai/sd-vae-ft-mse",
    ]
    assert dict(options.scheduler) == {
        "_class_name": "DDPMScheduler",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "variance_type": "learned_range",
        "clip_sample": False,
        "timestep_spacing": "linspace",
    }


def test_a_class_unet_with_one_pickle_of_any_name(tmp_path: Path) -> None:
    source = pickled(class_unet_folder(tmp_path / "unet", diffusers.DDPMScheduler()))
    file = source / "unet" / "diffusion_pytorch_model.bin"
    file.rename(source / "unet" / "ema.pt")
    imported(source, tmp_path / "out")
    same = class_unet_folder(tmp_path / "same", diffusers.DDPMScheduler())
    expected = load_denoiser(same, CPU).module.state_dict()
    for name, value in load_denoiser(tmp_path / "out", CPU).module.state_dict().items():
        assert torch.equal(value, expected[name])


@torch.no_grad()
def text_images(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    made = pipeline("a cat", generator=generator, num_inference_steps=2, output_type="np")
    return torch.from_numpy(made.images)


@pytest.mark.slow
def test_text_to_image_folders_keep_the_encoder_and_leave_the_safety_checker(
    tmp_path: Path,
) -> None:
    pipeline = stable_diffusion(tmp_path / "sd", diffusers.DDIMScheduler())
    index = tmp_path / "sd" / "model_index.json"
    values = json.loads(index.read_text()) | {"safety_checker": ["stable_diffusion", "X"]}
    index.write_text(json.dumps(values))
    imported(pickled(tmp_path / "sd"), tmp_path / "out")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(text_images(again), text_images(pipeline))


def original_names(name: str, part: str) -> str:
    """The name of one weight in Stable Diffusion's own code, for one layer a block."""
    if part == "text_encoder":
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        return f"cond_stage_model.transformer.{name}"
    if part == "vae":
        name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        for kind, old in (("resnets", r"block.\2"), ("upsamplers", "upsample")):
            for i in range(2):
                new = f"up.{1 - i}." + old
                name = re.sub(rf"up_blocks\.({i})\.{kind}\.(\d)", new, name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace(
            "conv_norm_out", "norm_out"
        )
        for new, old in (("group_norm", "norm"), ("to_out.0", "proj_out")):
            name = name.replace(new, old)
        name = re.sub(r"to_([qkv])\.", r"\1.", name).replace("conv_shortcut", "nin_shortcut")
        return f"first_stage_model.{name}"
    places = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.attentions.0": "input_blocks.1.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.upsamplers.0": "output_blocks.1.1",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
        "up_blocks.1.attentions.1": "output_blocks.3.1",
    }
    place = next(p for p in places if name.startswith(f"{p}."))
    rest = name.removeprefix(place)
    if "resnets" in place:
        layers = ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0")
        layers += ("conv2", "out_layers.3"), ("time_emb_proj", "emb_layers.1")
        for new, old in (*layers, ("conv_shortcut", "skip_connection")):
            rest = rest.replace(new, old)
    return f"model.diffusion_model.{places[place]}{rest}"


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_stable_diffusion_in_a_single_file_makes_the_same_images(
    suffix: str, tmp_path: Path
) -> None:
    pipeline = stable_diffusion(tmp_path / "sd", diffusers.DDIMScheduler())
    weights = {
        original_names(name, part): value.clone()
        for part in ("unet", "vae", "text_encoder")
        for name, value in getattr(pipeline, part).state_dict().items()
    }
    file = tmp_path / f"sd{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": weights, "global_step": 3}, file)
    else:
        save_file(weights, file)
    for path in (tmp_path / "sd").rglob("*.safetensors"):
        path.unlink()
    imported(file, tmp_path / "out", "--config", str(tmp_path / "sd"))
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(text_images(again), text_images(pipeline))


def test_mistakes_end_in_one_line_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = pickled(dit_folder(tmp_path / "good"))

    def broken(name: str, change: Any) -> str:
        shutil.copytree(good, tmp_path / name)
        change(tmp_path / name)
        return str(tmp_path / name)

    file = Path("transformer") / "diffusion_pytorch_model.bin"
    weights = torch.load(good / file, weights_only=True)
    first = next(iter(weights))
    fewer = {k: v for k, v in weights.items() if k != first}
    save_file({"a": torch.zeros(1)}, tmp_path / "odd.safetensors")
    canary = tmp_path / "canary"
    cases: list[tuple[list[str], list[str]]] = [
        ([str(tmp_path / "none")], ["no such folder"]),
        ([broken("cut", lambda f: (f / file).write_bytes((f / file).read_bytes()[:99]))], ["bin"]),
        ([broken("trap", lambda f: trap(f / file, canary))], ["weights_only", "runs no code"]),
        ([broken("few", lambda f: torch.save(fewer, f / file))], [first, "expected"]),
        ([broken("gone", lambda f: (f / file).unlink())], ["no weights"]),
        ([broken("two", lambda f: [(f / file).rename(f / "transformer" / "a.pt"),
                                   torch.save(fewer, f / "transformer" / "b.pt")])],
         ["2 pickles", "diffusion_pytorch_model.bin"]),
        ([broken("bad", lambda f: (f / "transformer" / "config.json").write_text("{"))], ["JSON"]),
        ([broken("no vae", lambda f: shutil.rmtree(f / "vae"))], ["without vae/"]),
        ([str(tmp_path / "odd.safetensors")], ["--config: got none"]),
        ([str(tmp_path / "odd.safetensors"), "--config", str(good)], ["model.diffusion_model"]),
        ([str(good), "--config", str(good)], ["--config", "single file only"]),
        ([str(good), "--vae", str(tmp_path / "none")], ["no such folder"]),
        (["hf-hub:facebook/DiT-XL-2-256"], ["COMMIT"]),
    ]  # fmt: skip
    for (source, *options), words in cases:
        out = tmp_path / "out"
        capsys.readouterr()
        assert cli.main(["import", "denoiser", source, str(out), *options]) == 2, source
        one_line(capsys, words)
        assert not out.exists() and not list(tmp_path.glob(".*")), source
    assert not canary.exists()
    capsys.readouterr()
    assert cli.main(["import", "denoiser", str(good), str(good)]) == 2
    one_line(capsys, ["exists already"])
    with pytest.raises(SystemExit):
        cli.main(["import", "denoiser", str(good), str(tmp_path / "out"), "--scheduler", "clip"])
