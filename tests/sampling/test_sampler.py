"""The sampler's promises: exact counts, fixed shapes and graphs, nothing leaves the device."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from compute_dtypes import BOTH
from sampler_cases import DDIM, Counts, dit_sampler, embedded, make
from small_jobs import tiny_sampler
from small_models import VAE, small_dit, spread
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dmkd_fast.denoisers.dit import lean_dit
from dmkd_fast.denoisers.wrappers import Decoder
from dmkd_fast.rng import philox
from dmkd_fast.runtime.errors import NotFiniteError
from dmkd_fast.sampling.graph import compiled
from dmkd_fast.sampling.sampler import check_broken
from dmkd_fast.sampling.step import decode


def test_flops_per_image_are_those_of_the_forwards() -> None:
    """Golden: the embedded denoiser costs 0.229 GFLOP per forward, and nothing else multiplies."""
    sampler = embedded()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        list(sampler._states(torch.arange(8), torch.arange(8) % 10))
    per_image = counter.get_total_flops() / 8
    assert sampler.forwards_per_image == 4
    width, tokens, layers = 192, 49, 5
    token = layers * (2 * 12 * width**2 + 2 * 2 * tokens * width) + 2 * 2 * 16 * width
    once = 2 * (256 * width + width**2 + width * (6 * layers + 2) * width)
    assert per_image == 4 * (tokens * token + once)
    assert round(per_image / 4 / 1e9, 3) == 0.229


@pytest.mark.parametrize(("guided", "expected"), [(True, 2), (False, 1)])
def test_rows_that_pass_the_denoiser(guided: bool, expected: int) -> None:
    rows = []
    sampler = dit_sampler(scale=2.0 if guided else 1.0)
    sampler._module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    make(sampler, torch.arange(4), 1000)
    assert rows == [4 * expected] * 4


def test_unconditional_rows_only_inside_the_guidance_interval() -> None:
    rows = []
    sampler = dit_sampler(count=10, interval=(0.2, 0.5))
    sampler._module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    make(sampler, torch.arange(4), 1000)
    assert rows == [4, 4, 8, 8, 8, 4, 4, 4, 4, 4]
    assert sampler.forwards_per_image == 13


def test_guidance_channels_are_the_original_dit_codes() -> None:
    """Only the first three channels are guided; the rest is the conditional prediction."""
    sampler = dit_sampler(count=1, channels=3, scale=4.0)
    ids, labels = torch.arange(4), torch.tensor([1, 2, 3, 4])
    got = sampler.trajectory(ids, labels)
    x, row = got[0], sampler.table
    with torch.no_grad():
        timesteps = row.column("timestep")[:1].expand(4)
        with_class = sampler._module(x, timesteps, labels)[:, :4]
        without = sampler._module(x, timesteps, torch.full_like(labels, 1000))[:, :4]
    guided = without + 4.0 * (with_class - without)
    guided[:, 3] = with_class[:, 3]
    estimate = row.column("skip") * x + row.column("out") * guided
    b0, u, a = (row.column(name) for name in ("b0", "u", "a"))
    torch.testing.assert_close(got[1], a * x + (b0 + u) * estimate, rtol=1e-4, atol=1e-4)


def test_aten_calls_per_step_are_few_and_fixed() -> None:
    """Golden counts outside the denoiser: what a step costs in launches when not compiled."""
    with Counts() as short, torch.inference_mode():
        list(tiny_sampler(count=2)._states(torch.arange(16), torch.arange(16) % 4))
    with Counts() as long, torch.inference_mode():
        list(tiny_sampler(count=12)._states(torch.arange(16), torch.arange(16) % 4))
    assert (len(long.calls) - len(short.calls)) / 10 == 36


def test_the_loop_never_reads_the_device() -> None:
    sampler = dit_sampler(scheduler={"_class_name": "DDPMScheduler"}, count=6)
    with Counts(ban=True), torch.inference_mode():
        sampler._make(torch.arange(4), torch.arange(4))


@pytest.mark.slow
def test_no_recompiles_over_1000_batches_tails_included() -> None:
    sampler = tiny_sampler(count=2, interval=(0.0, 0.5), compile=True)
    sizes = torch.randint(1, 40, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    make(sampler, torch.arange(16), 4)
    pointers = set()
    with torch.compiler.set_stance("fail_on_recompile"):
        first = 0
        for size in sizes:
            out = make(sampler, torch.arange(first, first + size), 4)
            pointers.add(out.dtype)
            first += size
    assert first == sum(sizes)


@pytest.mark.slow
def test_many_compiled_samplers_live_in_one_process() -> None:
    """torch.compile keeps eight graphs per code object; twelve samplers must not run out."""
    for steps in range(1, 13):
        sampler = tiny_sampler(count=1, scale=1.0 + steps, compile=True)
        assert make(sampler, torch.arange(16), 4).shape == (16, 1, 8, 8)


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    """float32; one uint8 level apart in a few pixels at most."""
    eager, compiled = embedded(), embedded(compile=True)
    ids, labels = torch.arange(8), torch.arange(8) % 10
    difference = (eager.trajectory(ids, labels) - compiled.trajectory(ids, labels)).abs()
    assert difference.max() < 2e-4
    levels = (make(eager, ids, 10).int() - make(compiled, ids, 10).int()).abs()
    assert levels.max() <= 1 and (levels > 0).float().mean() < 1e-3


def digests(images: Tensor) -> list[str]:
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]


@pytest.mark.parametrize("dtype", BOTH)
def test_images_are_the_same_bits_in_five_arrangements(dtype: torch.dtype) -> None:
    sampler = embedded(dtype=dtype)
    ids = torch.arange(20)
    whole = digests(make(sampler, ids, 10))
    in_calls = [d for part in ids.split(7) for d in digests(make(sampler, part, 10))]
    ranks = [digests(make(embedded(dtype=dtype), ids[rank::3], 10)) for rank in range(3)]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    shuffled = digests(make(sampler, ids[order], 10))
    restarted = digests(make(embedded(dtype=dtype), ids[9:], 10))
    tail = digests(make(sampler, ids[19:], 10))
    assert in_calls == whole
    assert [ranks[i % 3][i // 3] for i in range(20)] == whole
    assert shuffled == [whole[i] for i in order]
    assert restarted == whole[9:] and tail == whole[19:]


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("size", [1, 7, 24])
def test_other_micro_batches_differ_by_a_level_in_few_pixels(size: int, dtype: torch.dtype) -> None:
    ids = torch.arange(24)
    reference = make(embedded(dtype=dtype), ids, 10)
    other = make(embedded(micro_batch_images=size, dtype=dtype), ids, 10)
    levels = (reference.int() - other.int()).abs()
    assert levels.max() <= 1 and (levels > 0).float().mean() <= 1e-3


def test_seeds_and_ids_make_other_images() -> None:
    one, other = (
        make(embedded(), torch.arange(16), 10),
        make(embedded(seed=1), torch.arange(16), 10),
    )
    assert (one != other).float().mean() > 0.2
    ids = torch.arange(0, 160, 10)  # one class
    assert len(set(digests(make(embedded(), ids, 10)))) == 16


@pytest.mark.parametrize("attention", ["xformers", "sdpa"])
@pytest.mark.parametrize(
    "scheduler",
    [DDIM, {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}],
    ids=["ddim", "learned"],
)
def test_tick_decode_and_slot_write_stay_on_cuda(
    attention: Any, scheduler: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake CUDA tensors: the whole program of a GPU, shapes and devices only."""
    decoder = torch.nn.Conv2d(4, 3, 3, padding=1)
    sampler = dit_sampler(count=2, scheduler=scheduler, decoder=decoder, image_shape=(3, 8, 8))
    module: Any = sampler._module
    module.attention = attention
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = lambda t: mode.from_tensor(t).to("cuda")  # noqa: E731
        for owner in (module, decoder):
            state = {n: fake(p.detach()) for n, p in owner.state_dict(keep_vars=True).items()}
            for name, value in state.items():
                part, _, leaf = name.rpartition(".")
                target = owner.get_submodule(part)
                target._parameters.pop(leaf, None)
                target._buffers.pop(leaf, None)
                setattr(target, leaf, value)
        sampler.device = torch.device("cuda")
        object.__setattr__(sampler.table, "rows", fake(sampler.table.rows))
        sampler.num_broken = fake(sampler.num_broken)
        slots = torch.empty(16, 3, 8, 8, dtype=torch.uint8, device="cuda")
        ids = torch.arange(4, device="cuda")
        monkeypatch.setattr(sampler, "_images", sampler._make)
        with Counts(ban=True) as counts:
            sampler.sample(ids, ids, out=slots[4:8])
    assert slots.device.type == "cuda"
    calls = " ".join(counts.calls)
    assert "dmkd_fast.normal" in calls
    assert ("xformers_attention" in calls) == (attention == "xformers")


