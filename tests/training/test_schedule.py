"""Length, evaluations and learning rate of a run, at their boundaries."""

from __future__ import annotations

import dataclasses
import math

import pytest

from dmkd_fast import Schedule
from dmkd_fast.config.jobs import EvalConfig
from dmkd_fast.config.training import OptimConfig, TrainConfig
from dmkd_fast.runtime.checks import check_accumulate, check_milestones
from dmkd_fast.training.schedule import lr_at


def test_evaluations_are_spread_evenly_and_the_last_step_is_one() -> None:
    for num_steps in range(1, 40):
        for count in range(1, 60):
            schedule = Schedule(batch_size=1, num_views=num_steps, lr=1.0, num_evaluations=count)
            expected = {num_steps * (i + 1) // count for i in range(count)} - {0}
            found = {step for step in range(num_steps + 1) if schedule.is_evaluated(step)}
            assert found == expected and num_steps in found, (num_steps, count)


def test_steps_are_rounded_up_and_parts_divide_the_batch() -> None:
    for views, steps in ((63, 1), (64, 1), (65, 2), (128, 2), (129, 3)):
        assert Schedule(batch_size=64, num_views=views, lr=1.0).num_steps == steps
    check_accumulate(64, batch_size=64)
    for accumulate in (0, -1, 63, 65, 128):
        with pytest.raises(ValueError, match="accumulate"):
            check_accumulate(accumulate, batch_size=64)


def test_warm_up_reaches_the_peak_at_its_last_step_and_the_cosine_ends_at_zero() -> None:
    rates = [lr_at(step, num_steps=10, peak=2.0, warmup=0.4) for step in range(12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[7] == pytest.approx(1.0) and rates[5] == pytest.approx(1 + math.cos(math.pi / 6))
    assert rates[10] == rates[11] == 0
    assert lr_at(0, num_steps=1, peak=2.0, warmup=0.0) == 2.0
    assert lr_at(1, num_steps=1, peak=2.0, warmup=0.0) == 0.0


def test_milestones_lie_strictly_inside_the_run_and_not_before_the_warm_up() -> None:
    check_milestones([0.2, 0.5], warmup=0.2)
    check_milestones([], warmup=0.9)
    for points in ([0.0], [1.0], [0.5, 0.5], [0.5, 0.2], [0.19]):
        with pytest.raises(ValueError, match="milestones"):
            check_milestones(points, warmup=0.2)
    with pytest.raises(ValueError, match="milestones"):
        check_milestones([0.0], warmup=0.0)
    rates = [
        lr_at(s, num_steps=5, peak=1.0, warmup=0.0, milestones=[0.5], decay=0.5) for s in range(5)
    ]
    assert rates == [1.0, 1.0, 0.5, 0.5, 0.5]  # round(2.5) is 2


def test_defaults_are_those_of_the_settings() -> None:
    ours = {field.name: field.default for field in dataclasses.fields(Schedule)}
    for section in (OptimConfig, TrainConfig):
        for name, field in section.model_fields.items():
            if name in ours and not field.is_required():
                assert ours[name] == field.default, name
    assert ours["num_evaluations"] == EvalConfig.model_fields["num_points"].default
