"""The guide from a folder of images to a student: every file and command on the page, in order."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
import time
from pathlib import Path

import pytest
import torch

from dmkd_fast import cli, load_classifier
from dmkd_fast.config.data import RealImagesConfig
from dmkd_fast.data.test_sets import ImageSet
from dmkd_fast.jobs.pretrain.real_data import load_real

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "your-data.md"
CPU = torch.device("cpu")


def files_and_commands(folder: Path) -> list[list[str]]:
    text = PAGE.read_text(encoding="utf-8")
    for name, content in re.findall(r'^```\w+ title="(.+?)"\n(.*?)^```', text, re.M | re.S):
        (folder / name).write_text(content, encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.M | re.S)
    return [shlex.split(line[2:]) for block in blocks for line in block.splitlines()]


def nearest_mean_top1(train: ImageSet, test: ImageSet) -> float:
    pixels = train.images.flatten(1).double()
    classes = range(len(train.class_names))
    means = torch.stack([pixels[train.labels == k].mean(0) for k in classes])
    nearest = torch.cdist(test.images.flatten(1).double(), means).argmin(1)
    return (nearest == test.labels).double().mean().item()


@pytest.mark.slow
def test_the_guide_leads_from_a_folder_to_a_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = time.monotonic()
    monkeypatch.chdir(tmp_path)
    results = {}
    for program, *arguments in files_and_commands(tmp_path):
        if program == "python":
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_path(arguments[0], run_name="__main__")
            continue
        start = time.monotonic()
        assert program == "dmkd" and cli.main(arguments) == 0, arguments
        out = capsys.readouterr().out.strip().splitlines()
        key = " ".join(arguments[:2])
        results[key] = json.loads(out[-1]) if arguments[0] != "predict" else out
        with capsys.disabled():
            print(f"{key}: {time.monotonic() - start:.0f} s")
    wall_s = time.monotonic() - begun
    real = load_real(tmp_path / "data", CPU, RealImagesConfig(image_size=16))
    assert real.test is not None and len(real.train.class_names) >= 6
    easy = nearest_mean_top1(real.train, real.test)
    student, teacher = results["distill distill.yaml"], results["pretrain teacher"]
    with capsys.disabled():
        print(f"nearest class mean {easy:.3f}, teacher {teacher['test_top1']:.3f}, ", end="")
        print(f"student {student['top1']:.3f}, {wall_s:.0f} s")
    assert easy <= 0.5
    assert teacher["test_top1"] >= 0.9
    assert results["evaluate runs/teacher/model"]["top1"] == teacher["test_top1"]
    assert student["top1"] >= 0.6
    assert load_classifier(tmp_path / "runs/shapes/student", CPU)[1].label_names == tuple(
        real.train.class_names
    )
    assert results["predict runs/shapes"][0] == "data/test/ring/0000.png"
    assert results["export runs/shapes"]["top1"] == pytest.approx(student["top1"])
