"""`GeneratedLoader`: the views of a run, replayed bit for bit, one epoch after the other."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from small_jobs import CONFIG, SHORT
from torch import Tensor

from dmkd_fast import GeneratedLoader
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs.build import build
from dmkd_fast.jobs.parts import prepare
from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.runtime.errors import UserError
from examples.plain_loop import train

MIX = {"mix": {"cutmix_alpha": 1.0, "mixup_alpha": 0.5}}
TWO_RANKS = ["ring.capacity_images=256", "ring.min_fill_images=128"]  # blocks of 64 images each
TWO = {"ranks": Ranks(rank=1, world_size=2, local_world_size=2, local_rank=1)}


def config(**changes: Any) -> DistillConfig:
    base = load_config(DistillConfig, CONFIG, [*SHORT, *TWO_RANKS])
    return load_config(DistillConfig, base, changes)


def loader(**changes: Any) -> GeneratedLoader:
    return GeneratedLoader(config(), **({"steps_per_epoch": 10} | changes))


def take(source: Any, count: int) -> list[tuple[Tensor, ...]]:
    return list(itertools.islice(source, count))


def assert_same(one: list[tuple[Tensor, ...]], other: list[tuple[Tensor, ...]]) -> None:
    assert len(one) == len(other)
    for batch, again in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        MIX,
        {"train": {"accumulate": 2}},
        TWO,
        {"more_teachers": [{"path": "embedded:fashion_mnist/strong"}]},
    ],
    ids=["plain", "mixed", "micro-batches", "rank 1 of 2", "two teachers"],
)
def test_batches_are_those_that_the_student_of_a_run_learns_from(changes: dict[str, Any]) -> None:
    settings = {name: value for name, value in changes.items() if name != "ranks"}
    job, parts = prepare(config(**settings), changes.get("ranks", ALONE))
    distiller = build(job, parts, show=False)
    seen: list[tuple[Tensor, ...]] = []
    learn = distiller.student.learn

    def recorded(views: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        seen.append((views.clone(), target.clone(), teacher_logits.clone()))
        return learn(views, teacher_logits, target)

    distiller.student.learn = recorded  # type: ignore[method-assign]
    for _ in range(20):
        distiller.refill()
        distiller.train_step()
    pieces = job.schedule.accumulate
    whole = [seen[i : i + pieces] for i in range(0, len(seen), pieces)]
    expected = [tuple(torch.cat(field) for field in zip(*some, strict=True)) for some in whole]
    with_logits = loader(**changes, teacher_logits=True)
    assert_same(take(with_logits, 10) + take(with_logits, 10), expected)
    alone = take(loader(**changes, steps_per_epoch=20), 20)
    assert_same(alone, [batch[:2] for batch in expected])
    assert alone[0][0].is_contiguous(memory_format=torch.channels_last)


def test_global_random_states_stay() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    take(loader(), 3)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "at", [pytest.param(0, marks=pytest.mark.slow), 4, pytest.param(10, marks=pytest.mark.slow), 17]
)
def test_a_state_replays_bit_for_bit_and_finishes_the_pass(at: int) -> None:
    first = loader(teacher_logits=True)
    endless = itertools.chain.from_iterable(itertools.repeat(first))
    take(endless, at)
    state = copy.deepcopy(first.state_dict())
    expected = take(endless, 25)
    again = loader(teacher_logits=True)
    again.load_state_dict(state)
    again.set_epoch(at // 10)  # what loops do before each pass
    rest = list(again)
    assert len(rest) == 10 - at % 10
    assert_same([*rest, *again, *again, *again][:25], expected)


def test_a_pass_has_its_length_and_no_pass_repeats_another() -> None:
    source = loader()
    assert len(source) == 10
    one, other = list(source), list(source)
    assert len(one) == len(other) == 10 and source.step == 20
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True))
    assert take(source, 3) and len(list(source)) == 10  # after a loop that ended early


def test_set_epoch_goes_to_any_pass() -> None:
    source = loader()
    passes = []
    for epoch in range(3):
        source.set_epoch(epoch)
        passes.append(list(source))
    for epoch in (1, 0, 2):
        source.set_epoch(epoch)
        assert_same(list(source), passes[epoch])


def test_ranks_see_different_images_and_divide_the_batch() -> None:
    batches = []
    for rank in range(2):
        ranks = Ranks(rank=rank, world_size=2, local_world_size=2, local_rank=rank)
        source = loader(ranks=ranks)
        assert source.batch_size == 16
        batches.append(take(source, 1)[0][0])
    assert not torch.equal(*batches)
    assert loader(ranks=TWO["ranks"], batch_size=8).batch_size == 8


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="steps_per_epoch: got 0"):
        loader(steps_per_epoch=0)
    with pytest.raises(UserError, match=r"train\.batch_size"):
        loader(batch_size=4096)
    with pytest.raises(UserError, match=r"optim\.lr"):
        loader(optim={"lr": -1})
    with pytest.raises(UserError, match="epoch: got -1"):
        loader().set_epoch(-1)
    with pytest.raises(UserError, match="batch_size: got a state of batches of 16, expected 32"):
        loader().load_state_dict(loader(batch_size=16).state_dict())


def test_the_ordinary_loop_of_the_examples_trains() -> None:
    student = prepare(config())[1].student
    before = [p.detach().clone() for p in student.parameters()]
    averages = list(train(student, loader(steps_per_epoch=3, teacher_logits=True), 2))
    assert len(averages) == 2
    # Weight decay alone would change the weights as well.
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    for old, new, mean in zip(before, student.parameters(), averages[1].parameters(), strict=True):
        assert not torch.equal(old, new) and not torch.equal(new, mean)
        assert mean.isfinite().all()
