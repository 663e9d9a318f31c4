"""The study of levers changes one setting an arm, and scores on images that nobody trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.findings import levers
from benchmarks.harness import ROOT
from benchmarks.job.embedded import ADAMW
from dmkd_fast import ImageSet, load_idx
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config


def test_arms_are_settings_of_the_older_job_and_differ_from_it() -> None:
    shipped = ROOT / "configs" / "from_disk.yaml"
    configs = [
        load_config(DistillConfig, shipped, [*ADAMW, *words]) for words in levers.ARMS.values()
    ]
    assert configs[0].optim.name == "adamw" and not configs[0].more_teachers
    texts = {config.model_dump_json() for config in configs}
    assert len(texts) == len(levers.ARMS)


def test_the_older_settings_are_those_of_the_many_step_job() -> None:
    many = load_config(DistillConfig, ROOT / "configs" / "many_steps.yaml")
    older = load_config(DistillConfig, ROOT / "configs" / "fashion_mnist.yaml", ADAMW)
    for part in ("views", "teacher", "more_teachers", "student", "loss", "optim", "train"):
        assert getattr(older, part) == getattr(many, part)


def test_the_job_from_disk_has_the_settings_of_the_job_that_makes_its_images() -> None:
    online, disk = (
        load_config(DistillConfig, ROOT / "configs" / f"{name}.yaml")
        for name in ("fashion_mnist", "from_disk")
    )
    for part in ("ring", "views", "teacher", "more_teachers", "student", "loss", "optim", "train"):
        assert getattr(online, part) == getattr(disk, part)


def test_held_out_images_come_back_as_they_were(tmp_path: Path) -> None:
    images = torch.randint(256, (7, 1, 28, 28), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 1])
    levers.write_idx(ImageSet(images=images, labels=labels, class_names=("a", "b", "c")), tmp_path)
    found = load_idx(tmp_path, "t10k")
    assert torch.equal(found.images, images) and torch.equal(found.labels, labels)
    assert found.class_names == ("a", "b", "c")


def test_a_lever_is_compared_with_the_shipped_settings_seed_by_seed() -> None:
    stamp = {"device": "d", "date": "day"}
    rows = [
        {"arm": arm, "seed": seed, "views": 64, "held_out_top1": top1, "cpu_s": 9.0}
        | {"environment": stamp}
        for arm, values in ((levers.BASE, (0.80, 0.70)), ("x", (0.81, 0.72)))
        for seed, top1 in enumerate(values)
    ]
    text = levers.levers_table(rows)
    assert f"| x | 2 | 76.50 | +1.50 ± {12.706 / 2:.2f} | 9 |" in text
    assert f"| {levers.BASE} | 2 | 75.00 | - | 9 |" in text


@pytest.mark.slow
def test_a_student_of_an_arm_is_scored_on_the_held_out_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levers, "IMAGES", 1_024)
    images = tmp_path / "images"
    options = levers.parse(["--data", ".", "--views", "2048"])
    options.images = 1_024
    levers.make_set(images, None, options)
    test = load_idx(ROOT / "dmkd_fast" / "assets" / "fashion_mnist" / "test", "t10k")
    few = ImageSet(images=test.images[:300], labels=test.labels[:300], class_names=test.class_names)
    levers.write_idx(few, tmp_path / "held-out")
    row = levers.train(levers.BASE, 1, images, tmp_path / "held-out", options)
    assert 0.1 < row["held_out_top1"] < 0.9
    hits = 300 * row["held_out_top1"]
    assert hits == pytest.approx(round(hits), abs=0.02)
