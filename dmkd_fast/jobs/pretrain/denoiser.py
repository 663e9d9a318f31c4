"""Train a denoiser on real images: `dmkd pretrain denoiser`.

Shapes: batch B, c channels, H x W pixels.

Sources: flow matching (Lipman et al., arXiv 2210.02747) with timesteps from a logit-normal
distribution (Esser et al., arXiv 2403.03206, section 3.1).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dmkd_fast.config.jobs import PretrainDenoiserConfig
from dmkd_fast.data import test_sets
from dmkd_fast.data.class_names import write_class_names
from dmkd_fast.data.listing import CLASS_NAMES
from dmkd_fast.denoisers.loading import load_denoiser, load_encoder
from dmkd_fast.denoisers.trainable import new_pixel_dit, save_denoiser, zero_modulations
from dmkd_fast.denoisers.wrappers import Encoder
from dmkd_fast.jobs import memory
from dmkd_fast.jobs.pretrain import cache, loop
from dmkd_fast.jobs.pretrain.real_data import list_real
from dmkd_fast.jobs.report import images as report_images
from dmkd_fast.runtime.device import available_bytes
from dmkd_fast.runtime.errors import invalid
from dmkd_fast.runtime.output.progress import Progress
from dmkd_fast.sampling.arguments import Guidance, Steps
from dmkd_fast.sampling.sampler import DiffusionSampler

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
# Images that the autoencoder encodes at a time; its activations are large.
ENCODED = 8
GRID_STEPS, GRID_IMAGES, GRID_TOGETHER = 16, 8, 64


@loop.less_memory
def pretrain_denoiser(
    config: PretrainDenoiserConfig, data: Path, *, resume: bool = False, show: bool = True
) -> dict[str, Any]:
    """Train a class-conditional DiT by flow matching; save `model` in the run directory.

    Args:
        config: Settings of the job.
        data: Folder of labeled images; see `list_real` in `real_data.py`.
        resume: Whether to continue from the newest checkpoint.
        show: Whether to show progress.

    Returns:
        held_out_loss, and the figures that `loop.train` returns.
    """
    if (ended := loop.finished(config, resume=resume)) is not None:
        return ended
    job = loop.prepare(config, resume=resume, show=show)
    config, device = job.config, job.device
    listed = list_real(data, device, config.data)
    _, size, width = listed.shape
    if size != width:
        fix = "set it, for example data.image_size=32"
        raise invalid("data.image_size", f"null for images of {size} x {width}", "a size", fix)
    num_classes, shape = len(listed.class_names), listed.shape
    encoder: Encoder | None = None
    if config.vae is not None:
        encoder, shape = load_encoder(Path(config.vae), device, shape)
    channels, size, _ = shape
    _check_patches(config, size)
    real = listed.decode()
    del listed  # It holds the names of all files.
    _check_memory(config, size, device)
    train, held_out = real.train, real.held_out
    if encoder is not None:
        train, held_out = (
            replace(part, images=_latents(part.images, encoder, shape))
            for part in (train, held_out)
        )
    model = new_pixel_dit(
        num_classes=num_classes,
        channels=channels,
        image_size=size,
        patch_size=config.patch_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
    ).to(device)
    zero_modulations(model.dit)
    forward = job.compiled(model)

    def loss_of(indices: Tensor, uses: Tensor) -> Tensor:
        del uses  # Images are not augmented; uses differ in noise and timestep only.
        labels = drop_labels(train.labels[indices], num_classes, config.label_dropout)
        return flow_loss(forward, train.images[indices], labels, job)

    with loop.opened(config, resume=resume) as folder:
        real.write_record(folder)
        average, facts = loop.train(job, model, loss_of, len(train), folder)
        with loop.results(folder) as target:
            torch.manual_seed(config.seed)
            facts["held_out_loss"] = _held_out_loss(average.module, held_out, job)
            save_denoiser(average.module.dit, FLOW, target)
            if encoder is not None:
                encoder.vae.save_pretrained(target / "vae")
            write_class_names(target / CLASS_NAMES, real.train.class_names)
            shown = report_images.evenly(num_classes, report_images.MOST_ROWS)
            names = [real.train.class_names[label] for label in shown]
            for scale, images in _sample_grids(target, shown, device, job.display):
                path = target / f"samples_guidance_{scale:g}.png"
                report_images.grid(images, names, path)
            title = f"{config.name}: {'pixel' if encoder is None else 'latent'} DiT"
            verb = "pretrain denoiser CONFIG --data DIR"
            loop.write_card(target, title, verb, config, facts, source=real.source)
    return job.finish(facts)


def _scaled(images: Tensor) -> Tensor:
    """Return pixels as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def _latents(images: Tensor, encoder: Encoder, shape: tuple[int, int, int]) -> Tensor:
    """Encode all images (N, c, H, W), to float16 latents (N, *shape) on their device.

    Latents are kept in a file, which is named by the images and by the weights of the encoder.
    """
    digest = hashlib.sha256(f"latents {shape} {encoder.scale} {encoder.shift}".encode())
    for values in (*encoder.state_dict().values(), *images.split(1000)):
        digest.update(values.cpu().contiguous().numpy().data)
    latents = cache.cached(
        digest.hexdigest(),
        (len(images), *shape),
        torch.float16,
        lambda: (encoder(_scaled(part)).half() for part in images.split(ENCODED)),
    )
    return latents.to(images.device)


