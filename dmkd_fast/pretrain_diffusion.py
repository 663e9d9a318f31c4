"""Trains denoisers: one on real images, and from that one another that needs only a few steps.

Stands on floor 3. B batch, c channels, H W pixels, K steps of the few-step denoiser.

Sources: flow matching (Lipman et al., arXiv 2210.02747) with timesteps from a logit-normal
distribution (Esser et al., arXiv 2403.03206, section 3.1). Few steps: the average velocity over an
interval (Geng et al., MeanFlow, arXiv 2505.13447), here read off the trajectories of the guided
many-step sampler (as in Meng et al., arXiv 2210.03142), so that guidance is folded in.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dmkd_fast import config as cfg
from dmkd_fast import denoisers, image_sets, memory, pictures, run_dir, runtime
from dmkd_fast.assets import resolve as resolve_path
from dmkd_fast.dit import LeanDiT
from dmkd_fast.noise_levels import flow_sigmas
from dmkd_fast.pretrain import (
    autocast,
    compiles,
    less_memory,
    load_real,
    prepare,
    results,
    train,
    write_card,
)
from dmkd_fast.sampler import DiffusionSampler

FLOW = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
}
# Ids of trajectories that are only measured on, apart from those of training.
HELD_OUT_ID = 2**40


@less_memory
def denoiser(
    config: cfg.PretrainDenoiserConfig, data: Path, *, resume: bool = False
) -> dict[str, Any]:
    """Train a class-conditional pixel DiT by flow matching; writes `model` into the run directory.

    Returns:
        held_out_loss and what the run took.
    """
    config, device, dtype = prepare(config, resume)
    with cfg.user_errors():
        real = load_real(data, device)
    channels, size = real.train.images.shape[1:3]
    num_classes = len(real.train.class_names)
    _check_size(config, size, device)
    model = denoisers.new_pixel_dit(
        num_classes=num_classes, channels=channels, image_size=size, patch_size=config.patch_size,
        num_layers=config.num_layers, num_heads=config.num_heads, head_dim=config.head_dim,
    ).to(device)  # fmt: skip
    forward = torch.compile(model) if compiles(config, device) else model

    def loss_of(indices: Tensor, uses: Tensor) -> Tensor:
        del uses  # An image is not changed; what differs between uses is noise and timestep.
        labels = drop_labels(real.train.labels[indices], num_classes, config.label_dropout)
        return flow_loss(forward, real.train.images[indices], labels, device, dtype)

    with run_dir.opened(config, resume=resume) as folder:
        average, facts = train(
            config, model, loss_of, len(real.train.labels), folder, resume, dtype
        )
        torch.manual_seed(config.seed)
        facts["held_out_loss"] = _held_out_loss(average.module, real.held_out, device, dtype)
        with results(folder) as target:
            denoisers.save_denoiser(average.module.dit, FLOW, target)
            for scale, images in _sample_grids(target, num_classes, device).items():
                path = target / f"samples_guidance_{scale:g}.png"
                pictures.grid(images, real.train.class_names, path)
            title = f"{config.name}: pixel DiT"
            write_card(target, title, "pretrain denoiser CONFIG --data DIR", config, facts)
    return facts


def _check_size(config: cfg.PretrainDenoiserConfig, image_size: int, device: torch.device) -> None:
    """Refuse a transformer that does not divide the images or does not fit into memory."""
    if image_size % config.patch_size:
        raise cfg.ConfigError(
            f"patch_size: got {config.patch_size}, expected a divisor of the images' {image_size} "
            "pixels; change it"
        )
    width, tokens = config.num_heads * config.head_dim, (image_size // config.patch_size) ** 2
    weights = config.num_layers * (4 + 8 + 6) * width**2  # attention, MLP, modulation
    batch = config.train.batch_size // config.train.accumulate * tokens
    memory.check_fits(
        {
            "weights, gradients, optimizer, average": 4 * weights * 5,
            memory.SAVED: 2 * batch * width * 8 * config.num_layers,
        },
        runtime.available_bytes(device),
    )


def drop_labels(labels: Tensor, null_class: int, share: float) -> Tensor:
    """Replace a random `share` of labels (B,) by the null class, one decision per example."""
    dropped = torch.rand(labels.shape, device=labels.device) < share
    return torch.where(dropped, null_class, labels)


def flow_loss(
    forward: Callable[..., Tensor], images: Tensor, labels: Tensor, device: torch.device,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Mean squared error of the predicted velocity noise - image.

    Args:
        forward: The denoiser.
        images: (B, c, H, W) uint8.
        labels: (B,) int64, null class included.
    """
    clean = images.float() / 127.5 - 1
    noise = torch.randn_like(clean)
    levels = torch.sigmoid(torch.randn(len(clean), device=device))  # (B,)
    mixed = torch.lerp(clean, noise, levels[:, None, None, None])
    with _attention(device), autocast(device, dtype):
        velocity = forward(mixed, levels * 1000, labels)
    return nn.functional.mse_loss(velocity.float(), noise - clean)


