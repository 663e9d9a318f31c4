"""Each training step of the comparison differs from the last one in one thing."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import torch
from torch import nn

from dmkd_fast import InputSpec, Teacher, Teachers


def test_steps_alone_differ_in_what_their_names_say() -> None:
    from benchmarks.job.arms import ARMS, BF16, CHANNELS_LAST, PUBLISHED, TARGET
    from benchmarks.parts import step

    torch.set_num_threads(1)
    for call in step.arms(("train.batch_size=4",)).values():
        call()
    recipes = [ARMS[name].recipe for name in (PUBLISHED, TARGET, BF16, CHANNELS_LAST)]
    for before, after in itertools.pairwise(recipes):
        assert before and after
        one, other = asdict(before), asdict(after)
        assert sum(one[name] != other[name] for name in one) == 1


def test_two_teachers_of_a_baseline_teach_what_those_of_a_job_do() -> None:
    from benchmarks.job.baseline import Ensemble

    torch.manual_seed(0)
    input = InputSpec(size=4, mean=(0.5,), std=(0.5,))
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(16, 5)) for _ in range(2)]
    views, labels = 9 * torch.randn(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64)
    job = Teachers([Teacher(module=n, input=input) for n in networks], temperature=4.0)
    theirs = Ensemble(networks, 4.0)(views)
    torch.testing.assert_close(theirs, job({input: views}, labels, 0.0))
    assert (theirs - networks[0](views)).abs().max() > 0.1
