"""The limiter: its bounds, and exactly which settings let a loop run for ever."""

from __future__ import annotations

import itertools
import random

import pytest

from dmkd_fast.ring.limiter import Limiter, check_loop, check_ring


def limiter(spi: float = 3, fill: int = 4, block: int = 4, error: float | None = None) -> Limiter:
    return Limiter(spi, min_fill_images=fill, block_images=block, error_buffer=error)


def some_schedule_stops(rule: Limiter, batch: int) -> bool:
    """Walks through every state that any schedule of inserts and draws can reach.

    What is allowed depends, once filled, on the views missing alone, so states with the same number
    of those are one; there are few of them.
    """
    seen, todo = set(), [(0, 0)]
    while todo:
        inserted, sampled = todo.pop()
        is_filled = inserted >= rule.min_fill_images
        key = (rule.reuse * inserted - sampled, None if is_filled else inserted)
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


def accepts(rule: Limiter, batch: int) -> bool:
    try:
        rule.check(batch)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("spi", [0.3, 0.5, 1, 1.5, 2, 2.5, 3, 20])
def test_settings_are_accepted_exactly_if_no_schedule_ever_stops(spi: float) -> None:
    errors = [None, 0.2, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 7, 8, 10, 13, 60]
    verdicts = []
    for fill, block, batch, error in itertools.product((1, 2, 5), range(1, 6), range(1, 8), errors):
        accepted = accepts(limiter(spi, fill, block, error), batch)
        stops = some_schedule_stops(limiter(spi, fill, block, error), batch)
        assert accepted != stops, (spi, fill, block, batch, error)
        verdicts.append(accepted)
    assert 100 < sum(verdicts) < len(verdicts) - 100  # both kinds are there in numbers


def test_reuse_stays_within_the_buffer_under_any_schedule() -> None:
    for seed in range(50):
        pick = random.Random(seed)
        rule = limiter(pick.choice([1, 1.3, 2.5, 4]), 8, 4, pick.choice([None, 16.0, 20.5]))
        batch, low, high = pick.choice([1, 3, 8]), -rule.buffer, rule.buffer
        rule.check(batch)
        for _ in range(300):
            if rule.may_insert() and pick.random() < 0.5:
                rule.num_inserted += 4
                rule.num_reserved += 4
            elif rule.may_sample(batch):
                rule.num_sampled += batch
            if rule.num_inserted >= 8:
                target = rule.reuse * (rule.num_inserted - 8)
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


def test_each_setting_that_would_stop_is_refused_with_what_to_change() -> None:
    with pytest.raises(ValueError, match=r"error_buffer: got 3, .* wait .* expected 8 or more"):
        limiter(3, fill=4, block=4, error=3).check(4)
    with pytest.raises(ValueError, match=r"samples_per_insert: got 0\.5, .*raise .*min_fill_image"):
        limiter(0.5, fill=4, block=4).check(64)
    with pytest.raises(ValueError, match=r"batch_size: got 9, expected at most 8, .*raise capac"):
        check_loop(limiter(20), batch_size=9, most_drawable=8)
    for name in ("spi", "fill", "block", "error"):
        with pytest.raises(ValueError, match="expected a positive number"):
            limiter(**{name: 0})  # type: ignore[arg-type]


RING = {
    "block_images": 4,
    "min_fill_images": 4,
    "guard_blocks": 1,
    "samples_per_insert": 3.0,
    "order": "shuffled",
    "max_uses": None,
    "num_classes": None,
}


@pytest.mark.parametrize(
    ("capacity", "changes", "words"),
    [
        (7, {"guard_blocks": 0}, "capacity_images: got 7, expected at least 8"),
        (11, {"guard_blocks": 2}, r"capacity_images: got 11, expected at least 12 \(3 blocks of 4"),
        (12, {"min_fill_images": 9}, "min_fill_images: got 9, expected at most 8"),
        (12, {"guard_blocks": -1}, "guard_blocks: got -1"),
        (
            12,
            {"order": "random"},
            "order: got 'random', expected shuffled, equal, uniform or balanced",
        ),
        (12, {"order": "balanced"}, "num_classes: got None with order=balanced"),
        (12, {"max_uses": 2}, "max_uses: got 2, expected at least samples_per_insert=3"),
        (12, {"max_uses": 9, "order": "uniform"}, "max_uses: got 9 with order=uniform"),
    ],
)
def test_sizes_and_settings_that_do_not_fit_are_refused(
    capacity: int, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check_ring(capacity, **(RING | changes))  # type: ignore[arg-type]
    check_ring(12, **RING)  # type: ignore[arg-type]