@less_memory
def fewstep(config: cfg.PretrainFewstepConfig, *, resume: bool = False) -> dict[str, Any]:
    """Teach a flow denoiser to cross K intervals in one evaluation each; writes `model`.

    No image is needed: what is learned is the denoiser's own guided trajectories from noise.

    Returns:
        rms_to_teacher: Root mean square difference, in units of [-1, 1] pixels, between images from
            the same noise; rms_without_training: the same for the teacher's own K guided steps.
    """
    config, device, dtype = prepare(config, resume)
    with cfg.user_errors():
        given = resolve_path(config.denoiser.path, config.denoiser.revision)
        start = denoisers.load_denoiser(given, device, null_class=config.denoiser.null_class)
        if start.scheduler.get("_class_name") != FLOW["_class_name"]:
            raise ValueError(
                f"denoiser.path: got a {start.scheduler.get('_class_name')}, expected a flow model "
                f"({FLOW['_class_name']}); use one from `dmkd pretrain denoiser`"
            )
        if not isinstance(start.module, LeanDiT | denoisers.PixelDiT) or start.decoder is not None:
            raise ValueError(
                f"denoiser.path: got a {type(start.module).__name__}"
                f"{'' if start.decoder is None else ' on latents'}, expected a pixel DiT; use one "
                "from `dmkd pretrain denoiser`"
            )
    pool = Pool(start, config, device, dtype)
    model: Any = denoisers.load_denoiser(given, device, lean=False).module
    denoisers.share_embedder(model.dit)
    model.requires_grad_(True)
    forward = torch.compile(model) if compiles(config, device) else model

    def loss_of(indices: Tensor, uses: Tensor) -> Tensor:
        del uses
        states, timesteps, velocity, labels = pool.intervals(indices)
        with _attention(device), autocast(device, dtype):
            predicted = forward(states, timesteps, labels)
        return nn.functional.mse_loss(predicted.float(), velocity)

    with run_dir.opened(config, resume=resume) as folder:
        average, facts = train(
            config, model, loss_of, config.pool_images * config.num_steps, folder, resume, dtype,
            before_step=lambda uses: pool.make(int(uses[0]) // config.reuse),
        )  # fmt: skip
        scheduler = {
            **start.scheduler,
            "distilled_steps": config.num_steps,
            "distilled_guidance_scale": config.sampler.guidance_scale,
        }
        with results(folder) as target:
            denoisers.save_denoiser(average.module.dit, scheduler, target)
            facts |= _compare(target, pool, start, config, device)
            write_card(
                target, f"{config.name}: {config.num_steps}-step pixel DiT",
                "pretrain fewstep CONFIG", config, facts,
                source=f"trajectories of `{config.denoiser.path}`",
            )  # fmt: skip
    return facts


class Pool:
    """Guided trajectories of the teacher at the K + 1 states that the few-step model steps over."""

    def __init__(
        self, start: denoisers.Denoiser, config: cfg.PretrainFewstepConfig, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.size, self.num_steps, self.device = config.pool_images, config.num_steps, device
        self.num_classes = start.num_classes
        self.stride = config.sampler.num_steps // config.num_steps
        shape = start.latent_shape
        compiled = config.sampler.compile
        with cfg.user_errors():
            self.sampler = DiffusionSampler(
                start.module, scheduler=start.scheduler, latent_shape=shape,
                null_class=start.null_class, num_steps=config.sampler.num_steps,
                solver=config.sampler.solver, guidance_scale=config.sampler.guidance_scale,
                micro_batch_images=config.sampler.micro_batch_images, dtype=dtype, device=device,
                seed=config.seed, compile=compiles(config, device) and compiled is not False,
            )  # fmt: skip
        states = {"pool_images": 2 * (config.num_steps + 1) * self.size * math.prod(shape)}
        memory.check_fits(states, runtime.available_bytes(device))
        shift = float(start.scheduler.get("shift", 1.0))
        self.sigmas = flow_sigmas(config.sampler.num_steps, shift)[:: self.stride].float()
        self.sigmas = self.sigmas.to(device)
        self._states = torch.empty(config.num_steps + 1, self.size, *shape, dtype=torch.float16)
        self._states = self._states.to(device)
        self._labels = torch.empty(self.size, dtype=torch.int64, device=device)
        self._number: int | None = None
        self._in_flight = runtime.InFlight(device)

    def make(self, number: int) -> None:
        """Fill the pool with the trajectories of pool `number`, unless they are there already."""
        if number == self._number:
            return
        self._number = None
        ids = number * self.size + torch.arange(self.size, device=self.device)
        self._labels = ids % self.num_classes
        size = self.sampler.micro_batch_images
        for first in range(0, self.size, size):
            part = slice(first, first + size)
            with self._in_flight.piece():
                self._states[:, part] = self.trajectories(ids[part], self._labels[part])
        self._number = number

    def trajectories(self, ids: Tensor, labels: Tensor) -> Tensor:
        """States at the K + 1 noise levels: (B,), (B,) -> (K + 1, B, c, H, W) float32."""
        return self.sampler.trajectory(ids, labels)[:: self.stride]

    def intervals(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Examples (B,) -> states, timesteps, average velocities over the interval, labels."""
        k, place = indices % self.num_steps, indices // self.num_steps
        states, after = self._states[k, place].float(), self._states[k + 1, place].float()
        width = (self.sigmas[k + 1] - self.sigmas[k])[:, None, None, None]
        return states, self.sigmas[k] * 1000, (after - states) / width, self._labels[place]


@torch.inference_mode()
def _compare(
    folder: Path, pool: Pool, start: denoisers.Denoiser, config: cfg.PretrainFewstepConfig,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Saved few-step model and teacher from the same new noise: RMS differences and a picture."""
    loaded = denoisers.load_denoiser(folder, device)
    size = pool.sampler.micro_batch_images
    ids = HELD_OUT_ID + torch.arange(size, device=device)
    labels = ids % start.num_classes
    wanted = pool.trajectories(ids, labels)[-1]
    shared: dict[str, Any] = {
        "latent_shape": start.latent_shape, "null_class": start.null_class,
        "num_steps": config.num_steps, "micro_batch_images": size, "device": device,
        "seed": config.seed,
    }  # fmt: skip
    made = DiffusionSampler(loaded.module, scheduler=loaded.scheduler, **shared)
    untrained = DiffusionSampler(
        start.module, scheduler=start.scheduler, solver=config.sampler.solver,
        guidance_scale=config.sampler.guidance_scale, **shared,
    )  # fmt: skip
    facts = {}
    for name, sampler in (("rms_to_teacher", made), ("rms_without_training", untrained)):
        got = sampler.trajectory(ids, labels)[-1].clamp(-1, 1)
        facts[name] = round((got - wanted.clamp(-1, 1)).square().mean().sqrt().item(), 4)
    classes = torch.arange(start.num_classes, device=device).repeat_interleave(8)
    out = torch.empty((len(classes), *start.latent_shape), dtype=torch.uint8, device=device)
    made.sample(HELD_OUT_ID + torch.arange(len(classes), device=device), classes, out=out)
    names = [str(label) for label in range(start.num_classes)]
    pictures.grid(out, names, folder / "samples.png")
    return facts


def _attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """With 49 tokens the CPU's flash backward takes half of the whole step; products do not."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


@torch.inference_mode()
def _held_out_loss(
    model: nn.Module, part: image_sets.ImageSet, device: torch.device, dtype: torch.dtype
) -> float:
    losses = [
        flow_loss(model, images, labels, device, dtype)
        for images, labels in zip(part.images.split(500), part.labels.split(500), strict=True)
    ]
    return round(torch.stack(losses).mean().item(), 5)


def _sample_grids(folder: Path, num_classes: int, device: torch.device) -> dict[float, Tensor]:
    """Eight images of each class at three guidance scales, 16 steps, from the saved weights."""
    loaded = denoisers.load_denoiser(folder, device)
    labels = torch.arange(num_classes, device=device).repeat_interleave(8)
    ids = torch.arange(len(labels), device=device)
    shape = loaded.latent_shape
    grids = {}
    for scale in (1.0, 1.5, 2.0):
        sampler = DiffusionSampler(
            loaded.module, scheduler=loaded.scheduler, latent_shape=shape,
            null_class=loaded.null_class, num_steps=16, guidance_scale=scale, device=device,
            micro_batch_images=len(labels),
        )  # fmt: skip
        out = torch.empty((len(labels), *shape), dtype=torch.uint8, device=device)
        grids[scale] = sampler.sample(ids, labels, out=out)
    return grids