def test_xformers_branch_traces_as_one_opaque_operator() -> None:
    lean: Any = lean_dit(small_dit())
    lean.attention = "xformers"
    seen: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        del inputs
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return lambda *args: (torch.zeros(4, 8, 8, 8),)

    compiled = torch.compile(lean, fullgraph=True, dynamic=False, backend=backend)
    with torch.no_grad():
        compiled(torch.randn(4, 4, 8, 8), torch.full((4,), 5.0), torch.arange(4))
    assert sum("xformers_attention" in name for name in seen) == 2  # one per block


@pytest.mark.slow
def test_decoders_trace_as_one_graph_each() -> None:
    """Compiled on CUDA alone, and whole: a break in the graph would be an error there."""
    import diffusers

    vaes = (spread(diffusers.AutoencoderKL(**VAE)), spread(diffusers.AutoencoderTiny()))
    for vae in vaes:
        decoder = Decoder(vae).to(memory_format=torch.channels_last)
        traced_decode = compiled(decode, backend="aot_eager")
        with torch.inference_mode():
            latents = torch.randn(4, 4, 8, 8)
            traced = traced_decode(decoder, latents, torch.float32)
            eager = decode(decoder, latents, torch.float32)
            assert all(map(torch.equal, traced, eager))


@pytest.mark.parametrize("decoder", [None, torch.nn.Conv2d(4, 3, 3, padding=1)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_counted(decoder: Any, value: float) -> None:
    channels = 4 if decoder is None else 3
    sampler = dit_sampler(count=1, decoder=decoder, image_shape=(channels, 8, 8))
    finish, calls = sampler._finish, []

    def poisoned(decoder: Any, latents: Tensor, dtype: torch.dtype) -> Any:
        calls.append(latents.index_fill(0, torch.tensor([1]), value))  # one of each call
        return finish(decoder, calls[-1], dtype)

    sampler._finish = poisoned
    out = torch.empty(10, channels, 8, 8, dtype=torch.uint8)
    sampler.sample(torch.arange(10), torch.arange(10), out=out)
    assert sampler.num_made == 12 and int(sampler.num_broken) == len(calls) >= 3
    with pytest.raises(NotFiniteError, match=f"{len(calls)} of 12 images .* at most 1%"):
        check_broken(int(sampler.num_broken), sampler.num_made)
    check_broken(10, 1000)
    with pytest.raises(NotFiniteError, match="11 of 1,000"):
        check_broken(11, 1000)


def test_noise_is_shared_by_no_two_classes_or_steps() -> None:
    ids = torch.arange(1000)
    first = philox.normal(0, ids, step=0, count=16)
    assert len(torch.unique(first, dim=0)) == 1000
    assert not (first[:, None, 0] == philox.normal(0, ids, step=1, count=16)[None, :, 0]).all()


def test_a_flow_model_distilled_to_few_steps_refuses_others() -> None:
    flow = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "distilled_steps": 4,
        "distilled_guidance_scale": 1.5,
    }
    with pytest.raises(ValueError, match="distilled to 4 steps"):
        tiny_sampler(scheduler=flow, count=3, scale=1.0)
    with pytest.raises(ValueError, match=r"guidance 1\.5 folded in"):
        tiny_sampler(scheduler=flow, count=4, scale=2.0)


@pytest.mark.cuda
def test_noise_has_the_same_bits_on_a_gpu() -> None:
    """Needs an NVIDIA GPU of compute capability 8.0 or higher."""
    ids = torch.tensor([0, 7, 2**40 + 1])
    for seed, step in ((0, 0), (1, 3), (2**40 + 11, 9)):
        expected = philox.normal_reference(seed, ids, step, 3072)
        got = philox.normal(seed, ids.cuda(), step=step, count=3072)
        assert torch.equal(got.cpu(), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("compile", [False, True])
def test_replayed_graph_equals_the_loop_and_never_waits(compile: bool) -> None:
    """Needs an NVIDIA GPU of compute capability 8.0 or higher."""
    sampler = dit_sampler(device="cuda", dtype=torch.float16, compile=compile, count=6)
    ids = torch.arange(10, device="cuda")
    out = torch.empty(10, 4, 8, 8, dtype=torch.uint8, device="cuda")
    sampler.sample(ids, ids, out=out)
    expected = torch.cat(
        [sampler._make(part, part) for part in (ids[:4], ids[4:8], ids[[8, 9, 9, 9]])]
    )[:10]
    assert (out.int() - expected.int()).abs().max() <= 1
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.current"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.sample(ids, ids, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.current"] == before


def test_benchmark_counts_the_arithmetic_of_dits_exactly() -> None:
    from benchmarks.parts.sampler_models import dit_flops

    dit = small_dit()
    lean: Any = lean_dit(dit)
    lean.attention = "short"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lean(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert dit_flops(dict(dit.config)) == counter.get_total_flops()
