"""One override replaces a choice: fields that belong to the old one are reset, in one warning."""

from __future__ import annotations

import logging

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
    ("file", "override", "warning"),
    [
        (
            "fashion_mnist",
            "sampler.fidelity=high",
            "sampler.fidelity='high' replaces the config's sampler.num_steps, "
            "sampler.guidance_scale",
        ),
        (
            "fashion_mnist",
            "student.arch=lenet5",
            "student.arch='lenet5' replaces the config's student.model_args, student.stem",
        ),
        (
            "paper/imagenet",
            "teacher.path=teachers/mine",
            "teacher.path='teachers/mine' replaces the config's teacher.arch, teacher.pretrained",
        ),
        (
            "paper/cifar100",
            "denoiser.path=models/mine",
            "denoiser.path='models/mine' replaces the config's denoiser.revision",
        ),
        (
            "paper/imagenet",
            "optim.name=adamw",
            "optim.name='adamw' replaces the config's optim.nesterov",
        ),
        ("fashion_mnist", "teacher.path=embedded:fashion_mnist/weak", None),
        ("fashion_mnist", "student.arch=resnet18", None),
    ],
)
def test_one_override_is_enough(
    file: str, override: str, warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = CONFIGS / f"{file}.yaml"
    name, _, value = override.partition("=")
    section, field = name.split(".")
    with caplog.at_level(logging.WARNING, logger="dmkd_fast"):
        config = load_config(DistillConfig, path, [override])
        nested = load_config(DistillConfig, path, {section: {field: value}})
    assert config == nested and getattr(getattr(config, section), field) == value
    assert caplog.messages == ([] if warning is None else [warning])


def test_fields_that_overrides_set_are_kept_and_contradictions_stay_errors() -> None:
    changes = ["student.arch=resnet34", "student.stem=conv3"]
    config = load_config(DistillConfig, CONFIGS / "fashion_mnist.yaml", changes)
    assert config.student.stem == "conv3" and config.student.model_args == {}
    both = ["sampler.fidelity=high", "sampler.num_steps=9"]
    with pytest.raises(ValueError, match="got 9 beside fidelity=high"):
        load_config(DistillConfig, CONFIGS / "many_steps.yaml", both)


def test_a_choice_in_a_section_that_is_removed_again_is_one_line() -> None:
    overrides = ["denoiser.path=x", "denoiser=null", "source.path=y"]
    with pytest.raises(UserError, match="sampler: got it beside source"):
        load_config(DistillConfig, CONFIGS / "many_steps.yaml", overrides)
