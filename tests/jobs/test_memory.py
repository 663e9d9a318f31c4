"""The memory plan: what is counted, what is refused, and running out in the other verbs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_jobs import CONFIG, SHORT, small_classifier
from torch import Tensor, nn

from dmkd_fast import cli
from dmkd_fast.assets import resolve
from dmkd_fast.classifiers.loading import build_classifier
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.jobs import distill as distill_job
from dmkd_fast.jobs import memory, networks, parts
from dmkd_fast.jobs.inspect.activations import peak_bytes
from dmkd_fast.runtime.distributed import Ranks
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.sampling.sampler import DiffusionSampler
from dmkd_fast.training import scoring

FMNIST = "embedded:fashion_mnist"
CPU_ERROR = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 TB")


def resnet() -> nn.Module:
    return build_classifier(
        ClassifierSpec(
            architecture="cifar_resnet20",
            num_classes=10,
            in_chans=3,
            input_size=32,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
        )
    )


@pytest.mark.parametrize(("make", "channels", "size"), [(small_classifier, 1, 8), (resnet, 3, 32)])
def test_saved_activations_are_those_that_autograd_keeps(
    make: Callable[[], nn.Module], channels: int, size: int
) -> None:
    model = make().train()
    states = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    found = memory.batch_plan(
        model, 24, 4, channels, [size, 2 * size], dtype=torch.float32, compiled=False
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[name], value) for name, value in model.state_dict().items())
    kept: dict[int, Tensor] = {}
    weights = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in weights:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = model(torch.zeros(6, channels, size, size)).sum()
    really = sum(value.untyped_storage().nbytes() for value in kept.values())
    assert loss.requires_grad and found[memory.SAVED] == pytest.approx(really, rel=0.02)
    assert found[memory.VIEWS] == 4 * 24 * channels * 5 * size**2
    half = memory.batch_plan(model, 6, 1, channels, [size], dtype=torch.bfloat16, compiled=False)
    assert half[memory.SAVED] == found[memory.SAVED] // 2
    compiled = memory.batch_plan(model, 6, 1, channels, [size], dtype=torch.float32, compiled=True)
    assert compiled[memory.SAVED] == 0


def test_a_model_that_needs_values_counts_as_nothing() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    assert memory._saved_bytes(Branching(), (2, 1, 4, 4)) == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            ["views.size=8192"],
            "saved for the backward pass: .* lower train.batch_size or views.size",
        ),
        (["train.batch_size=8192", "ring.min_fill_images=8192"], "raise train.accumulate"),
        (
            [
                "train.batch_size=131072",
                "train.accumulate=1024",
                "ring={capacity_images: 262144, min_fill_images: 131072, samples_per_insert: 4}",
            ],
            "views of a batch: .* lower train.batch",
        ),
        (
            ["ring.capacity_images=1000000000"],
            "ring.capacity_images: got 1000000000, .* lower it to",
        ),
        (
            [
                "sampler.micro_batch_images=60000",
                "ring={capacity_images: 120000, samples_per_insert: 4, min_fill_images: 60000}",
            ],
            "block being made: .* lower sampler.micro_batch_images",
        ),
    ],
)
@pytest.mark.parametrize("mode", [["--dry-run"], []], ids=["dry run", "run"])
def test_sizes_beyond_memory_are_one_line_before_anything_is_allocated(
    override: list[str],
    words: str,
    mode: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in (memory, networks):
        monkeypatch.setattr(module, "available_bytes", lambda device: 2**27)
    monkeypatch.setattr(distill_job, "build", lambda *_, **__: pytest.fail("allocated"))
    overrides = [
        *SHORT[:4],
        "sampler.compile=false",
        "teacher.path=embedded:fashion_mnist/weak",
        "train.compile=false",
    ]
    assert cli.main(["distill", CONFIG, *overrides, *override, *mode]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and not list(tmp_path.iterdir())
    assert re.search(words, err), err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ring.samples_per_insert=0.001", r"ring.samples_per_insert: got 0.001, .*deadlock"),
        ("ring.error_buffer=1", r"ring.error_buffer: got 1, .*deadlock; raise error_buffer"),
        ("ring.min_fill_images=190", "ring.min_fill_images: got 190, expected at most 128"),
        ("ring.max_uses=3", "ring.max_uses: got 3, expected at least samples_per_insert=4"),
        (
            "ring={order: balanced, max_uses: 9, capacity_images: 192, min_fill_images: 64, "
            "samples_per_insert: 4}",
            "ring.max_uses: got 9 with order=balanced",
        ),
        ("train.batch_size=193", "train.batch_size: got 193, expected at most 192"),
    ],
)
def test_a_config_with_a_bad_ring_is_read_but_nothing_is_loaded_for_it(
    override: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "load_parts", lambda *_: pytest.fail("loaded"))
    config = load_config(DistillConfig, CONFIG, [*SHORT, override])
    with pytest.raises(UserError, match=words):
        parts.prepare(config)


def test_what_fits_exactly_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    memory.check_fits({"a": 3, "b": 5}, 8)
    with pytest.raises(UserError, match=r"memory: got 0.00 GiB .*\(b: 0.00 GiB\)"):
        memory.check_fits({"a": 3, "b": 5}, 7)
    job, loaded = parts.prepare(load_config(DistillConfig, CONFIG, SHORT))
    config = job.config
    plan = memory.plan(job, loaded)
    need = sum(plan.values()) - plan["test images"]
    monkeypatch.setattr(memory, "available_bytes", lambda device: need)
    assert memory.check(job, loaded) == config.ring.capacity_images
    monkeypatch.setattr(memory, "available_bytes", lambda device: need - 1)
    with pytest.raises(UserError, match=r"ring.capacity_images: .* lower it to at most 128"):
        memory.check(job, loaded)


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    two = ["ring.capacity_images=256", "ring.min_fill_images=128", "device=cpu"]
    job, loaded = parts.prepare(load_config(DistillConfig, CONFIG, [*SHORT, *two]))
    job = replace(job, ranks=Ranks(world_size=2, local_world_size=2))
    plan = memory.plan(job, loaded)
    need = sum(plan.values()) - plan["test images"]
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * need)
    assert memory.check(job, loaded) == 256
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * need - 1)
    with pytest.raises(UserError, match=r"ring.capacity_images: .* to each rank"):
        memory.check(job, loaded)


@pytest.mark.parametrize(
    ("optim", "copies"),
    [
        ({"name": "adamw", "lr": 1e-3}, 5),  # weights, gradients, average and two moments
        ({"name": "sgd", "lr": 0.1}, 4),
    ],
)
def test_the_plan_counts_every_copy_of_the_weights_and_what_a_slot_keeps(
    optim: dict[str, Any], copies: int
) -> None:
    config = load_config(DistillConfig, CONFIG, SHORT).model_dump(mode="json") | {"optim": optim}
    job, loaded = parts.prepare(DistillConfig(**config))
    found = memory.plan(job, loaded)
    assert found["student, gradients, optimizer, average"] == copies * 4 * 15_738
    assert "stored logits" not in found
    assert found[memory.BLOCK] == 4 * 64 * 28**2  # float32
    assert found["ring images"] == 192 * 28**2
    stored: Any = SimpleNamespace(plan=SimpleNamespace(logits_bytes=80))
    more = memory.plan(job, replace(loaded, stored=stored))
    assert more == found | {"stored logits": 192 * 80}


class Chain(nn.Module):
    """Two layers, of which the first makes the larger output; the input is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).view(2, -1, 64)  # A view takes nothing.
        out = self.second(hidden)
        del hidden
        return torch.cat((out, out), dim=-1).relu_()


