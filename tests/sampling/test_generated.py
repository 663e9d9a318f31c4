"""Generated images as a stream: the sampler in use, and what is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import build_distiller, tiny_sampler

from benchmarks.fake_cuda import pretended
from dmkd_fast import GeneratedImages, LabelStream
from dmkd_fast.runtime.distributed import Ranks
from dmkd_fast.runtime.errors import UserError


def test_progress_selects_the_sampler_and_all_of_them_can_make_images_again() -> None:
    later = [(0.5, tiny_sampler(count=1))]
    images = GeneratedImages(LabelStream(4), tiny_sampler(), later=later)
    ids, labels = images.next_block(16)
    assert torch.equal(images.next_block(16)[0], ids)  # the same until `advance`
    made = []
    for progress in (0.0, 0.49, 0.5, 1.0):
        out = torch.empty((16, 1, 8, 8), dtype=torch.uint8)
        images.write(ids, labels, out, progress=progress)
        made.append(out)
    again = [torch.empty_like(made[0]) for _ in images.rewrites]
    for rewrite, out in zip(images.rewrites, again, strict=True):
        rewrite(ids, labels, out=out)
    expected = [again[0], again[0], again[1], again[1]]
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    assert not torch.equal(*again)
    images.advance(16)
    assert images.next_block(16)[0].tolist() == list(range(16, 32))


def test_blocks_of_later_samplers_are_not_made_ahead(tmp_path: Path) -> None:
    """A resumed run would make such a block again, perhaps with another sampler."""
    later = [(0.5, tiny_sampler(count=1))]
    images = GeneratedImages(LabelStream(4), tiny_sampler(), later=later)
    with pytest.raises(UserError, match=r"guard_blocks: got 1 with images that .* the progress"):
        build_distiller(tmp_path / "run", images=images, ring={"guard_blocks": 1})


@pytest.mark.parametrize("starts", [[0.0], [0.5, 0.5], [0.6, 0.5], [1.0], [-0.1]])
def test_later_samplers_whose_progress_does_not_rise_are_refused(starts: list[float]) -> None:
    later = [(start, tiny_sampler()) for start in starts]
    with pytest.raises(UserError, match=r"^later: got starts .* expected rising numbers between 0"):
        GeneratedImages(LabelStream(4), tiny_sampler(), later=later)


def test_samplers_that_never_run_together_share_the_memory_of_their_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captures: list[tuple[Any, Any]] = []

    def graph(cuda_graph: object, *, pool: Any, stream: Any, **_: Any) -> Any:
        captures.append((pool, stream))
        return contextlib.nullcontext()

    with pretended(), monkeypatch.context() as patch:
        handles = iter("ab")
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
        patch.setattr(torch.cuda, "graph", graph)
        one, other, *three = (tiny_sampler(device="cuda:0") for _ in range(5))
        for alone in (one, other):
            GeneratedImages(LabelStream(4), alone)
        GeneratedImages(LabelStream(4), three[0], later=[(0.3, three[1]), (0.6, three[2])])
        ids = torch.arange(4, device="cuda:0")
        for sampler in (one, other, *three):
            sampler.sample(ids, ids, out=torch.empty((4, 1, 8, 8), dtype=torch.uint8))
    assert [pool for pool, _ in captures] == [None, None, "a", "a", "a"]
    # Memory of a stream is not given to another one; what cuBLAS keeps for it ends with a graph.
    assert len({id(stream) for _, stream in captures[:3]}) == 3
    assert len({id(stream) for _, stream in captures[2:]}) == 1


def test_broken_images_of_a_block_count_once_it_is_used() -> None:
    sampler = tiny_sampler()
    images = GeneratedImages(LabelStream(4), sampler)
    out = torch.empty((16, 1, 8, 8), dtype=torch.uint8)
    seen = []
    for broken in (1, 2):
        sampler.num_broken.fill_(broken)
        images.write(*images.next_block(16), out, progress=0.0)
        seen.append(int(images.counts(out.device)["broken_images"]))
        images.advance(16)
        seen.append(int(images.counts(out.device)["broken_images"]))
    assert seen == [1, 1, 1, 2]


def test_broken_images_of_a_rank_are_their_part_of_a_mean_that_is_the_total() -> None:
    """`Metrics` reports means over the ranks: (3 * 2 + 1 * 2) / 2 is 3 + 1."""
    counts = []
    for rank, broken in enumerate((3, 1)):
        sampler = tiny_sampler()
        sampler.num_broken.fill_(broken)
        ranks = Ranks(rank=rank, world_size=2)
        images = GeneratedImages(LabelStream(4), sampler, ranks=ranks)
        counts.append(float(images.counts(torch.device("cpu"))["broken_images"]))
    assert counts == [6.0, 2.0]
