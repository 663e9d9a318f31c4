"""`dmkd generate`: what is refused, in one line and before anything changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from families import folder_of
from generate_farm import make_set
from generator_jobs import config_of
from safetensors.torch import load_file, save_file
from shard_files import contents
from small_jobs import CONFIG

from dmkd_fast import cli
from dmkd_fast.assets import resolve
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.data import shards
from dmkd_fast.jobs import generate
from dmkd_fast.jobs.stored_logits import Wanted
from dmkd_fast.runtime.errors import UserError


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        (["seed=1"], {}, "seed is 0 there and 1 here"),
        (["dtype=bfloat16"], {}, "dtype is 'float32' there and 'bfloat16' here"),
        (["sampler.num_steps=2"], {}, "sampler.num_steps is 1 there and 2 here"),
        (["teacher.path=embedded:fashion_mnist/lenet5"], {}, "teacher.path is"),
        (
            [
                "denoiser.path=embedded:fashion_mnist/fewstep",
                "sampler={num_steps: 4, solver: euler, guidance_scale: 1, micro_batch_images: 16}",
            ],
            {},
            "denoiser.path is",
        ),
        ([], {"num_images": 201}, "num_images is 200 there and 201 here"),
        ([], {"images_per_shard": 64}, "images_per_shard is 32 there and 64 here"),
        ([], {"images_per_shard": 40}, "expected a multiple of sampler.micro_batch_images=16"),
        ([], {"num_images": 10**13}, "GiB are free"),
    ],
)
def test_other_settings_are_refused_and_nothing_changes(
    whole: Path, changes: list[str], options: dict[str, Any], words: str
) -> None:
    before = contents(whole)
    with pytest.raises(UserError, match=words) as error:
        make_set(whole, *changes, **options)
    assert "\n" not in str(error.value) and contents(whole) == before


def test_a_finished_slice_needs_no_space(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seven shards, the slice 1/2 has three, one less than the other."""
    full = shutil.disk_usage(whole)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    before = contents(whole)
    make_set(whole, job_slice=(1, 2))
    assert contents(whole) == before


def test_other_weights_under_the_same_path_are_refused(tmp_path: Path) -> None:
    model = shutil.copytree(resolve("embedded:fashion_mnist/denoiser"), tmp_path / "model")
    settings = [f"denoiser.path={model}"]
    make_set(tmp_path / "set", *settings, num_images=16)
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out_2.bias"] += 0.5
    save_file(weights, file)
    with pytest.raises(UserError, match="denoiser_sha256"):
        make_set(tmp_path / "set", *settings, num_images=16)


def test_another_decoder_under_the_same_path_is_refused(tmp_path: Path) -> None:
    model = shutil.copytree(folder_of("DiT"), tmp_path / "model")
    config = load_config(DistillConfig, config_of("DiT", model, tmp_path))
    generate.run(config, tmp_path / "set", 8, show=False)
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_out.bias"] += 0.5
    save_file(weights, file)
    with pytest.raises(UserError, match="denoiser_sha256"):
        generate.run(config, tmp_path / "set", 8, show=False)


def test_stored_logits_need_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, logits = 28 * 28, 4 * 10 * 2
    free = round(32 * (generate.BYTES_BESIDE + generate.BYTES_PER_PIXEL * pixels + logits / 2))
    disk = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    with pytest.raises(UserError, match=r"32 images to make take about .* GiB are free"):
        make_set(tmp_path / "logits", num_images=32, logits=Wanted(None, 4))
    assert make_set(tmp_path / "images", num_images=32)["is_complete"]


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds other files \(thesis\.tex"):
        make_set(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="cannot write"):
        make_set(tmp_path / "thesis.tex" / "set")


def test_a_shard_under_a_second_name_is_refused_and_nothing_changes(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(whole, folder)
    part = folder / shards.MANIFEST / "shard-000001.parquet"
    part.rename(part.with_name("shard-0000001.parquet"))
    before = contents(folder)
    with pytest.raises(UserError, match=r"shard-0000001\.parquet: got another name") as error:
        make_set(folder)
    assert "\n" not in str(error.value) and contents(folder) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["teacher={arch: lenet5}"], "teacher: got arch"),
        (
            [
                "denoiser=null",
                "sampler=null",
                "source={path: x}",
                "ring.capacity_images=512",
                "ring.min_fill_images=64",
            ],
            "source: got it",
        ),
        (["teacher.path=embedded:fashion_mnist/none"], "no such asset"),
        (["sampler.phases=[{start: 0.5, num_steps: 2, guidance_scale: 1}]"], "phases: got some"),
    ],
)
def test_a_config_that_cannot_generate_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    command = ["generate", CONFIG, *arguments, "--out", str(tmp_path / "x"), "--num-images", "9"]
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_two_jobs_with_the_same_part_do_not_meet(whole: Path) -> None:
    with (
        shards.locked(whole, "0-of-1"),
        pytest.raises(UserError, match="another job makes slice 0-of-1"),
    ):
        make_set(whole)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-images", "0"], "expected a positive whole number"),
        (["--num-images", "many"], "expected a positive whole number"),
        (["--num-images", "9", "--shard", "3/3"], "expected i/n with 0 <= i < n"),
        (["--num-images", "9", "--shard", "1"], "expected i/n"),
        (["--num-images", "9", "--shard", "-1/2"], "expected"),
    ],
)
def test_wrong_arguments_are_usage_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", CONFIG, "--out", str(tmp_path / "x"), *arguments])
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
