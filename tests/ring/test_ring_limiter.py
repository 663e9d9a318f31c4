"""The limiter: its bounds, and exactly which settings let a loop run without end."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from dmkd_fast import RingPlan
from dmkd_fast.ring.limiter import Limiter


def plan(spi: float = 3, fill: int = 4, block: int = 4, error: float | None = None) -> RingPlan:
    return RingPlan(
        capacity_images=fill + 9 * block,
        image_shape=(1, 1, 1),
        block_images=block,
        samples_per_insert=spi,
        min_fill_images=fill,
        error_buffer=error,
    )


def limiter(*sizes: Any, **more: Any) -> Limiter:
    return Limiter(plan(*sizes, **more))


def some_schedule_stops(plan: RingPlan, batch: int) -> bool:
    """Walks through every state that any schedule of inserts and draws can reach.

    What is allowed depends, once filled, on the views missing alone, so states with the same number
    of those are one; there are few of them.
    """
    rule, seen, todo = Limiter(plan), set(), [(0, 0)]
    while todo:
        inserted, sampled = todo.pop()
        is_filled = inserted >= rule.min_fill_images
        key = (plan.reuse * inserted - sampled, None if is_filled else inserted)
        if key in seen:
            continue
        seen.add(key)
        rule.num_inserted = rule.num_reserved = inserted
        rule.num_sampled = sampled
        can_sample, can_insert = rule.may_sample(batch), rule.may_insert()
        if not can_sample and not can_insert:
            return True
        if can_sample:
            todo.append((inserted, sampled + batch))
        if can_insert:
            todo.append((inserted + rule.block_images, sampled))
    return False


def accepts(plan: RingPlan, batch: int) -> bool:
    try:
        plan.check_batch(batch)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("spi", [0.3, 0.5, 1, 1.5, 2, 2.5, 3, 20])
def test_settings_are_accepted_exactly_if_no_schedule_ever_stops(spi: float) -> None:
    errors = [None, 0.2, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 7, 8, 10, 13, 60]
    verdicts = []
    for fill, block, batch, error in itertools.product((1, 2, 5), range(1, 6), range(1, 8), errors):
        sizes = plan(spi, fill, block, error)
        accepted, stops = accepts(sizes, batch), some_schedule_stops(sizes, batch)
        assert accepted != stops, (spi, fill, block, batch, error)
        verdicts.append(accepted)
    assert 100 < sum(verdicts) < len(verdicts) - 100  # both kinds are there in numbers


def test_reuse_stays_within_the_buffer_under_any_schedule() -> None:
    for seed in range(50):
        pick = random.Random(seed)
        sizes = plan(pick.choice([1, 1.3, 2.5, 4]), 8, 4, pick.choice([None, 16.0, 20.5]))
        batch, low, high = pick.choice([1, 3, 8]), -sizes.reuse_buffer, sizes.reuse_buffer
        sizes.check_batch(batch)
        rule = Limiter(sizes)
        for _ in range(300):
            if rule.may_insert() and pick.random() < 0.5:
                rule.num_inserted += 4
                rule.num_reserved += 4
            elif rule.may_sample(batch):
                rule.num_sampled += batch
            if rule.num_inserted >= 8:
                target = sizes.reuse * (rule.num_inserted - 8)
                assert low <= target - rule.num_sampled <= high
                assert float(target - rule.num_sampled) == pytest.approx(rule.error)


def test_by_default_views_never_exceed_reuse_and_decimals_are_exact() -> None:
    rule = limiter(0.1, fill=10, block=10)
    rule.num_inserted = rule.num_reserved = 30
    assert rule.may_sample(3) and not rule.may_sample(4)  # 0.1 * 30 is 3 and not a little less


def test_blocks_being_written_count_against_the_next_insert() -> None:
    rule = limiter(2, fill=4, block=4, error=8.0)
    rule.num_inserted = rule.num_reserved = 4
    assert rule.may_insert()
    rule.num_reserved = 8  # reserved, not committed: drawing sees 4 images, inserting 8
    assert not rule.may_insert() and rule.may_sample(8) and not rule.may_sample(9)


def test_the_limiter_is_exact_at_its_band() -> None:
    rule = limiter(2.0, fill=5, block=4, error=6.0)
    assert rule.min_fill_images == 8 and not rule.may_sample(1)
    rule.num_inserted = rule.num_reserved = 7
    assert rule.may_insert() and not rule.may_sample(1)
    rule.num_inserted = rule.num_reserved = 8
    assert rule.may_sample(6) and not rule.may_sample(7) and not rule.may_insert()  # x would be 8
    rule.num_sampled = 1
    assert not rule.may_insert()
    rule.num_sampled = 2
    assert rule.may_insert() and rule.error == -2.0


def test_the_missing_images_are_the_fewest_blocks_that_allow_the_views() -> None:
    pick = random.Random(5)
    for _ in range(300):
        rule = limiter(pick.choice((0.5, 3, 16)), pick.randrange(1, 30), pick.randrange(1, 9))
        rule.num_inserted = rule.block_images * pick.randrange(20)
        rule.num_sampled, count = pick.randrange(200), pick.randrange(1, 100)
        missing = rule.num_missing(count)
        assert missing % rule.block_images == 0 and (missing == 0) == rule.may_sample(count)
        rule.num_inserted += missing
        assert rule.may_sample(count)
        rule.num_inserted -= rule.block_images
        assert missing == 0 or not rule.may_sample(count)
