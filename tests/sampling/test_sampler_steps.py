"""Kinds of steps that the sampler compiles, and what it counts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from sampler_cases import DDIM, dit_sampler, make
from small_models import small_dit
from torch.fx import GraphModule

from dmkd_fast.denoisers.dit import lean_dit
from dmkd_fast.sampling import graph
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


@pytest.mark.parametrize("changes", [{"scale": 3.0}, {"scale": 3.0, "count": 2}], ids=str)
def test_phases_with_other_scales_and_steps_take_the_graphs_of_the_first(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter: Any = CompileCounter()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(graph, "compiled", functools.partial(compiled, backend=counter))
    first = dit_sampler(count=3, compile=True)
    later = dit_sampler(module=first._module, compile=True, **{"count": 3, **changes})
    ids = torch.arange(4)
    images = make(later, ids, 1000)
    assert counter.frame_count == 1
    assert not torch.equal(make(first, ids, 1000), images)
    assert counter.frame_count == 1
    assert torch.equal(make(dit_sampler(**{"count": 3, **changes}), ids, 1000), images)


def test_one_graph_serves_all_blocks_of_a_dit() -> None:
    """The products that are compiled are one block's and those around the blocks."""
    compiled_products = []
    for num_layers in (2, 6):
        lean: Any = lean_dit(small_dit(num_layers=num_layers))
        sampler = dit_sampler(module=lean, interval=(0.0, 0.5))
        eager = make(sampler, torch.arange(4), 1000)
        lean.shares_block_graph = True
        counts: list[list[int]] = []

        def backend(traced: GraphModule, _: Any, counts: Any = counts) -> Any:
            parts = [part for part in traced.modules() if isinstance(part, GraphModule)]
            counts.append(
                [sum("linear" in str(n.target) for n in part.graph.nodes) for part in parts]
            )
            return traced

        torch.compiler.reset()
        sampler._advance = compiled(advance, backend=backend)
        assert torch.equal(make(sampler, torch.arange(4), 1000), eager)
        compiled_products.append(counts)
    # Around the blocks: patches, two of the timestep, modulations, output. In a block: four.
    # torch 2.14 has one block at any depth; 2.10 has every block.
    has_one = torch.torch_version.TorchVersion(torch.__version__) >= (2, 14)
    expected = [[5, *[4] * (1 if has_one else num_layers)] for num_layers in (2, 6)]
    assert compiled_products == [[products] * 2 for products in expected]


def test_blocks_share_a_graph_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "compiled", lambda function: function)
    assert not dit_sampler(compile=True)._module.shares_block_graph
    from benchmarks.fake_cuda import pretended

    with pretended():
        assert dit_sampler(compile=True, device="cuda")._module.shares_block_graph
        assert not dit_sampler(compile=False, device="cuda")._module.shares_block_graph


@pytest.mark.slow
def test_a_shared_graph_computes_what_the_blocks_compute() -> None:
    lean: Any = lean_dit(small_dit(num_layers=3))
    arguments = torch.randn(4, 4, 8, 8), torch.full((4,), 5.0), torch.arange(4)
    with torch.inference_mode():
        eager = lean(*arguments)
        lean.shares_block_graph = True
        shared = torch.compile(lean, fullgraph=True, dynamic=False)(*arguments)
    torch.testing.assert_close(shared, eager, atol=1e-5, rtol=1e-5)


def test_a_step_without_noise_adds_none_whatever_variance_the_model_predicts() -> None:
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    sampler = dit_sampler(scheduler=scheduler, scale=1.0)
    ids = torch.arange(4)
    plain = sampler.trajectory(ids, ids)
    last = sampler.table.rows[-1]
    with torch.inference_mode():
        output = sampler._module(plain[-2], last[:1].expand(4), ids)[:, :4]
        module: Any = lambda *_: torch.cat((output, torch.full_like(output, 1e3)), dim=1)  # noqa: E731
        x, _ = advance(
            module,
            plain[-2],
            torch.zeros_like(output),
            last,
            ids,
            torch.full_like(output, 1e3),
            torch.tensor(1.0),
            sampler._config,
        )
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
