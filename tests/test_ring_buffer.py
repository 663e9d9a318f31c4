"""The ring against a plain-Python model, and its refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmkd_fast import RingBuffer


def make(capacity: int = 12, block: int = 4, spi: float = 3, fill: int = 4) -> RingBuffer:
    return RingBuffer(
        capacity, image_shape=(1, 2, 2), block_images=block, samples_per_insert=spi,
        min_fill_images=fill, seed=1,
    )  # fmt: skip


def write(ring: RingBuffer) -> None:
    """Commit a block whose pixels and labels tell the id."""
    block = ring.reserve()
    ids = torch.arange(ring.num_inserted, ring.num_inserted + ring.block_images)
    block.images.copy_((ids % 251).view(-1, 1, 1, 1).expand_as(block.images))
    ring.commit(block, ids=ids, labels=ids % 10)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    blocks=st.integers(2, 6),
    block=st.integers(1, 5),
    moves=st.lists(st.one_of(st.just("write"), st.just("abort"), st.integers(1, 20)), max_size=60),
)
def test_any_history_matches_the_model(blocks: int, block: int, moves: list) -> None:
    ring = make(blocks * block, block, spi=1e9, fill=1)
    model: dict[int, int] = {}  # id -> uses, oldest first
    inserted, torn = 0, False
    for move in moves:
        if move == "write":
            write(ring)
            for image in range(inserted, inserted + block):
                model[image] = 0
            inserted += block
            while len(model) > ring.capacity:
                model.pop(next(iter(model)))
            torn = False
        elif move == "abort":
            ring.reserve()
            ring.abort()
            torn = torn or inserted >= ring.capacity
        elif torn or not model:
            with pytest.raises(RuntimeError, match="commit a block first"):
                ring.sample(move)
        else:
            draw = ring.sample(move)
            for image, use, slot in zip(
                draw.ids.tolist(), draw.uses.tolist(), draw.indices.tolist(), strict=True
            ):
                assert image in model and use <= model[image]
                assert (ring.images[slot] == image % 251).all()
                assert ring.labels[slot] == image % 10
            for image in draw.ids.tolist():
                model[image] += 1
    held = {int(i): int(u) for i, u in zip(ring.ids, ring.uses, strict=True) if i >= 0}
    assert held == model


def test_wrap_keeps_the_newest_images() -> None:
    ring = make()
    for _ in range(5):
        write(ring)
    assert sorted(ring.ids.tolist()) == list(range(8, 20))


def test_exactly_full_is_not_empty() -> None:
    ring = make()
    for _ in range(3):
        write(ring)
    assert ring.num_filled == 12
    assert sorted(ring.sample(12).ids.tolist()) == list(range(12))


def test_a_pass_uses_every_image_exactly_once() -> None:
    ring = make()
    for _ in range(3):
        write(ring)
    for _ in range(10):
        ring.sample(6)
    assert ring.uses.tolist() == [5] * 12


def test_an_open_block_is_invisible() -> None:
    ring = make()
    write(ring)
    block = ring.reserve()
    with pytest.raises(RuntimeError, match="half written"):
        ring.sample(1)
    with pytest.raises(RuntimeError, match="open already"):
        ring.reserve()
    ring.abort()
    assert sorted(ring.sample(4).ids.tolist()) == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="not reserved"):
        ring.commit(block, ids=torch.arange(4), labels=torch.arange(4))


def test_limiter_never_lets_views_exceed_reuse() -> None:
    ring = make(capacity=12, block=4, spi=2.5, fill=8)
    for _ in range(50):
        while ring.must_insert(3):
            write(ring)
        assert ring.num_inserted >= 8
        ring.sample(3)
        assert ring.num_sampled <= 2.5 * ring.num_inserted
    assert ring.num_sampled > 2.5 * (ring.num_inserted - ring.block_images)


def test_restored_ring_draws_what_the_original_would_have() -> None:
    ring, other = make(spi=100), make(spi=100)
    for _ in range(4):
        write(ring)
    ring.sample(5)
    other.load_state_dict(ring.state_dict())
    for _ in range(6):
        a, b = ring.sample(5), other.sample(5)
        assert torch.equal(a.ids, b.ids) and torch.equal(a.uses, b.uses)
    with pytest.raises(ValueError, match="shape"):
        make(capacity=20).load_state_dict(ring.state_dict())


def test_capacity_is_rounded_to_blocks_and_bad_sizes_raise() -> None:
    assert make(capacity=13).capacity == 16
    with pytest.raises(ValueError, match="two blocks"):
        make(capacity=7)
    with pytest.raises(ValueError, match="min_fill_images"):
        make(capacity=12, fill=9)
