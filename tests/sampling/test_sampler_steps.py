"""Kinds of steps that the sampler compiles, and what it counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sampler_cases import DDIM, dit_sampler, make

from dmkd_fast.sampling.graph import compiled
from dmkd_fast.sampling.step import advance


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"scale": 1.0}, 1),
        ({"interval": (0.2, 0.5)}, 2),
        ({"by_class": {1: 3.0}, "interval": (0.0, 0.5)}, 2),
    ],
    ids=["plain", "interval", "by class"],
)
@pytest.mark.parametrize(
    "scheduler",
    [
        DDIM,
        {"_class_name": "DDPMScheduler"},
        {"_class_name": "DDPMScheduler", "variance_type": "learned_range"},
    ],
    ids=["ddim", "ddpm", "learned"],
)
def test_steps_compile_to_one_graph_with_guidance_and_one_without(
    scheduler: dict[str, Any], changes: dict[str, Any], kinds: int
) -> None:
    """The last step of a sampler that draws noise is not a graph of its own."""
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    sampler = dit_sampler(scheduler=scheduler, count=6, **changes)
    eager = make(sampler, torch.arange(4), 1000)
    sampler._advance = compiled(advance, backend=counter)
    assert torch.equal(make(sampler, torch.arange(4), 1000), eager)
    assert counter.frame_count == kinds


def test_a_step_without_noise_adds_none_whatever_variance_the_model_predicts() -> None:
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    sampler = dit_sampler(scheduler=scheduler, scale=1.0)
    ids = torch.arange(4)
    plain = sampler.trajectory(ids, ids)
    last = sampler.table.rows[-1]
    with torch.inference_mode():
        output = sampler._module(plain[-2], last[:1].expand(4), ids)[:, :4]
        x, _ = advance(
            lambda *_: torch.cat((output, torch.full_like(output, 1e3)), dim=1),
            plain[-2],
            torch.zeros_like(output),
            last,
            ids,
            torch.full_like(output, 1e3),
            1.0,
            sampler._config,
        )  # type: ignore[arg-type]
    torch.testing.assert_close(x, plain[-1], rtol=1e-5, atol=1e-5)


def test_copies_that_fill_up_a_decoders_batch_are_not_counted_as_broken() -> None:
    sampler = dit_sampler(
        count=1,
        micro_batch_images=5,
        decoder=torch.nn.Conv2d(4, 3, 3, padding=1),
        image_shape=(3, 8, 8),
    )
    finish = sampler._finish
    second = torch.tensor([1])  # of two; the third pair is one image and its copy
    sampler._finish = lambda decoder, latents, dtype: finish(
        decoder, latents.index_fill(0, second, float("nan")), dtype
    )
    out = torch.empty(5, 3, 8, 8, dtype=torch.uint8)
    sampler.sample(torch.arange(5), torch.arange(5), out=out)
    assert sampler.num_made == 5 and int(sampler.num_broken) == 2
