"""The compiled parts of the package, run on fake tensors of an absent GPU.

Sizes are those of configs/paper/imagenet.yaml, but for the depth of the denoiser.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import torch
from absent_gpu import CPU, DEVICE
from paper_models import DIT, IMAGENET, VAE
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from dmkd_fast import (
    Denoiser,
    DiffusionSampler,
    Guidance,
    Schedule,
    Steps,
    StudentTrainer,
    Targets,
    Views,
    ViewSpec,
)
from dmkd_fast.classifiers.loading import build, to_channels_last
from dmkd_fast.denoisers.dit import LeanDiT
from dmkd_fast.denoisers.wrappers import Decoder
from dmkd_fast.sampling import sampler as sampling
from dmkd_fast.sampling.graph import compiled
from dmkd_fast.sampling.solvers import SolverTable
from dmkd_fast.sampling.step import decode

DDPM = {"_class_name": "DDPMScheduler", "clip_sample": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
CONSISTENCY = {"_class_name": "CMStochasticIterativeScheduler"}
IMAGES, DECODED, VIEWS, CLASSES = 160, sampling.MOST_DECODED["cuda"], 256, 1000
IS_STOCHASTIC: Any = SolverTable.stochastic.fget  # type: ignore[attr-defined]
PAPER = "ddpm with learned variances, guided, {} blocks"


class Case(NamedTuple):
    """A compiled part of the package."""

    run: Callable[[FakeTensorMode], None]
    rows: int
    """Images or views of a call."""
    unit: str


class DistilledDiT(nn.Module):
    """A DiT with the guidance scale as an input, as guidance-distilled models have it."""

    def __init__(self, dit: LeanDiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor, scales: Tensor) -> Tensor:
        result: Tensor = self.dit(latents, timesteps + scales, labels)
        return result


def sample(
    mode: FakeTensorMode,
    solver: Any,
    scheduler: dict[str, Any],
    guidance: Guidance = Guidance(),  # noqa: B008
    *,
    layers: int = 1,
    is_distilled: bool = False,
) -> None:
    """Sample latents with a DiT of the width of DiT-XL/2 and few blocks.

    Args:
        mode: Mode of the fake tensors.
        solver: Solver name.
        scheduler: Content of scheduler_config.json.
        guidance: Guidance of the sampler.
        layers: Number of transformer blocks.
        is_distilled: Whether the module takes the guidance scales.
    """
    learned = scheduler.get("variance_type") == "learned_range"
    dit = LeanDiT(DIT | {"num_layers": layers, "out_channels": 8 if learned else 4})
    dit.attention = "xformers"  # One opaque operator, as every kernel for attention is.
    denoiser = Denoiser(
        module=(DistilledDiT(dit) if is_distilled else dit).eval().requires_grad_(False),
        scheduler=scheduler,
        latent_shape=(4, 32, 32),
        num_classes=CLASSES,
        null_class=CLASSES,
        takes_guidance=is_distilled,
    )
    with (
        # The sampler reads its table when it is made, which fake tensors do not allow.
        mock.patch.object(sampling, "solver_table", _outside(sampling.solver_table)),
        mock.patch.object(SolverTable, "stochastic", property(_outside(IS_STOCHASTIC))),
    ):
        sampler = DiffusionSampler(
            denoiser,
            Steps(count=4, solver=solver),
            guidance,
            micro_batch_images=IMAGES,
            dtype=torch.float16,
            device=DEVICE,
            compile=True,
        )
        rows = mode.from_tensor(sampler.table.rows).to(DEVICE)
        object.__setattr__(sampler.table, "rows", rows)
        ids = torch.arange(IMAGES, device=DEVICE)
        sampler.trajectory(ids, ids)


def make_images(mode: FakeTensorMode) -> None:
    """Decode latents with SD-VAE as the sampler does."""
    del mode
    decoder = Decoder(diffusers.AutoencoderKL(**VAE)).eval().requires_grad_(False)
    latents = torch.empty(DECODED, 4, 32, 32, device=DEVICE)
    with torch.inference_mode():
        compiled(decode)(decoder.to(DEVICE, torch.float16), latents, torch.float16)


def teach(mode: FakeTensorMode) -> None:
    """Run the recipe's teacher, a ResNet-18, on the views of a batch."""
    del mode
    with unset_fake_temporarily():
        views = Views(ViewSpec(size=224, mean=IMAGENET["mean"], std=IMAGENET["std"]))
        targets = Targets(_resnet(), views, dtype=torch.float16, compile=True)
    targets.networks.to(DEVICE)
    with torch.no_grad():
        targets.logits({targets.input: _views(DEVICE)}, _labels(DEVICE), progress=0.0)


def learn(mode: FakeTensorMode) -> None:
    """Run forward and backward of the recipe's student, a ResNet-18, traced on the CPU."""
    del mode
    with unset_fake_temporarily():
        student = to_channels_last(_resnet())
    schedule = Schedule(batch_size=VIEWS, num_views=100 * VIEWS, lr=0.1, name="sgd")
    trainer = StudentTrainer(student.to(CPU), schedule, dtype=torch.float16, compile=True)
    trainer.start(0.1)
    logits = torch.empty(VIEWS, CLASSES, dtype=torch.float16)
    trainer.learn(_views(CPU), logits, _labels(CPU))


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function on real tensors of the CPU."""

    def call(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*(CPU if isinstance(a, torch.device) else a for a in args))

    return call


def _resnet() -> nn.Module:
    return build("torchvision:resnet18", num_classes=CLASSES, in_chans=3)


def _views(device: torch.device) -> Tensor:
    views = torch.empty(VIEWS, 3, 224, 224, device=device)
    return views.to(memory_format=torch.channels_last)


def _labels(device: torch.device) -> Tensor:
    return torch.zeros(VIEWS, dtype=torch.int64, device=device)


def _steps(solver: str, scheduler: dict[str, Any], *guidance: Guidance, **changes: Any) -> Case:
    run = partial(sample, solver=solver, scheduler=scheduler, **changes)
    if guidance:
        run = partial(run, guidance=guidance[0])
    return Case(run, IMAGES, "an image")


LEARNED, OF_PAPER = DDPM | {"variance_type": "learned_range"}, Guidance(scale=2, channels=3)
BY_CLASS = Guidance(scale=2, by_class={3: 1.5})
INTERVAL = Guidance(scale=2, interval=(0.25, 0.75))
CASES = {
    PAPER.format(2): _steps("ddpm", LEARNED, OF_PAPER, layers=2),
    PAPER.format(3): _steps("ddpm", LEARNED, OF_PAPER, layers=3),
    "ddpm, not guided, 1 block": _steps("ddpm", DDPM),
    "ddim, clipped, scales by class, 1 block": _steps(
        "ddim", DDPM | {"clip_sample": True}, BY_CLASS
    ),
    "dpm++2m, guided in an interval, 1 block": _steps("dpm++2m", DDPM, INTERVAL),
    "euler, scale as an input, 1 block": _steps(
        "euler", FLOW, Guidance(scale=2), is_distilled=True
    ),
    "consistency, not guided, 1 block": _steps("consistency", CONSISTENCY),
    "decoder of SD-VAE": Case(make_images, DECODED, "an image"),
    "teacher, ResNet-18": Case(teach, VIEWS, "a view"),
    "student, ResNet-18, forward and backward": Case(learn, VIEWS, "a view"),
}
