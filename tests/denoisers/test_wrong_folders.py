"""Folders of every family in which a user has something wrong: one clear line, exit code 2."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, copy_of, folder_of, load
from generator_jobs import config_of
from safetensors.torch import load_file, save_file
from small_jobs import sampler_from
from torch import Tensor

from dmkd_fast import cli
from dmkd_fast.runtime.errors import UserError

pytestmark = pytest.mark.slow  # run by .ci/run

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
Spoil = Callable[[Path], object]


def network(folder: Path) -> Path:
    return folder / ("unet" if (folder / "unet").is_dir() else "transformer")


def last(folder: Path, kind: str) -> Path:
    """The last text encoder or tokenizer."""
    return sorted(part for part in folder.iterdir() if part.name.startswith(kind))[-1]


def weights_of(part: Path) -> Path:
    (path,) = part.glob("*.safetensors")
    return path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(part: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = weights_of(part)
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def cut(part: Path) -> None:
    path = weights_of(part)
    path.write_bytes(path.read_bytes()[:-99])


def without_one(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    del weights[min(weights)]
    return weights


def another_shape(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    largest = max(weights, key=lambda name: weights[name].numel())
    return weights | {largest: weights[largest].flatten()[::2].clone()}


def in_8_bits(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(torch.int8) for name, value in weights.items()}


def no_longer(part: Path) -> None:
    weights_of(part).rename(part / "diffusion_pytorch_model.bin")


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def single_file(folder: Path) -> Path:
    shutil.copy(weights_of(network(folder)), folder / "model.safetensors")
    return folder / "model.safetensors"


def only_a_single_file(folder: Path) -> None:
    path = single_file(folder)
    shutil.move(path, folder.parent / path.name)
    shutil.rmtree(folder)
    folder.mkdir()
    shutil.move(folder.parent / path.name, path)


SCHEDULER = "scheduler/scheduler_config.json"
OTHER = "CogVideoXTransformer3DModel"
# What is wrong, and what the line says. Parts that a family does not have are left out.
WRONG: dict[str, tuple[Spoil, str]] = {
    "no folder": (lambda f: f.parent / "nothing", "no such folder, .*; check denoiser.path"),
    "one part": (network, "one part of a model .*; give the folder above it"),
    "an empty folder": (
        lambda f: (shutil.rmtree(f), f.mkdir()),
        "got neither transformer/ nor unet/, expected a folder in diffusers format",
    ),
    "a single file": (single_file, "got a file, expected .* dmkd import denoiser"),
    "a folder of a single file": (only_a_single_file, "neither transformer/ nor unet/"),
    "no network": (lambda f: shutil.rmtree(network(f)), "got neither transformer/ nor unet/"),
    "no config": (lambda f: (network(f) / "config.json").unlink(), "config.json: No such file"),
    "another class": (
        lambda f: edit(network(f) / "config.json", _class_name=OTHER),
        f"got _class_name '{OTHER}( with text_time)?', expected one of DiTTransformer2DModel",
    ),
    "more layers": (
        lambda f: edit(network(f) / "config.json", num_layers=9, depth=9, layers_per_block=9),
        "weights|nothing|missing keys",
    ),
    "no weights": (
        lambda f: weights_of(network(f)).unlink(),
        "no such file: diffusion_pytorch_model.safetensors",
    ),
    "pickled weights": (lambda f: no_longer(network(f)), "a pickle, .* dmkd import denoiser"),
    "cut weights": (lambda f: cut(network(f)), "safetensors: damaged .* fetch or save"),
    "a pointer of Git LFS": (
        lambda f: weights_of(network(f)).write_text(POINTER),
        "got a pointer of Git LFS, .* git lfs pull",
    ),
    "a weight less": (
        lambda f: rewrite(network(f), without_one),
        "got nothing|missing keys such as",
    ),
    "a weight more": (
        lambda f: rewrite(network(f), lambda w: w | {"zzz.weight": torch.ones(3)}),
        "zzz.weight",
    ),
    "another shape": (lambda f: rewrite(network(f), another_shape), "expected|mismatch|size"),
    "weights in 8 bits": (
        lambda f: rewrite(network(f), in_8_bits),
        "expected floating-point numbers; fetch weights that are not quantized",
    ),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json: No such"),
    "an unknown scheduler": (
        lambda f: edit(f / SCHEDULER, _class_name="EDMEulerScheduler"),
        "EDMEulerScheduler",
    ),
    "a broken scheduler": (lambda f: (f / SCHEDULER).write_text("x"), "not valid JSON"),
    "no autoencoder": (lambda f: shutil.rmtree(f / "vae"), "without vae/, expected an autoencoder"),
    "autoencoder: no weights": (lambda f: weights_of(f / "vae").unlink(), "vae: no such file"),
    "autoencoder: cut weights": (lambda f: cut(f / "vae"), "vae/.* damaged"),
    "autoencoder: another shape": (lambda f: rewrite(f / "vae", another_shape), "vae: "),
    "autoencoder: other latents": (
        lambda f: edit(f / "vae/config.json", latent_channels=7),
        "got 7 latent channels, expected the denoiser's",
    ),
    "an index of another pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="KandinskyV22Pipeline"),
        "model_index.json: _class_name: got 'KandinskyV22Pipeline', expected .*Pipeline",
    ),
    "an index of another network": (
        lambda f: edit(f / "model_index.json", **{network(f).name: ["diffusers", OTHER]}),
        rf"model_index.json: (unet|transformer): got '{OTHER}', expected .* as .*/ has",
    ),
    "a broken index": (lambda f: (f / "model_index.json").write_text("{"), "not valid JSON"),
    "encoder: none": (
        lambda f: shutil.rmtree(last(f, "text_encoder")),
        r"text_encoder\w*/config.json: No such file",
    ),
    "encoder: no config": (
        lambda f: (last(f, "text_encoder") / "config.json").unlink(),
        r"text_encoder\w*/config.json: No such file",
    ),
    "encoder: another model": (
        lambda f: edit(last(f, "text_encoder") / "config.json", model_type="llama"),
        "model_type: got 'llama', expected '(clip|t5|gemma2)'",
    ),
    "encoder: no weights": (
        lambda f: weights_of(last(f, "text_encoder")).unlink(),
        r"text_encoder\w*: no such file: model.safetensors",
    ),
    "encoder: pickled weights": (
        lambda f: no_longer(last(f, "text_encoder")),
        r"text_encoder\w*: got no .safetensors file but .* a pickle",
    ),
    "encoder: cut weights": (lambda f: cut(last(f, "text_encoder")), r"text_encoder\w*/.* damaged"),
    "encoder: a weight less": (
        lambda f: rewrite(last(f, "text_encoder"), without_one),
        "missing weights such as",
    ),
    "encoder: another shape": (
        lambda f: rewrite(last(f, "text_encoder"), another_shape),
        "mismatched weights such as",
    ),
    "tokenizer: none": (lambda f: shutil.rmtree(last(f, "tokenizer")), "tokenizer"),
    "tokenizer: no files": (lambda f: empty(last(f, "tokenizer")), "tokenizer"),
}


def fits(name: str, folder: Path, how: str) -> bool:
    """Whether a family has the part that is spoiled."""
    if how.startswith(("encoder", "tokenizer")):
        return FAMILIES[name].has_prompts and (
            # Stable Diffusion 3 works without T5, as its pipeline does.
            how != "encoder: none" or name != "Stable Diffusion 3"
        )
    if "autoencoder" in how:
        return (folder / "vae").is_dir()
    if how == "an index of another pipeline" and not (folder / "model_index.json").is_file():
        return False
    return "index" not in how or (folder / "model_index.json").is_file()


def use(name: str, folder: Path) -> None:
    """Load a denoiser and make its table of steps."""
    sampler_from(**vars(load(name, folder)), count=FAMILIES[name].count)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_folder_is_one_clear_line(tmp_path: Path, name: str) -> None:
    tried = [how for how in WRONG if fits(name, folder_of(name), how)]
    assert len(tried) >= 19
    for how in tried:
        spoil, words = WRONG[how]
        place = tmp_path / how
        place.mkdir()
        path = spoil(copy := copy_of(name, place))
        with pytest.raises(UserError) as error:
            use(name, path if isinstance(path, Path) else copy)
        line = str(error.value)
        assert re.search(words, line) and "\n" not in line and len(line) < 600, (how, line)
        shutil.rmtree(place)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_command_ends_with_the_line_and_exit_code_2(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(name, tmp_path)
    cut(network(folder))
    config, out = config_of(name, folder, tmp_path), tmp_path / "out"
    assert cli.main(["generate", str(config), "--out", str(out), "--num-images", "4"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("dmkd: weights ") and "damaged" in line and not out.exists()


def test_libraries_add_no_lines_of_their_own(tmp_path: Path) -> None:
    """transformers reports on missing weights in a table."""
    folder = copy_of("SDXL", tmp_path)
    rewrite(folder / "text_encoder_2", without_one)
    config = config_of("SDXL", folder, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "dmkd_fast", "distill", str(config), f"run_dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("dmkd: ") and "missing weights such as" in lines[0]
    assert not (tmp_path / "run").exists()
