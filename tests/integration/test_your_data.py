"""The guide from a folder of images to a student: every file and command on the page, in order."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
import time
from pathlib import Path
from typing import Any

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


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run a command in this process, print its seconds, and return its lines of output."""
    start = time.monotonic()
    assert cli.main(arguments) == 0, arguments
    lines = capsys.readouterr().out.strip().splitlines()
    with capsys.disabled():
        print(f"{' '.join(arguments[:3])}: {time.monotonic() - start:.0f} s")
    return lines


def test_the_script_of_the_guide_splits_each_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files_and_commands(tmp_path)
    for number in range(12):
        folder = tmp_path / "pictures" / f"class {number % 2}" / f"part {number % 3}"
        path = folder / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    arguments = ["split.py", str(tmp_path / "pictures"), str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(tmp_path / "split.py"))
    copies = [*(tmp_path / "data").rglob("*.png")]
    assert sorted(int(path.read_text()) for path in copies) == list(range(12))
    for part, count in (("train", 5), ("test", 1)):
        for name in ("class 0", "class 1"):
            assert len([*(tmp_path / "data" / part / name).rglob("*.png")]) == count


@pytest.mark.slow
def test_the_guide_leads_from_a_folder_to_a_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """About 140 s as separate commands on two idle cores, 51 s of them for the denoiser."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    begun, cpu_begun = time.monotonic(), time.process_time()
    results: dict[str, Any] = {}
    printed = []
    for program, *arguments in files_and_commands(tmp_path):
        if program == "python":
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_path(arguments[0], run_name="__main__")
            continue
        assert program == "dmkd"
        lines = run(arguments, capsys)
        if arguments[0] == "init":
            printed = [line.partition("  #")[0].strip() for line in lines]
        key = " ".join(arguments[:2])
        results[key] = json.loads(lines[-1]) if arguments[0] != "predict" else lines
        assert arguments[0] in ("init", "predict", "export", "evaluate") or (
            " ".join(["dmkd", *arguments]) in printed  # by `dmkd init own-data`
        )
    wall_s, cpu_s = time.monotonic() - begun, time.process_time() - cpu_begun

    source = ["source.path=data/train", "source.image_size=24"]
    command = ["distill", "distill.yaml", "run_dir=runs/real", "denoiser=null", "sampler=null"]
    real_top1 = json.loads(run([*command, *source], capsys)[-1])["top1"]
    real = load_real(tmp_path / "data", CPU, RealImagesConfig(image_size=24))
    assert real.test is not None and len(real.train.class_names) >= 6
    easy = nearest_mean_top1(real.train, real.test)
    student, teacher = results["distill distill.yaml"], results["pretrain teacher"]
    with capsys.disabled():
        print(f"nearest class mean {easy:.3f}, teacher {teacher['test_top1']:.3f}, ", end="")
        print(f"student {student['top1']:.3f}, on real images {real_top1:.3f}; ", end="")
        print(f"{wall_s:.0f} s, {cpu_s:.0f} CPU s; predicted {results['init own-data']}")
    assert easy <= 0.5
    assert teacher["test_top1"] >= 0.9
    assert results["evaluate runs/teacher/model"]["top1"] == teacher["test_top1"]
    assert student["top1"] >= 0.8 and student["top1"] >= 0.9 * real_top1
    assert cpu_s <= 600
    assert (tmp_path / "runs/student/report.html").is_file()
    assert load_classifier(tmp_path / "runs/student/student", CPU)[1].label_names == tuple(
        real.train.class_names
    )
    assert results["predict runs/student"][0] == "data/test/ring/0000.png"
    assert results["export runs/student"]["top1"] == pytest.approx(student["top1"])
