"""One override replaces a choice: fields that belong to the old one are reset, in one warning."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from small_jobs import ROOT

from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.runtime import errors
from dmkd_fast.runtime.errors import UserError

CONFIGS = ROOT / "configs"


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())


@pytest.mark.parametrize(
    ("file", "override", "warnings"),
    [
        (
            "fashion_mnist",
            "sampler.fidelity=high",
            [
                "sampler.fidelity='high' replaces the config's sampler.num_steps, "
                "sampler.guidance_scale"
            ],
        ),
        (
            "fashion_mnist",
            "student.arch=lenet5",
            ["student.arch='lenet5' replaces the config's student.model_args, student.stem"],
        ),
        (
            "paper/imagenet",
            "teacher.path=teachers/mine",
            ["teacher.path='teachers/mine' replaces the config's teacher.arch, teacher.pretrained"],
        ),
        (
            "paper/cifar100",
            "denoiser.path=models/mine",
            ["denoiser.path='models/mine' replaces the config's denoiser.revision"],
        ),
        (
            "paper/imagenet",
            "optim.name=adamw",
            [
                "optim.name='adamw' replaces the config's optim.nesterov",
                "optim.name='adamw' keeps the config's optim.lr=0.1; set optim.lr too, since a "
                "rate belongs to its optimizer",
            ],
        ),
        (
            "fashion_mnist",
            "teacher.path=embedded:fashion_mnist/weak",
            ["teacher.path='embedded:fashion_mnist/weak' replaces the config's more_teachers"],
        ),
        ("fashion_mnist", "teacher.path=embedded:fashion_mnist/strong", []),
        ("fashion_mnist", "student.arch=resnet18", []),
        ("fashion_mnist", "optim.name=muon", []),
    ],
)
def test_one_override_is_enough(
    file: str, override: str, warnings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = CONFIGS / f"{file}.yaml"
    name, _, value = override.partition("=")
    section, field = name.split(".")
    with caplog.at_level(logging.WARNING, logger="dmkd_fast"):
        config = load_config(DistillConfig, path, [override])
        nested = load_config(DistillConfig, path, {section: {field: value}})
    assert config == nested and getattr(getattr(config, section), field) == value
    assert caplog.messages == warnings


def test_fields_that_overrides_set_are_kept_and_contradictions_stay_errors() -> None:
    changes = ["student.arch=resnet34", "student.stem=conv3"]
    config = load_config(DistillConfig, CONFIGS / "fashion_mnist.yaml", changes)
    assert config.student.stem == "conv3" and config.student.model_args == {}
    both = ["sampler.fidelity=high", "sampler.num_steps=9"]
    with pytest.raises(ValueError, match="got 9 beside fidelity=high"):
        load_config(DistillConfig, CONFIGS / "many_steps.yaml", both)


def test_further_teachers_go_with_the_first_one_unless_an_override_names_them() -> None:
    path, other = CONFIGS / "fashion_mnist.yaml", [{"path": "other"}]
    for alone in (["teacher.path=mine"], ["teacher={path: mine}"], {"teacher": {"path": "mine"}}):
        config = load_config(DistillConfig, path, alone)
        assert [teacher.path for teacher in config.teachers.values()] == ["mine"]
    for named in (
        ["teacher.path=mine", "more_teachers=[{path: other}]"],
        {"teacher": {"path": "mine"}, "more_teachers": other},
    ):
        config = load_config(DistillConfig, path, named)
        assert [teacher.path for teacher in config.teachers.values()] == ["mine", "other"]
    for kept in (["teacher.stop=0.5"], ["teacher={path: 'embedded:fashion_mnist/strong'}"]):
        assert len(load_config(DistillConfig, path, kept).more_teachers) == 1


def test_a_rate_that_an_override_sets_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    path = CONFIGS / "fashion_mnist.yaml"
    with caplog.at_level(logging.WARNING, logger="dmkd_fast"):
        load_config(DistillConfig, path, ["optim.name=adamw", "optim.lr=2e-3"])
        load_config(DistillConfig, path, ["optim={name: adamw, lr: 2.0e-3}"])
        load_config(DistillConfig, path, {"optim": {"name": "adamw", "lr": 2e-3}})
    assert caplog.messages == []


def test_a_field_that_a_section_does_not_have_stays_an_error(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    text = (CONFIGS / "many_steps.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("  arch: resnet18", "  arch: resnet18\n  pretrained: true"))
    with pytest.raises(UserError, match=r"unknown key 'student\.pretrained'"):
        load_config(DistillConfig, path, ["student.arch=lenet5"])


def test_a_choice_in_a_section_that_is_removed_again_is_one_line() -> None:
    overrides = ["denoiser.path=x", "denoiser=null", "source.path=y"]
    with pytest.raises(UserError, match="sampler: got it beside source"):
        load_config(DistillConfig, CONFIGS / "many_steps.yaml", overrides)
