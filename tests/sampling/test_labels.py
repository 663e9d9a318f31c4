"""Labels of image ids on several ranks, and labels dropped in training."""

from __future__ import annotations

import pytest
import torch

from dmkd_fast import LabelStream
from dmkd_fast.jobs.pretrain.denoiser import drop_labels


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_take_turns_at_consecutive_ids(world_size: int) -> None:
    streams = [LabelStream(7, seed=3, rank=r, world_size=world_size) for r in range(world_size)]
    alone = LabelStream(7, seed=3)
    for count in (5, 4):
        ids, labels = (torch.cat(t) for t in zip(*(s.peek(count) for s in streams), strict=True))
        expected = alone.peek(count * world_size)
        assert torch.equal(ids, expected[0]) and torch.equal(labels, expected[1])
        for stream in streams:
            stream.advance(count)
        alone.advance(count * world_size)


def test_labels_are_dropped_by_one_decision_for_each_example() -> None:
    torch.manual_seed(0)
    labels = torch.arange(20_000) % 10
    dropped = drop_labels(labels, 10, 0.3)
    share = (dropped == 10).double()
    assert abs(share.mean() - 0.3) < 0.015
    assert torch.equal(dropped[dropped < 10], labels[dropped < 10])
    assert abs((share[1:] * share[:-1]).mean() - 0.09) < 0.01
