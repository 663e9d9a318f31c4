"""What the ring promises, one claim at a time; any history is in test_ring_model.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from rings import new_ring
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fake_cuda import pretended
from dmkd_fast import RingBuffer, RingPlan
from dmkd_fast.ring.statistics import without_strays
from dmkd_fast.runtime import tensor_checks


def make(
    capacity: int = 12, block: int = 4, spi: float = 3, fill: int = 4, **more: Any
) -> RingBuffer:
    sizes = {"capacity_images": capacity, "block_images": block, "samples_per_insert": spi}
    more = {"min_fill_images": fill, "image_shape": (1, 2, 2), "seed": 1} | more
    return new_ring(**sizes, **more)


def write(ring: RingBuffer) -> None:
    """Commit a block whose pixels and labels tell the id."""
    block = ring.reserve()
    ids = torch.arange(ring.num_inserted, ring.num_inserted + ring.block_images)
    block.images.copy_((ids % 251).view(-1, 1, 1, 1).expand_as(block.images))
    ring.commit(block, ids=ids, labels=ids % 10)


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
    with pytest.raises(ValueError, match="capacity_images"):
        make(capacity=7)
    with pytest.raises(ValueError, match="min_fill_images"):
        make(capacity=12, fill=9)


def test_an_image_that_comes_twice_in_a_draw_gets_two_views() -> None:
    for order in ("shuffled", "uniform"):
        ring = make(order=order)
        write(ring)
        draw = ring.sample(11)
        seen = sorted(zip(draw.ids.tolist(), draw.uses.tolist(), strict=True))
        assert len(set(seen)) == 11
        assert ring.uses.sum() == 11


def test_the_guard_is_never_drawn_and_a_block_may_stay_open() -> None:
    ring = make(capacity=16, guard_blocks=1)
    for _ in range(5):
        write(ring)
    block = ring.reserve()  # slots 4 to 7, images 4 to 7
    block.images.fill_(255)
    drawn = ring.sample(12)
    assert sorted(drawn.ids.tolist()) == list(range(8, 20))
    ring.abort()
    assert sorted(ring.sample(12).ids.tolist()) == list(range(8, 20))
    write(ring)
    assert sorted(ring.sample(12).ids.tolist()) == list(range(12, 24))


def test_an_image_is_drawn_max_uses_times_and_then_a_block_is_needed() -> None:
    for order in ("shuffled", "equal"):
        ring = make(capacity=8, spi=3, max_uses=3, order=order, error_buffer=1000.0)
        write(ring)
        for _ in range(3):
            assert not ring.must_insert(4)
            ring.sample(4)
        assert ring.must_insert(1) and ring.may_insert(1)
        assert ring.uses.tolist() == [3] * 4 + [0] * 4
        with pytest.raises(RuntimeError, match="max_uses=3"):
            ring.sample(1)
        write(ring)
        assert sorted(ring.sample(4).ids.tolist()) == [4, 5, 6, 7]


def spread(order: str) -> float:
    """Largest less smallest use count after a slow fill, in units of the mean."""
    ring = make(capacity=64, block=4, spi=8, fill=16, order=order)
    for _ in range(8 * 64 // 8):
        while ring.must_insert(8):
            write(ring)
        ring.sample(8)
    uses = ring.uses.float()
    assert ring.num_inserted == 64 and uses.mean() == 8
    return float((uses.max() - uses.min()) / uses.mean())


def test_equal_order_lets_late_images_catch_up() -> None:
    shuffled, equal = spread("shuffled"), spread("equal")
    assert equal < 0.75 * shuffled, (equal, shuffled)


def test_uniform_draws_do_not_depend_on_batches_and_hit_every_image_alike() -> None:
    one, many = make(order="uniform", spi=1e6), make(order="uniform", spi=1e6)
    for ring in (one, many):
        for _ in range(3):
            write(ring)
    whole = one.sample(12_000).indices
    parts = torch.cat([many.sample(n).indices for n in [1, 4095, 5, 1000, 6899]])
    assert torch.equal(whole, parts)
    expected = 1000
    chi2 = float(((one.uses - expected) ** 2 / expected).sum())
    assert chi2 < 31.3  # 11 degrees of freedom, 0.1 %


def test_balanced_draws_each_class_equally_from_unequal_numbers() -> None:
    ring = make(capacity=40, block=20, spi=1e6, order="balanced", num_classes=4)
    labels = torch.tensor([0] * 14 + [1] * 4 + [3] * 2)  # and none of class 2
    ring.commit(ring.reserve(), ids=torch.arange(20), labels=labels)
    drawn = ring.labels[ring.sample(400).indices]
    assert drawn.bincount(minlength=4).tolist() == [100, 100, 0, 200]
    for label, total in ((0, 100), (1, 100), (3, 200)):
        uses = ring.uses[:20][labels == label]
        assert uses.sum() == total and uses.max() - uses.min() <= 1


def test_bad_ids_labels_counts_and_states_are_refused() -> None:
    ring = make()
    block, good = ring.reserve(), torch.arange(4)
    for ids, labels in ((good[:3], good), (good, good.int()), (good, good.view(2, 2))):
        with pytest.raises(ValueError, match=r"got \(.*expected \(4,\) torch.int64 on cpu"):
            ring.commit(block, ids=ids, labels=labels)
    assert ring.num_inserted == 0 and (ring.ids == -1).all()
    ring.commit(block, ids=good, labels=good)
    for count in (0, -1, 2**31, 12 * 1024 + 1):
        with pytest.raises(ValueError, match=f"count: got {count}, expected 1 to 12288"):
            ring.sample(count)
    for count in (True, 4.0, "4", None, torch.tensor(4)):  # type: ignore[assignment]
        with pytest.raises(TypeError, match="count: got"):
            ring.sample(count)
    with pytest.raises(ValueError, match="resume with the settings"):
        make(order="uniform").load_state_dict(ring.state_dict())


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_outside_of_the_classes_are_refused_before_anything_is_written(label: int) -> None:
    ring = make(num_classes=10)
    block, ids = ring.reserve(), torch.arange(4)
    with pytest.raises(ValueError, match=f"labels: got {label}, expected 0 to 9"):
        ring.commit(block, ids=ids, labels=torch.tensor([0, 9, label, 5]))
    assert ring.num_inserted == 0 and (ring.ids == -1).all()
    ring.commit(block, ids=ids, labels=torch.tensor([0, 9, 0, 9]))


def test_labels_that_cannot_be_read_are_moved_into_the_classes_and_counted() -> None:
    inside, strays = without_strays(torch.tensor([-5, 0, 1, 8, 9, 10, 2**40]), 10)
    assert inside.tolist() == [0, 0, 1, 8, 9, 9, 9] and int(strays) == 3
    ring = make(num_classes=10)
    ring._num_strays += strays
    with pytest.raises(ValueError, match="got 3 labels outside of 0 to 9"):
        ring.check_faults(int(ring.num_faults()))
    state = ring.state_dict()
    older = {name: value for name, value in state.items() if name != "strays"}
    for saved, count in ((state, 3), (older, 0)):
        again = make(num_classes=10)
        again.load_state_dict(saved)
        assert int(again.num_faults()) == count


def test_labels_on_a_gpu_are_not_read_but_counted_when_they_are_committed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The check of labels on a CPU would read those of the stand-in.
    monkeypatch.setattr(tensor_checks, "within", lambda *_, **__: None)
    with pretended():
        ring = make(num_classes=10, device="cuda")
        for _ in range(2):
            block, ids = ring.reserve(), torch.arange(4, device="cuda")
            torch.cuda.set_sync_debug_mode("error")
            ring.commit(block, ids=ids, labels=torch.arange(-2, 14, 4).to("cuda"))
            torch.cuda.set_sync_debug_mode("default")
        assert int(ring.num_faults()) == 4
        assert ring.labels[:8].tolist() == [0, 2, 6, 9] * 2


def test_waits_are_those_of_the_side_that_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = make()
    waits = {"producer": 1.0, "consumer": 2.0}
    monkeypatch.setattr(ring._streams, "waits_s", lambda: waits)
    figures = ring.statistics().figures()
    assert (figures["producer_wait_s"], figures["consumer_wait_s"]) == (1.0, 2.0)


def test_use_counts_that_would_repeat_views_are_found() -> None:
    ring = make()
    write(ring)
    ring.uses[2] = 2**24 - 2
    ring.sample(4)
    ring.check_faults(int(ring.num_faults()))
    ring.sample(4)
    with pytest.raises(ValueError, match=r"got 1 labels .* or images drawn 16,777,216 times"):
        ring.check_faults(int(ring.num_faults()))


@pytest.mark.parametrize("order", ["shuffled", "uniform"])
def test_plan_is_what_a_ring_allocates(order: str) -> None:
    for capacity, block in ((12, 4), (13, 4), (100, 7)):
        ring = make(capacity, block, spi=100, order=order)
        plan = ring.plan.num_bytes
        assert set(plan) == {*ring._tensors(), "order"} - {"retired", "strays"}
        for name in set(plan) - {"order"}:
            assert ring._tensors()[name].nbytes == plan[name], name
        if order == "shuffled":
            for _ in range(ring.capacity // block):
                write(ring)
            ring.sample(1)
            assert ring._order._slots.nbytes == plan["order"]  # type: ignore[attr-defined]


def test_plan_of_200_000_images_of_256_pixels_is_arithmetic_and_allocates_nothing() -> None:
    with NoTensors():
        plan = RingPlan(
            capacity_images=200_000,
            image_shape=(3, 256, 256),
            block_images=64,
            samples_per_insert=1.0,
            min_fill_images=64,
        )
        size = sum(plan.num_bytes.values())
        fits, less = plan.largest_capacity(size), plan.largest_capacity(size - 1)
    assert plan.num_bytes == {
        "images": 39_321_600_000,
        "labels": 1_600_000,
        "ids": 1_600_000,
        "uses": 1_600_000,
        "stamps": 800_000,
        "order": 1_600_000,
    }
    assert (fits, less) == (200_000, 200_000 - 64)
    assert plan.largest_capacity(-5) == 0


class NoTensors(TorchDispatchMode):
    """Raises on every operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"allocates: {func}")


