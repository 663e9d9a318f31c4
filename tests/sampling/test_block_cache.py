"""Blocks of a DiT that are reused: the schedule, what is computed, and that off changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sampler_cases import dit_sampler, make
from small_jobs import tiny_sampler
from small_models import small_dit
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dmkd_fast.denoisers.dit import CachedDiT, DiTBlock, KeptBlocks, lean_dit
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.sampling.block_cache import BlockCache
from dmkd_fast.sampling.graph import compiled
from dmkd_fast.sampling.step import advance

IDS = torch.arange(4)


def cached(cache: BlockCache | None, **changes: Any) -> Any:
    lean = lean_dit(small_dit(num_layers=5))
    return dit_sampler(module=lean, block_cache=cache, count=6, **changes)


@pytest.mark.parametrize(
    ("settings", "rows", "expected"),
    [
        ({}, [1] * 5, "krkrp"),
        ({"every": 3}, [2] * 7, "krrkrrp"),
        ({"steps": (0.25, 0.75)}, [1] * 8, "ppkrkrpp"),
        ({"every": 9}, [2, 2, 1, 1], "krrr"),
        ({"every": 9}, [1, 1, 2, 2, 1], "krkrr"),
    ],
    ids=["every 2", "every 3", "steps", "guidance ends", "guidance begins"],
)
def test_the_schedule_is_fixed_and_computes_where_guidance_begins(
    settings: dict[str, Any], rows: list[int], expected: str
) -> None:
    kinds = BlockCache(**settings).kinds(rows)
    assert "".join(kind[0] for kind in kinds) == expected


@pytest.mark.parametrize("blocks", [(0.2, 0.8), (0.0, 1.0), (0.6, 1.0)])
def test_a_reused_sum_gives_the_prediction_of_the_same_inputs(blocks: tuple[float, float]) -> None:
    module = lean_dit(small_dit(num_layers=5))
    assert module is not None
    kept = KeptBlocks(*(int(end * 5) for end in blocks))
    keep, reuse = (CachedDiT(module, kept, reuses=reuses) for reuses in (False, True))
    latents, labels = torch.randn(6, 4, 8, 8), torch.arange(6)
    timesteps = torch.full((6,), 400.0)
    with torch.inference_mode():
        expected = module(latents, timesteps, labels)
        assert torch.equal(keep(latents, timesteps, labels), expected)
        for count in (6, 3):  # the conditional half of guided images
            got = reuse(latents[:count], timesteps[:count], labels[:count])
            torch.testing.assert_close(got, expected[:count], rtol=1e-4, atol=1e-4)


def test_reused_blocks_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = cached(BlockCache(blocks=(0.2, 0.8)), interval=(0.0, 0.5))
    module, computed = sampler._module, []
    run = DiTBlock.forward

    def forward(block: DiTBlock, x: Tensor, *rest: Any) -> Any:
        computed.append((list(module.blocks).index(block), len(x)))
        return run(block, x, *rest)

    monkeypatch.setattr(DiTBlock, "forward", forward)
    make(sampler, IDS, 1000)
    full, ends = range(5), (0, 4)
    expected = [(block, 8) for step in (full, ends, full) for block in step]
    # The third step keeps 8 rows, of which the unguided fourth one reuses the first 4.
    expected += [(block, 4) for step in (ends, full, ends) for block in step]
    assert computed == expected


def test_flops_fall_by_the_reused_blocks() -> None:
    flops = []
    for cache in (None, BlockCache(every=6, blocks=(0.0, 0.8))):
        sampler = cached(cache)
        with FlopCounterMode(display=False) as counter:
            make(sampler, IDS, 1000)
        flops.append(counter.get_total_flops())
    assert 0.3 < flops[1] / flops[0] < 0.45  # 10 of 30 blocks, and the embeddings of every step


@pytest.mark.slow
def test_cached_steps_compile_to_one_graph_for_each_kind() -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    sampler = cached(BlockCache(steps=(0.0, 0.7)))  # two pairs of keep and reuse, then two plain
    eager = make(sampler, IDS, 1000)
    sampler._advance = compiled(advance, backend=counter)
    assert torch.equal(make(sampler, IDS, 1000), eager)
    assert torch.equal(make(sampler, IDS, 1000), eager)
    assert counter.frame_count == 3


def test_images_with_a_cache_depend_on_their_id_alone() -> None:
    sampler = cached(BlockCache())
    together = make(sampler, torch.arange(9), 1000)
    assert not torch.equal(together[:4], make(cached(None), IDS, 1000))
    for image_id in (7, 2):
        assert torch.equal(make(sampler, torch.tensor([image_id]), 1000)[0], together[image_id])


def test_without_a_cache_every_step_calls_the_denoiser_itself() -> None:
    sampler = cached(None)
    assert sampler._modules == [sampler._module] * 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 1}, "block_cache.every: got 1, expected 2 to"),
        ({"blocks": (0.5, 0.5)}, "block_cache.blocks: got .* start < stop"),
        ({"steps": (0.5, 2)}, "block_cache.steps: got .* stop <= 1"),
        ({"blocks": (0.0, 0.1)}, "no block of 5 or no step of 6 to reuse"),
        ({"steps": (0.0, 0.2)}, "no block of 5 or no step of 6 to reuse"),
    ],
)
def test_caches_that_reuse_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cached(BlockCache(**settings))


def test_a_denoiser_that_is_no_dit_is_refused() -> None:
    message = "steps.block_cache: got some for a TinyDenoiser, expected a DiT"
    with pytest.raises(UserError, match=message):
        tiny_sampler(block_cache=BlockCache())