def _check_patches(config: PretrainDenoiserConfig, image_size: int) -> None:
    """Refuse patches that do not divide the images."""
    if image_size % config.patch_size:
        unit = "pixels" if config.vae is None else "cells of latents"
        expected = f"a divisor of the images' {image_size} {unit}"
        raise invalid("patch_size", config.patch_size, expected, "change it")


def _check_memory(config: PretrainDenoiserConfig, image_size: int, device: torch.device) -> None:
    """Refuse a transformer that is too large for the memory that the images leave."""
    width, tokens = config.num_heads * config.head_dim, (image_size // config.patch_size) ** 2
    weights = config.num_layers * (4 + 8 + 6) * width**2  # attention, MLP, modulation
    batch = config.train.batch_size // config.train.accumulate * tokens
    memory.check_fits(
        {
            "weights, gradients, optimizer, average": 4 * weights * 5,
            memory.SAVED: 2 * batch * width * 8 * config.num_layers,
        },
        available_bytes(device),
    )


def drop_labels(labels: Tensor, null_class: int, probability: float) -> Tensor:
    """Replace each of the labels (B,) by the null class with this probability."""
    dropped = torch.rand(labels.shape, device=labels.device) < probability
    return torch.where(dropped, null_class, labels)


def flow_loss(
    forward: Callable[..., Tensor], images: Tensor, labels: Tensor, job: loop.PretrainJob[Any]
) -> Tensor:
    """Compute the mean squared error of the predicted velocity, noise - image.

    Args:
        forward: Denoiser to train or to measure.
        images: Images (B, c, H, W) uint8, or latents in a floating dtype.
        labels: Classes (B,) int64, null class included.
        job: Job, for the device of the images and the dtype of the forward pass.

    Returns:
        Scalar loss, float32.
    """
    clean = _scaled(images) if images.dtype == torch.uint8 else images.float()
    noise = torch.randn_like(clean)
    levels = torch.sigmoid(torch.randn(len(clean), device=job.device))  # (B,)
    mixed = torch.lerp(clean, noise, levels[:, None, None, None])
    with training_attention(job.device), job.autocast():
        velocity = forward(mixed, levels * 1000, labels)
    return nn.functional.mse_loss(velocity.float(), noise - clean)


@contextlib.contextmanager
def training_attention(device: torch.device) -> Iterator[None]:
    """Choose attention by plain matrix products on a CPU; leave the choice to PyTorch elsewhere.

    For short sequences the backward pass of flash attention is slow on a CPU (docs/notebook.md).
    The products run in the dtype of their inputs, which PyTorch would first convert to float32.
    """
    if device.type != "cpu":
        yield
        return
    settings: Any = torch.backends.cuda  # This setting of theirs also holds on a CPU.
    before = settings.fp16_bf16_reduction_math_sdp_allowed()
    settings.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        settings.allow_fp16_bf16_reduction_math_sdp(before)


@torch.inference_mode()
def _held_out_loss(
    model: nn.Module, held_out: test_sets.ImageSet, job: loop.PretrainJob[Any]
) -> float:
    """Return the mean loss over the images, each in one batch with noise of its own."""
    labels = held_out.labels.split(500)
    batches = zip(held_out.images.split(500), labels, strict=True)
    losses = [
        flow_loss(model, images, classes, job)
        for images, classes in job.display.track(
            batches, "evaluating", len(held_out), "images", size=lambda batch: len(batch[0])
        )
    ]
    counts = torch.tensor([float(len(batch)) for batch in labels], device=job.device)
    weights = counts / counts.mean()  # exactly 1 for batches of equal size
    return round((torch.stack(losses) * weights).mean().item(), 5)


def _sample_grids(
    folder: Path, classes: Sequence[int], device: torch.device, display: Progress
) -> Iterator[tuple[float, Tensor]]:
    """Generate a row of images of some classes at 3 guidance scales from saved weights."""
    loaded = load_denoiser(folder, device)
    labels = torch.tensor(classes, device=device).repeat_interleave(GRID_IMAGES)
    ids = torch.arange(len(labels), device=device)
    scales = display.track((1.0, 1.5, 2.0), "sampling", 3, "grids", size=lambda _: 1)
    for scale in scales:
        sampler = DiffusionSampler(
            loaded,
            Steps(count=GRID_STEPS),
            Guidance(scale=scale),
            device=device,
            micro_batch_images=min(len(labels), GRID_TOGETHER),
        )
        out = torch.empty((len(labels), *loaded.image_shape), dtype=torch.uint8, device=device)
        yield scale, sampler.sample(ids, labels, out=out).cpu().unflatten(0, (-1, GRID_IMAGES))
