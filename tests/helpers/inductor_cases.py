"""Run the compiled parts of the package on fake tensors of an absent GPU.

The sizes are those of configs/paper/imagenet.yaml, but the depth of the denoiser.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import diffusers
import torch
from absent_gpu import DEVICE
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
from dmkd_fast.sampling.solvers import SolverTable

DDPM = {"_class_name": "DDPMScheduler", "clip_sample": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
CONSISTENCY = {"_class_name": "CMStochasticIterativeScheduler"}
CPU = torch.device("cpu")
_STOCHASTIC: Any = SolverTable.stochastic.fget
IMAGES, VIEWS, CLASSES = 160, 256, 1000


class GuidedDiT(nn.Module):
    """A DiT whose label embedding is shifted by the guidance scale, as a distilled model's is."""

    def __init__(self, dit: LeanDiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor, scales: Tensor) -> Tensor:
        return self.dit(latents, timesteps + scales, labels)


def sample(
    mode: FakeTensorMode,
    solver: Any,
    scheduler: dict[str, Any],
    guidance: Guidance = Guidance(),  # noqa: B008
    *,
    layers: int = 1,
    is_distilled: bool = False,
    decoder: bool = False,
) -> None:
    """Sample one micro-batch with a DiT-XL/2 of few blocks.

    Args:
        mode: Mode of fake tensors.
        solver: Name of the solver.
        scheduler: Content of scheduler_config.json; without learned variances, half of the output
            channels are left out.
        guidance: Guidance of the sampler.
        layers: Number of transformer blocks.
        is_distilled: Whether the module takes the guidance scales.
        decoder: Whether SD-VAE's decoder makes images of the latents.
    """
    del mode
    learned = scheduler.get("variance_type") == "learned_range"
    changes = {"num_layers": layers, "out_channels": 8 if learned else 4}
    dit = LeanDiT(DIT | changes).eval().requires_grad_(False)
    dit.attention = "xformers"  # What `auto` takes on an H100: an opaque operator.
    vae = Decoder(diffusers.AutoencoderKL(**VAE)).eval() if decoder else None
    denoiser = Denoiser(
        module=GuidedDiT(dit) if is_distilled else dit,
        scheduler=scheduler,
        latent_shape=(4, 32, 32),
        image_shape=(3, 256, 256) if decoder else (4, 32, 32),
        decoder=vae,
        num_classes=CLASSES,
        null_class=CLASSES,
        takes_guidance=is_distilled,
    )
    with (
        mock.patch.object(sampling, "solver_table", _outside(sampling.solver_table)),
        mock.patch.object(SolverTable, "stochastic", property(_outside(_STOCHASTIC))),
        # Capture needs a device; the graph's launches are those of the call.
        mock.patch.object(sampling, "CudaGraph", lambda make, ids, labels: make),
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
        object.__setattr__(sampler.table, "rows", sampler.table.rows.to(DEVICE))
        ids = torch.arange(IMAGES, device=DEVICE)
        slots = torch.empty(IMAGES, *denoiser.image_shape, dtype=torch.uint8, device=DEVICE)
        sampler.sample(ids, ids, out=slots)


def teach(mode: FakeTensorMode) -> None:
    """Run the teacher of the recipe, a ResNet-18, on the views of a batch."""
    with unset_fake_temporarily():
        views = Views(ViewSpec(size=224, mean=IMAGENET["mean"], std=IMAGENET["std"]))
        targets = Targets(_resnet(), views, dtype=torch.float16, compile=True)
    targets.networks.to(DEVICE)
    targets.logits({targets.input: _views()}, _labels(), progress=0.0)


def learn(mode: FakeTensorMode) -> None:
    """Run forward and backward of the student of the recipe, a ResNet-18."""
    with unset_fake_temporarily():
        resnet = to_channels_last(_resnet())
    schedule = Schedule(batch_size=VIEWS, num_views=100 * VIEWS, lr=0.1, name="sgd")
    student = StudentTrainer(resnet.to(DEVICE), schedule, dtype=torch.float16, compile=True)
    student.start(0.1)
    logits = torch.empty(VIEWS, CLASSES, dtype=torch.float16, device=DEVICE)
    student.learn(_views(), logits, _labels())


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run `function` on real tensors of the CPU."""

    def call(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*(CPU if isinstance(a, torch.device) else a for a in args))

    return call


def _resnet() -> nn.Module:
    return build("torchvision:resnet18", num_classes=CLASSES, in_chans=3)


def _views() -> Tensor:
    views = torch.empty(VIEWS, 3, 224, 224, device=DEVICE)
    return views.to(memory_format=torch.channels_last)


def _labels() -> Tensor:
    return torch.zeros(VIEWS, dtype=torch.int64, device=DEVICE)


PAPER = partial(
    sample,
    solver="ddpm",
    scheduler=DDPM | {"variance_type": "learned_range"},
    guidance=Guidance(scale=2, channels=3),
)
CASES: dict[str, Callable[[FakeTensorMode], None]] = {
    "ddpm, learned variances, 2 blocks": partial(PAPER, layers=2),
    "ddpm, learned variances, 3 blocks": partial(PAPER, layers=3),
    "ddim, clipped, scales by class": partial(
        sample,
        solver="ddim",
        scheduler=DDPM | {"clip_sample": True},
        guidance=Guidance(scale=2, by_class={3: 1.5}),
    ),
    "dpm++2m, guided in an interval": partial(
        sample, solver="dpm++2m", scheduler=DDPM, guidance=Guidance(scale=2, interval=(0.25, 0.75))
    ),
    "euler, scale as an input": partial(
        sample, solver="euler", scheduler=FLOW, guidance=Guidance(scale=2), is_distilled=True
    ),
    "consistency, not guided": partial(sample, solver="consistency", scheduler=CONSISTENCY),
    "decoder": partial(sample, solver="ddim", scheduler=DDPM, decoder=True),
    "teacher": teach,
    "student": learn,
}