def test_the_peak_of_a_forward_pass_counts_what_is_alive_at_once() -> None:
    model = Chain()
    for dtype, size in ((torch.float32, 4), (torch.float16, 2)):
        x = torch.empty(6, 8, dtype=dtype, device="meta")
        assert peak_bytes(model, memory.on_meta(model), x) == size * 6 * (64 + 16)
    assert next(model.parameters()).device.type == "cpu"


def test_attention_counts_its_output_and_not_its_scores() -> None:
    class Attends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.empty(2, 3, 4096, 8, device="meta")
    assert peak_bytes(Attends(), {}, x) == 4 * x.numel()


def test_on_a_gpu_the_plan_has_the_graph_of_the_sampler_and_all_activations() -> None:
    guided = [*SHORT, "sampler.guidance_scale=2"]
    job, loaded = parts.prepare(load_config(DistillConfig, CONFIG, guided))
    on_cpu = memory.plan(job, loaded)
    assert not {memory.GRAPH, memory.TEACHING} & set(on_cpu)
    job = replace(job, device=torch.device("cuda", 0), dtype=torch.float16, compile_student=True)
    found = memory.plan(job, loaded)
    assert found[memory.SAVED] > 0 and found[memory.TEACHING] > 0  # compiled or not
    fewer = load_config(DistillConfig, job.config, {"sampler": {"micro_batch_images": 32}})
    size = job.config.sampler.micro_batch_images
    assert size == 64
    assert found[memory.GRAPH] / memory.plan(replace(job, config=fewer), loaded)[memory.GRAPH] > 1.9
    plain = load_config(DistillConfig, job.config, {"sampler": {"guidance_scale": 1}})
    half = memory.plan(replace(job, config=plain), loaded)[memory.GRAPH]
    assert 1.8 < found[memory.GRAPH] / half < 2.1
    assert isinstance(loaded.origin, Denoiser)
    module: Any = loaded.origin.module
    width = module.num_heads * module.head_dim
    # The hidden layer of a block before and after its gelu, for both halves of the guidance.
    # Without compilation, gelu computes in float32, with twice the bytes.
    hidden = 2 * size * module.num_tokens * 4 * width * 2
    assert 2 * hidden < found[memory.GRAPH] < 6 * hidden
    need = sum(found.values()) - found["test images"]
    assert memory.check(job, loaded, need) == job.config.ring.capacity_images
    with pytest.raises(UserError, match="memory: got"):
        memory.check(job, loaded, found[memory.GRAPH])


@pytest.mark.parametrize("error", [CPU_ERROR, MemoryError(), torch.OutOfMemoryError("CUDA")])
def test_out_of_memory_in_evaluate_and_generate_is_one_line(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(scoring, "measure", fail)
    monkeypatch.setattr(DiffusionSampler, "sample", fail)
    test = str(resolve("embedded:fashion_mnist/test"))
    assert cli.main(["evaluate", f"{FMNIST}/weak", "--data", test]) == 2
    err = capsys.readouterr().err
    assert "out of memory: " in err and "(--data)" in err and len(err.splitlines()) == 1
    out = ["--out", str(tmp_path / "x"), "--num-images", "64"]
    assert cli.main(["generate", CONFIG, *SHORT[:6], "teacher.path=" + f"{FMNIST}/weak", *out]) == 2
    err = capsys.readouterr().err
    assert "lower sampler.micro_batch_images=64" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_another_error_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory.named("lower it"):
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA"), "the memory of the GPU is exhausted"),
        (MemoryError(), "GiB of cpu memory were left at the start"),
    ],
)
def test_the_memory_that_is_exhausted_is_named(error: Exception, words: str) -> None:
    with pytest.raises(UserError, match=f"{words}; lower it$"), memory.named("lower it"):
        raise error
