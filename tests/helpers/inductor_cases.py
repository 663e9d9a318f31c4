"""The compiled parts of the package, run on fake tensors of an absent GPU.

Sizes are those of configs/paper/imagenet.yaml, but for the depth of the denoiser. UNets and the
denoiser of text are small ones.
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
from small_models import UNET
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
from dmkd_fast.denoisers.families.class_unet import ClassUNet
from dmkd_fast.denoisers.families.pixart import PixArt
from dmkd_fast.denoisers.families.text_unet import TextUNet
from dmkd_fast.denoisers.wrappers import Decoder
from dmkd_fast.sampling import sampler as sampling
from dmkd_fast.sampling.graph import compiled
from dmkd_fast.sampling.solvers import SolverTable
from dmkd_fast.sampling.step import decode

DDPM = {"_class_name": "DDPMScheduler", "clip_sample": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
CONSISTENCY = {"_class_name": "CMStochasticIterativeScheduler"}
IMAGES, DECODED, VIEWS, CLASSES = 160, sampling.MOST_DECODED["cuda"], 256, 1000
TOKENS, WIDTH = 16, 32  # of the prompts
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
    make: Callable[[dict[str, Any]], nn.Module],
    takes_guidance: bool = False,
) -> None:
    """Sample latents with a denoiser.

    Args:
        mode: Mode of the fake tensors.
        solver: Solver name.
        scheduler: Content of scheduler_config.json.
        guidance: Guidance of the sampler.
        make: Function of the scheduler that makes the module.
        takes_guidance: Whether the module takes the guidance scales.
    """
    module = make(scheduler)
    denoiser = Denoiser(
        module=module.eval().requires_grad_(False),
        scheduler=scheduler,
        latent_shape=(4, 32, 32) if isinstance(module, LeanDiT | DistilledDiT) else (4, 8, 8),
        num_classes=CLASSES,
        null_class=CLASSES,
        takes_guidance=takes_guidance,
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


def make_dit(scheduler: dict[str, Any], layers: int = 1) -> LeanDiT:
    """Make a DiT of the width of DiT-XL/2 and few blocks."""
    channels = _channels(scheduler)
    dit = LeanDiT(DIT | {"num_layers": layers, "out_channels": channels})
    dit.attention = "xformers"  # One opaque operator, as every kernel for attention is.
    return dit


def make_distilled_dit(scheduler: dict[str, Any]) -> nn.Module:
    """Make a DiT of one block that takes the guidance scales."""
    return DistilledDiT(make_dit(scheduler))


def make_class_unet(scheduler: dict[str, Any]) -> nn.Module:
    """Make a small UNet that is told the class."""
    sizes = UNET | {"num_class_embeds": CLASSES + 1, "in_channels": 4}
    unet = diffusers.UNet2DModel(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **(sizes | {"out_channels": _channels(scheduler)}),
    )
    return ClassUNet(unet)


def make_text_unet(scheduler: dict[str, Any]) -> nn.Module:
    """Make a small UNet of the kind of Stable Diffusion's, of one level."""
    sizes = UNET | {"block_out_channels": (32,), "cross_attention_dim": WIDTH}
    unet = diffusers.UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        **(sizes | {"out_channels": _channels(scheduler)}),
    )
    return TextUNet(unet, torch.zeros(CLASSES + 1, TOKENS, WIDTH))


def make_pixart(scheduler: dict[str, Any]) -> nn.Module:
    """Make a small PixArt of one block."""
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=_channels(scheduler),
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    prompts = torch.zeros(CLASSES + 1, TOKENS, WIDTH)
    return PixArt(transformer, prompts, prompts[..., 0].long(), None)


def steer(image: Tensor, labels: Tensor, step: Tensor) -> Tensor:
    """Guide images to a level that depends on class and step."""
    return 0.1 * ((labels + step)[:, None, None, None] - image)


steer.is_function_of_id = True  # type: ignore[attr-defined]


def _channels(scheduler: dict[str, Any]) -> int:
    return 8 if scheduler.get("variance_type") == "learned_range" else 4


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


def _steps(
    solver: str,
    scheduler: dict[str, Any],
    guidance: Guidance = Guidance(),  # noqa: B008
    make: Callable[[dict[str, Any]], nn.Module] = make_dit,
    **changes: Any,
) -> Case:
    run = partial(
        sample, solver=solver, scheduler=scheduler, guidance=guidance, make=make, **changes
    )
    return Case(run, IMAGES, "an image")


LEARNED, OF_PAPER = DDPM | {"variance_type": "learned_range"}, Guidance(scale=2, channels=3)
TWICE, BY_CLASS = Guidance(scale=2), Guidance(scale=2, by_class={3: 1.5})
INTERVAL = Guidance(scale=2, interval=(0.25, 0.75))
CASES = {
    PAPER.format(2): _steps("ddpm", LEARNED, OF_PAPER, partial(make_dit, layers=2)),
    PAPER.format(3): _steps("ddpm", LEARNED, OF_PAPER, partial(make_dit, layers=3)),
    "ddpm, not guided, 1 block": _steps("ddpm", DDPM),
    "ddim, clipped, scales by class, 1 block": _steps(
        "ddim", DDPM | {"clip_sample": True}, BY_CLASS
    ),
    "dpm++2m, guided in an interval, 1 block": _steps("dpm++2m", DDPM, INTERVAL),
    "euler, scale as an input, 1 block": _steps(
        "euler", FLOW, TWICE, make_distilled_dit, takes_guidance=True
    ),
    "consistency, not guided, 1 block": _steps("consistency", CONSISTENCY),
    "ddim with a guide, 1 block": _steps("ddim", DDPM, Guidance(guide=steer)),
    "ddim, small UNet with classes": _steps("ddim", DDPM, make=make_class_unet),
    "ddim, guided, small UNet with prompts": _steps("ddim", DDPM, TWICE, make_text_unet),
    "ddim, guided, small PixArt": _steps("ddim", DDPM, TWICE, make_pixart),
    "decoder of SD-VAE": Case(make_images, DECODED, "an image"),
    "teacher, ResNet-18": Case(teach, VIEWS, "a view"),
    "student, ResNet-18, forward and backward": Case(learn, VIEWS, "a view"),
}
