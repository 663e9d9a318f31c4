"""The plan of a ring: its bounds, its bytes, its division among ranks, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from rings import new_ring

from dmkd_fast import RingPlan
from dmkd_fast.ring.orders import check_order
from dmkd_fast.runtime.distributed import Ranks

SIZES: dict[str, Any] = {
    "capacity_images": 12,
    "image_shape": (3, 5, 7),
    "block_images": 4,
    "samples_per_insert": 3.0,
    "min_fill_images": 4,
}
SMALL = RingPlan(**SIZES)


def test_bytes_of_a_ring_are_those_of_its_whole_blocks() -> None:
    for capacity, slots in ((8, 8), (9, 12), (12, 12)):
        plan = replace(SMALL, capacity_images=capacity)
        assert sum(plan.num_bytes.values()) == slots * (105 + 4 * 8 + 4)
        assert plan.num_slots == slots
    block = 4 * 141
    for have, most in ((-1, 0), (0, 0), (block - 1, 0), (block, 4), (3 * block - 1, 8)):
        assert SMALL.largest_capacity(have) == most


def test_sizes_are_accepted_up_to_their_limits() -> None:
    for guard, blocks in ((0, 2), (1, 2), (2, 3), (3, 4)):
        replace(SMALL, capacity_images=4 * blocks, guard_blocks=guard, max_uses=3)
        with pytest.raises(ValueError, match="capacity_images"):
            replace(SMALL, capacity_images=4 * blocks - 1, guard_blocks=guard)
    for guard, most in ((0, 12), (1, 12), (2, 8)):
        sizes = {"capacity_images": 14, "guard_blocks": guard}
        assert replace(SMALL, **sizes, min_fill_images=most).first_fill_images == most
        with pytest.raises(ValueError, match="min_fill_images"):
            replace(SMALL, **sizes, min_fill_images=most + 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"capacity_images": 7}, "capacity_images: got 7, expected at least 8"),
        (
            {"capacity_images": 11, "guard_blocks": 2},
            r"capacity_images: got 11, expected at least 12 \(3 blocks of 4",
        ),
        ({"min_fill_images": 9}, "min_fill_images: got 9, expected at most 8"),
        ({"min_fill_images": 0}, "min_fill_images: got 0, expected 1 to"),
        ({"block_images": 0}, "block_images: got 0, expected 1 to"),
        ({"image_shape": (3, 5)}, r"image_shape: got \(3, 5\), expected \(channels"),
        ({"guard_blocks": -1}, "guard_blocks: got -1"),
        ({"max_uses": 2}, "max_uses: got 2, expected at least samples_per_insert=3"),
        ({"max_uses": 2**24 + 1}, "max_uses: got 16777217, expected 1 to 16777216"),
        ({"samples_per_insert": 2**24 + 1}, "samples_per_insert: got 16777217"),
        *(
            ({name: bad}, f"{name}: got {bad}, expected a finite number of more than 0")
            for name in ("samples_per_insert", "error_buffer")
            for bad in (math.inf, math.nan, 0.0, -1.0)
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "random"}, "order: got 'random', expected shuffled, equal, uniform or balanced"),
        ({"name": "balanced"}, "num_classes: got None with order=balanced"),
        ({"name": "balanced", "num_classes": 2**15 + 1}, "num_classes: got 32769, expected 1 to"),
        ({"name": "uniform", "max_uses": 9}, "max_uses: got 9 with order=uniform"),
    ],
)
def test_orders_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    settings = {"max_uses": None, "num_classes": None} | settings
    with pytest.raises(ValueError, match=words):
        check_order(**settings)
    with pytest.raises(ValueError, match=words):
        new_ring(order=settings.pop("name"), **settings)
    for name in ("shuffled", "equal"):
        check_order(name, max_uses=9, num_classes=None)
    check_order("balanced", max_uses=None, num_classes=1)


def test_each_setting_that_would_stop_is_refused_with_what_to_change() -> None:
    with pytest.raises(
        ValueError, match=r"error_buffer: got 3, .* off by 3 .* expected 8 .*deadlock; raise error"
    ):
        replace(SMALL, error_buffer=3).check_batch(4)
    with pytest.raises(
        ValueError, match=r"samples_per_insert: got 0\.5, .*deadlock; .*raise .*min_fill_images"
    ):
        replace(SMALL, capacity_images=68, samples_per_insert=0.5).check_batch(64)


def test_a_batch_may_be_as_large_as_what_can_be_drawn_from() -> None:
    plan = replace(SMALL, samples_per_insert=20.0, min_fill_images=8, guard_blocks=1)
    assert plan.drawable_images == 8
    plan.check_batch(8)
    with pytest.raises(ValueError, match=r"batch_size: got 9, expected at most 8, .*raise capac"):
        plan.check_batch(9)


def test_a_rank_has_its_part_of_the_sizes_and_the_same_reuse() -> None:
    whole = replace(SMALL, capacity_images=45, min_fill_images=30, error_buffer=60, max_uses=9)
    assert whole.per_rank(Ranks()) is whole
    rank = whole.per_rank(Ranks(rank=2, world_size=3))
    assert rank == replace(
        whole, capacity_images=16, min_fill_images=8, error_buffer=20
    )  # of 48 slots; min_fill_images is rounded down
    assert replace(whole, min_fill_images=1).per_rank(Ranks(world_size=3)).min_fill_images == 4
    with pytest.raises(ValueError, match=r"capacity_images: got 48 with 5 ranks, .*blocks of 4"):
        whole.per_rank(Ranks(world_size=5))
    with pytest.raises(ValueError, match=r"capacity_images: got 4, .*\(of each of 12 ranks\)"):
        whole.per_rank(Ranks(world_size=12))
