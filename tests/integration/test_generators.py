"""`dmkd generate` and `dmkd distill`, end to end, with a tiny random model of each family."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from families import FAMILIES, folder_of
from generator_jobs import config_of
from real_sets import picture
from run_state import rows
from safetensors.torch import load_file
from small_jobs import ROOT
from text_encoders import PROMPTS, clip_folder

from dmkd_fast import Distiller, cli
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.jobs import memory
from dmkd_fast.jobs.build import make_sampler
from dmkd_fast.jobs.parts import prepare

pytestmark = pytest.mark.slow
KILLED_AT = 10


class Killed(BaseException):
    """Like SIGKILL, nothing in the package catches it."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_generates_teaches_and_resumes(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(name, folder_of(name), tmp_path)
    resolved, parts = prepare(load_config(DistillConfig, config))
    denoiser, own = parts.origin, FAMILIES[name].own
    assert isinstance(denoiser, Denoiser) and denoiser.image_shape == (3, 16, 16)
    if own is not None:
        assert (resolved.config.sampler.num_steps, resolved.config.sampler.guidance_scale) == own
    plan = memory.plan(resolved, parts)
    modules = [module for module in (denoiser.module, denoiser.decoder) if module is not None]
    assert plan["denoiser"] == 4 * sum(p.numel() for m in modules for p in m.parameters())
    if FAMILIES[name].has_prompts:
        count = len(denoiser.module.prompts)
        assert count == len(PROMPTS) + (denoiser.null_class is not None)
        assert plan["prompts"] >= 4 * denoiser.module.prompts.numel()

    out, whole, cut = (tmp_path / part for part in ("images", "whole", "cut"))
    command = ["generate", str(config), "--out", str(out), "--num-images", "16", "--quiet"]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_images"] == 16
    assert cli.main(["distill", str(config), f"run_dir={whole}", "--quiet"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= summary["top1"] <= 1

    step = Distiller.train_step

    def killed(self: Distiller) -> torch.Tensor:
        if self.step == KILLED_AT:
            self.checkpoints.writer.close()  # A killed process would not write on in a thread.
            raise Killed
        return step(self)

    often = "train.checkpoint_every_s=0.000001"
    monkeypatch.setattr(Distiller, "train_step", killed)
    with pytest.raises(Killed):
        cli.main(["distill", str(config), f"run_dir={cut}", often, "--quiet"])
    monkeypatch.undo()
    assert 0 < rows(cut)[-1]["images"] < rows(whole)[-1]["images"]  # others are made later
    assert cli.main(["distill", str(cut / "config.yaml"), "--resume", "--quiet"]) == 0
    first, second = (load_file(run / "student" / "model.safetensors") for run in (whole, cut))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert rows(whole) == rows(cut)


def test_each_image_has_a_prompt_of_its_class_in_the_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class {label}\n" for label in range(4)))
    config = config_of(
        "Stable Diffusion",
        folder_of("Stable Diffusion"),
        tmp_path,
        prompts=["a {name}, {style}"],
        prompt_attributes={"style": ["red", "blue", "green"]},
    )
    classes = f"eval.classes={names}"
    for part in ("0/2", "1/2"):
        command = ["generate", str(config), classes, "--out", str(tmp_path / "images"), "--quiet"]
        command += ["--num-images", "32", "--images-per-shard", "16", "--shard", part]
        assert cli.main(command) == 0
    table = pq.read_table(tmp_path / "images" / "manifest").to_pylist()
    resolved, parts = prepare(load_config(DistillConfig, config, [classes]))
    assert isinstance(parts.origin, Denoiser)
    sampler = make_sampler(resolved, parts.origin)
    own = sampler.own_indices(torch.arange(32), torch.tensor([row["class"] for row in table]))
    assert [row["prompt"] for row in table] == [parts.origin.prompts[i] for i in own.tolist()]
    assert all(row["prompt"].startswith(f"a class {row['class']}, ") for row in table)
    assert len({row["prompt"] for row in table}) > 6


def test_the_page_leads_from_a_list_of_classes_to_a_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The config and the commands of the page, with small models and fewer images."""
    page = (ROOT / "docs" / "guides" / "your-generator.md").read_text(encoding="utf-8")
    (config,) = re.findall(r"```yaml\n(name: .*?)```", page, re.S)
    (zero_shot,) = re.findall(r"`dmkd (import teacher --zero-shot [^`]*)`", page)
    (block,) = re.findall(r"```console\n(\$ dmkd plan birds.yaml.*?)```", page, re.S)
    commands = re.findall(r"\$ dmkd ([^#\n]*)", block)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder_of("FLUX.1 schnell"), "models/flux1-schnell")
    clip_folder(Path("models/clip"))
    for number, name in enumerate(("robin", "crane bird", "wren")):
        folder = Path("data/birds/test", name)
        folder.mkdir(parents=True)
        picture(number, 32, 32).save(folder / "0.png")
    Path("classes.txt").write_text("robin\ncrane bird\nwren\n")
    Path("birds.yaml").write_text(config)
    small = "dtype=float32 num_threads=1 denoiser.image_size=16 sampler.micro_batch_images=4"
    small += " sampler.compile=false train.compile=false ring.capacity_images=16 views.size=16"
    small += " ring.min_fill_images=8 ring.samples_per_insert=4 train.batch_size=4"
    small += " train.num_views=48 eval.num_points=1 student.arch=cifar_resnet8 run_dir=runs/NAME"
    picture(0, 32, 32).save("photo.jpg")

    assert cli.main(shlex.split(zero_shot)) == 0
    verbs = []
    for command in commands:
        words = shlex.split(command)
        verbs.append(words[0])
        if words[0] == "plan":
            words += ["--images-per-s", "10", "--views-per-s", "10"]
        if "--num-images" in words:
            words[words.index("--num-images") + 1] = "8"
        assert cli.main([*words, *(small.split() if "birds.yaml" in words else [])]) == 0, command
    assert verbs == ["plan", "generate", "distill", "predict"]
    assert "crane bird" in capsys.readouterr().out