@pytest.mark.parametrize("order", ["shuffled", "equal"])
@pytest.mark.parametrize("error_buffer", [None, 40.0])
def test_accepted_settings_with_max_uses_never_stop(order: str, error_buffer: float | None) -> None:
    for capacity, guard, max_uses, batch in itertools.product((12, 20), (0, 1), (3, 4, 9), (1, 6)):
        ring = make(
            capacity, order=order, max_uses=max_uses, guard_blocks=guard, error_buffer=error_buffer
        )
        ring.plan.check_batch(batch)
        for _ in range(120):
            while ring.must_insert(batch):
                assert ring.may_insert(batch)
                write(ring)
            ring.sample(batch)
            assert ring.uses.max() <= max_uses


def test_mean_uses_are_exact_beyond_the_histogram() -> None:
    ring = make(capacity=8, spi=1000)
    write(ring)
    ring.sample(4 * 150)
    statistics = ring.statistics()
    assert statistics.uses[-1] == 4  # the last bin: 64 times or more
    assert statistics.means()["ring_uses"] == 150
    write(ring)
    write(ring)
    assert ring.statistics().means()["retired_uses"] == 150


def test_a_ring_beyond_free_memory_is_refused_before_it_is_allocated() -> None:
    with pytest.raises(ValueError, match=r"capacity_images: got 1000000000000, which takes 40,000"):
        make(capacity=10**12)
