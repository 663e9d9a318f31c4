"""Each training step of the comparison differs from the last one in one thing."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import torch


def test_steps_alone_differ_in_what_their_names_say() -> None:
    from benchmarks.job import step
    from benchmarks.job.arms import ARMS, BF16, CHANNELS_LAST, PUBLISHED, TARGET

    torch.set_num_threads(1)
    for call in step.arms(("train.batch_size=4",)).values():
        call()
    recipes = [ARMS[name].recipe for name in (PUBLISHED, TARGET, BF16, CHANNELS_LAST)]
    for before, after in itertools.pairwise(recipes):
        assert before and after
        one, other = asdict(before), asdict(after)
        assert sum(one[name] != other[name] for name in one) == 1
