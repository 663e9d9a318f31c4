"""Guidance by a weaker denoiser: what it computes, and which models fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from sampler_cases import dit_sampler, embedded, make
from small_jobs import TinyDenoiser, tiny_sampler
from small_models import dit_folder, small_dit
from torch import Tensor, nn

from dmkd_fast.config.networks import DenoiserConfig
from dmkd_fast.denoisers.dit import DiTBlock, lean_dit
from dmkd_fast.jobs.images import open_denoiser
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.sampling.block_cache import BlockCache

IDS = torch.arange(4)


class Weak(nn.Module):
    """A module whose prediction is a multiple of another one's, for the same class."""

    def __init__(self, module: nn.Module, factor: float) -> None:
        super().__init__()
        self.module, self.factor = module, factor

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        assert (labels < 4).all(), "the null class"
        prediction: Tensor = self.module(latents, timesteps, labels) * self.factor
        return prediction


@pytest.mark.parametrize("null_class", [4, None])
def test_the_prediction_is_extrapolated_from_the_weak_one(null_class: int | None) -> None:
    """weak = f / 2, so weak + 3 (f - weak) = 2 f."""
    weak = Weak(TinyDenoiser(), 0.5)
    guided = tiny_sampler(weak=weak, scale=3.0, count=1, null_class=null_class)
    twice = tiny_sampler(module=Weak(TinyDenoiser(), 2.0), scale=1.0, count=1)
    ids, labels = torch.arange(16), torch.arange(16) % 4
    torch.testing.assert_close(guided.trajectory(ids, labels), twice.trajectory(ids, labels))
    assert guided.forwards_per_image == 2


@pytest.mark.slow
def test_a_weak_model_as_strong_as_the_denoiser_changes_nothing() -> None:
    module = embedded().denoiser.module
    plain, guided = embedded(scale=1.0), embedded(weak=module, scale=4.0)
    ids = torch.arange(8)
    pair = plain.trajectory(ids, ids % 10), guided.trajectory(ids, ids % 10)
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def test_variances_are_those_of_the_denoiser_and_the_weak_model_needs_none() -> None:
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    images = []
    for out_channels in (8, 4):
        weak = lean_dit(small_dit(out_channels=8))
        assert weak is not None
        if out_channels == 4:
            weak = Halved(weak)
        images.append(make(dit_sampler(scheduler=scheduler, weak=weak), IDS, 1000))
    assert torch.equal(*images)


class Halved(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        prediction: Tensor = self.module(*inputs)[:, :4]
        return prediction


def test_blocks_of_the_denoiser_are_reused_and_those_of_the_weak_model_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strong, weak = (lean_dit(small_dit(num_layers=n)) for n in (5, 2))
    assert strong is not None and weak is not None
    calls, run = {"strong": 0, "weak": 0}, DiTBlock.forward

    def forward(block: DiTBlock, *rest: Any) -> Any:
        calls["strong" if block in strong.blocks.children() else "weak"] += 1
        return run(block, *rest)

    monkeypatch.setattr(DiTBlock, "forward", forward)
    sampler = dit_sampler(module=strong, weak=weak, block_cache=BlockCache(blocks=(0.0, 1.0)))
    make(sampler, IDS, 1000)
    assert calls == {"strong": 10, "weak": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("folders")
    dit_folder(place / "dit")
    dit_folder(place / "weak", num_layers=1)
    dit_folder(place / "other classes", num_embeds_ada_norm=7)
    dit_folder(
        place / "other levels", scheduler=diffusers.DDIMScheduler(beta_end=0.03, clip_sample=False)
    )
    return place


def test_a_folder_names_the_weak_model(folders: Path) -> None:
    card = "---\nlicense: mit\n---\n"
    (folders / "weak" / "README.md").write_text(card)
    config = DenoiserConfig(path=str(folders / "dit"), weak=str(folders / "weak"))
    opened = open_denoiser(config, torch.device("cpu"))
    assert opened.weak is not None and len(opened.modules) == 3
    assert sum(p.numel() for p in opened.weak.parameters()) < sum(
        p.numel() for p in opened.module.parameters()
    )
    assert opened.license == "unknown, weak denoiser mit"


@pytest.mark.parametrize(
    ("weak", "message"),
    [
        ("other classes", "denoiser.weak: got num_classes 7, expected denoiser.path's 1000"),
        ("other levels", "denoiser.weak: got other noise levels or predictions"),
        ("flow", "denoiser.weak: got other noise levels or predictions"),
        ("missing", "missing"),
    ],
)
def test_a_weak_model_that_does_not_fit_is_refused(folders: Path, weak: str, message: str) -> None:
    if weak == "flow":
        dit_folder(folders / "flow")
        path = folders / "flow" / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"}))
    config = DenoiserConfig(path=str(folders / "dit"), weak=str(folders / weak))
    with pytest.raises(UserError, match=message):
        open_denoiser(config, torch.device("cpu"))


def test_a_weak_model_for_a_denoiser_that_takes_the_scale_is_refused() -> None:
    with pytest.raises(UserError, match=r"denoiser\.weak: got a weak denoiser for a model"):
        tiny_sampler(weak=TinyDenoiser(), takes_guidance=True)
