"""Decoded test images stay on a GPU for the next evaluations, if they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.fake_cuda import pretended
from dmkd_fast import InputSpec
from dmkd_fast.data import test_sets
from dmkd_fast.data.listing import Item
from dmkd_fast.data.test_sets import EncodedSet

SPEC = InputSpec(size=8, mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.1))
OTHER = InputSpec(size=4, mean=(0.0,) * 3, std=(1.0,) * 3)
NUM_BYTES = 20 * 3 * 8 * 8


class Now:
    """Take the place of a pool of threads, which the stand-in for CUDA does not reach."""

    def __init__(self, _: int) -> None:
        pass

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(call(*arguments))
        return done

    def shutdown(self, *, cancel_futures: bool) -> None:
        pass


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the images that were decoded, on a stand-in for a GPU."""
    names: list[str] = []

    class Decoder:
        def __init__(self, _: int, inputs: Any, **__: Any) -> None:
            self.inputs = inputs

        def decode(self, given: list[str], encoded: list[bytes]) -> list[torch.Tensor]:
            names.extend(given)
            number = torch.tensor([int(data) for data in encoded], dtype=torch.uint8)
            shapes = [(len(given), 3, spec.size, spec.size) for spec in self.inputs]
            return [number.view(-1, 1, 1, 1).expand(shape).contiguous() for shape in shapes]

    monkeypatch.setattr(test_sets, "Decoder", Decoder)
    monkeypatch.setattr(test_sets, "ThreadPoolExecutor", Now)
    monkeypatch.setattr(test_sets, "batch_images", lambda _: 6)
    monkeypatch.setattr(Item, "read", lambda self: self.name.encode())
    with pretended():
        yield names


def images(device: str = "cuda:0") -> EncodedSet:
    items = tuple(Item(str(number), number % 3) for number in range(20))
    return EncodedSet(
        items=items, class_names=tuple("abc"), device=torch.device(device), is_repeated=True
    )


def passed(given: EncodedSet, spec: InputSpec = SPEC, **ranks: int) -> tuple[torch.Tensor, ...]:
    batches = list(given.batches([spec], **ranks))
    return torch.cat([views[spec] for views, _ in batches]), torch.cat([y for _, y in batches])


def test_a_second_pass_on_a_gpu_decodes_nothing_and_yields_the_same(decoded: list[str]) -> None:
    given = images()
    first = passed(given)
    assert decoded == [str(number) for number in range(20)]
    for _ in range(3):
        again = passed(given)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(decoded) == 20
    assert torch.equal(first[0], passed(images("cpu"))[0])
    kept = sum(x.numel() for images_, _ in given._kept[(SPEC,), 0, 1] for x in images_)
    assert kept == NUM_BYTES  # bytes, not floats
    passed(given, OTHER)
    assert len(decoded) == 60  # Other inputs need other pixels, for which nothing is kept.
    passed(replace(given, items=given.items[:5]))
    assert len(decoded) == 65


def test_each_rank_keeps_its_own_images(decoded: list[str]) -> None:
    given = images()
    for _ in range(2):
        assert passed(given, rank=1, world_size=4)[1].tolist() == [i % 3 for i in range(1, 20, 4)]
    assert decoded == [str(number) for number in range(1, 20, 4)]


@pytest.mark.parametrize(
    ("why", "count"), [("cpu", 40), ("one pass", 40), ("no room", 40), ("peak", 40), ("room", 20)]
)
def test_pixels_are_kept_only_where_they_fit_and_are_used_again(
    why: str, count: int, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = images("cpu" if why == "cpu" else "cuda:0")
    if why == "one pass":
        given = replace(given, is_repeated=False)
    free = {"no room": 2 * NUM_BYTES - 1, "peak": 2 * NUM_BYTES + 999, "room": 2 * NUM_BYTES + 1000}
    monkeypatch.setattr(test_sets, "available_bytes", lambda _: free.get(why, 2**30))
    # A step of the training takes 1,000 bytes more than lie on the device between the steps.
    for name, value in (("max_memory_allocated", 1500), ("memory_allocated", 500)):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    passed(given)
    passed(given)
    assert len(decoded) == count


def test_a_pass_that_was_left_is_not_kept(decoded: list[str]) -> None:
    given = images()
    next(iter(given.batches([SPEC])))
    del decoded[:]
    assert len(passed(given)[1]) == len(decoded) == 20
