"""The plan of a job: its operations, images, memory and time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sampler_cases import dit_sampler
from small_jobs import CONFIG, ROOT, SHORT
from small_models import small_dit
from torch import Tensor, nn

from dmkd_fast import cli
from dmkd_fast.denoisers.dit import LeanDiT, lean_dit
from dmkd_fast.denoisers.wrappers import PixelDiT, import_diffusers
from dmkd_fast.jobs.inspect import gpus, plan, rates
from dmkd_fast.jobs.inspect.flops import Flops, count, evaluations_per_image, generator_flops
from dmkd_fast.ring.limiter import Limiter
from dmkd_fast.ring.plan import RingPlan
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.sampling.block_cache import BlockCache

EMBEDDED = str(ROOT / "configs" / "fashion_mnist.yaml")
DIT_XL_2 = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
SD_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}


class Decode(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample  # type: ignore[operator]


def published(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    if name.startswith("resnet"):
        import timm

        return timm.create_model(name).eval(), (torch.empty(1, 3, 224, 224),)
    latents = torch.empty(1, 4, 32, 32)
    if name == "vae":
        return Decode(import_diffusers().AutoencoderKL(**SD_VAE).eval()), (latents,)
    inputs = latents, torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    dit = import_diffusers().DiTTransformer2DModel(**DIT_XL_2).eval()
    return (PixelDiT(dit) if name == "dit" else LeanDiT(dict(dit.config))), inputs


@pytest.mark.parametrize(
    ("name", "gflop"),
    [("dit", 237), ("lean dit", 237), ("vae", 622), ("resnet18", 3.63), ("resnet50", 8.18)],
)
def test_operations_are_the_published_ones(name: str, gflop: float) -> None:
    with torch.device("meta"):
        model, inputs = published(name)
    assert count(model, inputs) == pytest.approx(gflop * 1e9, rel=0.01)


def test_a_network_that_depends_on_values_is_not_counted() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    assert count(Branching(), (torch.zeros(2, 3),)) is None


@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["plain", "guided"])
@pytest.mark.parametrize("parts", [(), ("block_cache",), ("weak",), ("block_cache", "weak")])
def test_the_work_of_an_image_is_what_its_steps_multiply(
    parts: tuple[str, ...], scale: float
) -> None:
    """Blocks that are reused are not counted, and a weaker denoiser counts as what it is."""
    strong, weak = (lean_dit(small_dit(num_layers=n)) for n in (5, 1))
    choices: dict[str, object] = {"block_cache": BlockCache(every=3), "weak": weak}
    sampler = dit_sampler(
        module=strong, count=7, scale=scale, **{name: choices[name] for name in parts}
    )
    whole, one_block = (
        generator_flops(dit_sampler(module=module).denoiser)[0] or 0 for module in (strong, weak)
    )
    # The modulation of all blocks is one product of (6 x width) x width each.
    block = (whole - one_block) / 4 - 2 * 6 * 16 * 16
    reused = whole - 3 * block  # blocks 1 to 3 of 5
    steps = [whole] * 7
    if "block_cache" in parts:
        steps = [whole, reused, reused, whole, reused, reused, whole]
    expected = sum(steps)
    if scale > 1:
        expected += 7 * one_block if "weak" in parts else sum(steps)
    assert evaluations_per_image(sampler, whole) * whole == pytest.approx(expected, rel=1e-9)
    assert evaluations_per_image(sampler, None) == sampler.forwards_per_image


def test_a_plan_with_reused_blocks_is_one_of_less_work_and_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = "sampler.block_cache={every: 2, blocks: [0.2, 0.8]}"
    steps = [*SHORT, "sampler.num_steps=8"]
    plain, cached = (plan.plan(CONFIG, [*steps, *more], gpu="h100") for more in ([], [cache]))
    assert plain["run"] == cached["run"] and cached["run"]["forwards_per_image"] == 8
    works = [found["flops"]["image"] for found in (plain, cached)]
    assert works[0] == 8 * plain["flops"]["denoiser_forward"]
    # Three of five blocks in four of eight steps; the rest of a step is small.
    assert 0.68 < works[1] / works[0] < 0.75
    seconds = [found["seconds"]["generate"] for found in (plain, cached)]
    assert seconds[1] / seconds[0] == pytest.approx(works[1] / works[0])


@pytest.mark.parametrize("reuse", [0.5, 1, 7, 20])
@pytest.mark.parametrize(("fill", "buffer"), [(64, None), (130, 200.0), (256, 5000.0)])
@pytest.mark.parametrize("views", [16, 1000, 12_000])
def test_number_of_images_is_what_the_limiter_inserts(
    reuse: float, fill: int, buffer: float | None, views: int
) -> None:
    ring = RingPlan(
        capacity_images=512,
        image_shape=(1, 4, 4),
        block_images=64,
        samples_per_insert=reuse,
        min_fill_images=fill,
        error_buffer=buffer,
    )
    limiter = Limiter(ring)
    for _ in range(0, views - views % 8, 8):
        while not limiter.may_sample(8):
            limiter.num_inserted += ring.block_images
        limiter.num_sampled += 8
    assert ring.images_for(views - views % 8) == limiter.num_inserted


def test_given_rates_give_time_balance_and_the_cost_of_reuse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", EMBEDDED, "--images-per-s", "100", "--views-per-s", "1000"]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"]["images"] == 10_240 and found["run"]["views"] == 120_064
    seconds = found["seconds"]
    assert seconds["generate"] == pytest.approx(102.4) and seconds["train"] == pytest.approx(
        120.064
    )
    assert sum(seconds.values()) == pytest.approx(2 * seconds["total"])
    assert found["balance_reuse"] == 10 and found["suggested"]["samples_per_insert"] == 10
    assert found["suggested"]["capacity_images"] == 10_240 and found["suggested"]["ranks"] == 1
    rows = {row["samples_per_insert"]: row for row in found["reuse"]}
    assert rows[1]["images"] >= 120_064 and rows[500]["images"] == 9728
    own = [row for row in found["reuse"] if row["is_set"]]
    assert own == [rows[12]] and own[0]["total_s"] == pytest.approx(seconds["total"])
    assert found["flops"]["view"] == (
        found["flops"]["teachers_forward"] + found["flops"]["student_step"]
    )
    assert found["flops"]["image"] == 4 * found["flops"]["denoiser_forward"]
    assert 2 < found["flops"]["student_step"] / found["flops"]["student_forward"] <= 3
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "samples_per_insert=10" in out and "ring images: " in out and "as given" in out
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_the_same_plan_without_measuring(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "measure", lambda *_, **__: pytest.fail("measured"))
    assert cli.main(["distill", CONFIG, *SHORT, "--dry-run"]) == 0
    dry = capsys.readouterr().out.splitlines()
    given = ["--images-per-s", "10", "--views-per-s", "10"]
    assert cli.main(["plan", CONFIG, *given, *SHORT]) == 0
    planned = capsys.readouterr().out.splitlines()
    # Free memory, and with it the largest capacity, changes between two calls.
    of_time = (
        "largest",
        "rates",
        "time:",
        "generation",
        "samples_per_insert",
        "*",
        "   ",
        "suggested",
    )
    same = [line for line in planned if not line.startswith(of_time)]
    assert len(same) > 20 and [line for line in same if line not in dry] == []


def test_rates_are_measured_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    phases = "sampler.phases=[{start: 0.5, num_steps: 2, guidance_scale: 1}]"
    found = plan.plan(CONFIG, [*SHORT, phases], seconds=0.1)
    assert found["rates"]["origin"] == "measured here"
    assert found["rates"]["images_per_s"] > 0 and found["rates"]["views_per_s"] > 0
    assert found["seconds"]["evaluate"] > 0 and found["seconds"]["finish"] > 0
    assert 1 < found["run"]["forwards_per_image"] < 2
    assert not list(tmp_path.iterdir())


def test_estimates_follow_from_the_table_and_need_no_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates, "measure", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpus.GPUS["h100"] == gpus.Gpu(tflop_per_s=989, memory_gb=80)
    found = plan.plan(CONFIG, SHORT, gpu="h100")
    flops, run = found["flops"], found["run"]
    assert flops["decode"] == 0 and run["forwards_per_image"] == 1
    images_s = flops["denoiser_forward"] / (gpus.DENOISER * 989e12)
    views_s = flops["view"] / (gpus.VIEWS * 989e12)
    assert found["seconds"]["generate"] == pytest.approx(run["images"] * images_s)
    assert found["seconds"]["train"] == pytest.approx(run["views"] * views_s)
    twice = plan.plan(CONFIG, SHORT, gpu="b200")["rates"]["views_per_s"]
    assert twice / found["rates"]["views_per_s"] == pytest.approx(2250 / 989)


def test_a_decoder_has_a_rate_of_its_own_in_an_estimate() -> None:
    """The roofline in the table: DiT-XL/2 with Stable Diffusion's decoder and with TAESD."""
    h100 = gpus.GPUS["h100"]
    for decoder, forwards, low, high in ((528e9, 200, 9, 12), (35e9, 30, 60, 75)):
        flops = Flops(
            denoiser=int(237.2e9),
            decoder=int(decoder),
            teachers=int(3.63e9),
            student=int(3.63e9),
            student_step=int(10.9e9),
        )
        assert low < (gpus.images_per_s(h100, flops, forwards) or 0) < high
        assert 6000 < (gpus.views_per_s(h100, flops) or 0) < 9100
    unknown = replace(flops, denoiser=None, student_step=None)
    assert gpus.images_per_s(h100, unknown, 1) is None and gpus.views_per_s(h100, unknown) is None


def test_a_gpu_is_estimated_and_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan.plan(CONFIG, SHORT, gpu="h100")
    assert "estimates" in found["rates"]["origin"] and found["seconds"]["total"] > 0
    assert found["largest_capacity_images"] > 10**7
    with pytest.raises(UserError, match="--gpu: got h1000, expected one of a100"):
        plan.plan(CONFIG, SHORT, gpu="h1000")
    with pytest.raises(SystemExit):
        cli.main(["plan", CONFIG, "--views-per-s", "0"])
    assert "expected a positive number" in capsys.readouterr().err
