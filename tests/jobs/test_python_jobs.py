"""Whole jobs from Python: `dmkd_fast.distill` and `dmkd_fast.evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import CONFIG, SHORT

from dmkd_fast import UserError, distill, evaluate
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import dump_config, load_config
from dmkd_fast.jobs.parts import prepare


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Summary of a short run, from a file and nested changes."""
    folder = tmp_path_factory.mktemp("python")
    short = load_config(DistillConfig, CONFIG, SHORT)
    path = folder / "job.yaml"
    path.write_text(dump_config(short), encoding="utf-8")
    train = {"num_views": 320, "log_every_steps": 10}
    return distill(path, show=False, seed=3, train=train, run_dir=folder / "run")


def test_distill_runs_a_whole_job_with_changed_settings(finished: dict[str, Any]) -> None:
    folder = Path(finished["run_dir"])
    assert finished == json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert finished["views"] == 320
    saved = load_config(DistillConfig, folder / "config.yaml")
    assert (saved.seed, saved.train.num_views, saved.train.batch_size) == (3, 320, 32)


def test_evaluate_finds_the_scores_of_a_run_and_of_a_classifier(finished: dict[str, Any]) -> None:
    run = evaluate(finished["run_dir"])
    assert {name: run.scores[name] for name in ("top1", "top5", "agreement")} == {
        name: finished[name] for name in ("top1", "top5", "agreement")
    }
    data = load_config(DistillConfig, Path(finished["run_dir"]) / "config.yaml").eval.path
    student = evaluate(Path(finished["run_dir"]) / "student", data)
    assert student.num_images == run.num_images
    assert student.scores["top1"] == run.scores["top1"] and len(student.classes) == 10


def test_a_config_can_be_given_in_place_of_a_path(finished: dict[str, Any], tmp_path: Path) -> None:
    config = load_config(DistillConfig, Path(finished["run_dir"]) / "config.yaml")
    again = distill(config, show=False, run_dir=tmp_path / "again")
    assert {name: again[name] for name in ("top1", "agreement", "views")} == {
        name: finished[name] for name in ("top1", "agreement", "views")
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 64}, r"unknown key 'batch_size'; did you mean 'train\.batch_size'\?"),
        ({"train": {"num_views": 0}}, "train.num_views: got 0, expected"),
        ({"train": 3}, "train: got 3, expected a section"),
        ({"device": "tpu"}, "device: got 'tpu'"),
        ({"teacher": {"path": "embedded:fashion_mnist/best"}}, "no such asset"),
        ({"resume": True, "seed": 1}, "--resume: got seed, expected no setting but run_dir"),
        ({"resume": True, "run_dir": "nowhere"}, "--resume: got no run and no checkpoint"),
    ],
)
def test_a_wrong_setting_raises_a_user_error_and_writes_nothing(
    changes: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        distill(CONFIG, show=False, **changes)
    assert not list(tmp_path.iterdir())


def test_teachers_of_a_job_are_averaged_at_the_temperature_of_its_loss() -> None:
    more = "more_teachers=[{path: 'embedded:fashion_mnist/lenet5'}]"
    _, parts = prepare(load_config(DistillConfig, CONFIG, [*SHORT, more, "loss.temperature=2"]))
    members = parts.teachers.together.members
    images, labels = torch.rand(3, 1, 28, 28), torch.zeros(3, dtype=torch.int64)
    found = parts.teachers.together({member.input: images for member in members}, labels, 0.0)
    mean = sum((member.module(images) / 2).softmax(dim=1) for member in members) / len(members)
    assert len(members) == 2
    torch.testing.assert_close(found, 2 * mean.log(), rtol=1e-4, atol=1e-4)


def test_evaluate_raises_a_user_error_too(tmp_path: Path) -> None:
    for arguments, words in (
        ((tmp_path,), "config.yaml of a run"),
        (("embedded:fashion_mnist/weak",), "--data: got none"),
        (("resnte18", "embedded:fashion_mnist/test"), "such as resnet18"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate(*arguments)
