"""Predict how long the jobs of `dmkd init own-data` take here, from a few steps of each network.

Weights and images are random. Shapes: batch B, c channels, H x W pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast.classifiers.loading import build_classifier, to_channels_last
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.config.jobs import (
    DistillConfig,
    PretrainConfig,
    PretrainDenoiserConfig,
    PretrainFewstepConfig,
    TeacherConfig,
)
from dmkd_fast.config.networks import ClassifierConfig
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.dit import lean_dit
from dmkd_fast.denoisers.trainable import new_pixel_dit
from dmkd_fast.jobs.pretrain.denoiser import FLOW, GRID_IMAGES, GRID_STEPS, flow_loss
from dmkd_fast.jobs.pretrain.loop import PretrainJob
from dmkd_fast.jobs.report.images import MOST_ROWS
from dmkd_fast.runtime.device import resolve_device, resolve_dtype
from dmkd_fast.runtime.output.progress import Progress
from dmkd_fast.sampling.arguments import Steps
from dmkd_fast.sampling.sampler import DiffusionSampler
from dmkd_fast.training.schedule import Schedule
from dmkd_fast.training.student import StudentTrainer

# Seconds to import PyTorch and diffusers, and to load networks and images.
START_S = 6.0


def predict(
    teacher: TeacherConfig,
    denoiser: PretrainDenoiserConfig,
    fewstep: PretrainFewstepConfig,
    distill: DistillConfig,
    *,
    shape: tuple[int, int, int],
    num_classes: int,
) -> dict[str, float]:
    """Return the predicted seconds of each of the four jobs on this machine.

    Args:
        teacher, denoiser, fewstep, distill: Configs of the jobs.
        shape: Shape of the images, (c, H, W).
        num_classes: Number of classes.
    """
    device = resolve_device(teacher.device)
    job = PretrainJob(
        config=denoiser,
        device=device,
        dtype=resolve_dtype(teacher.dtype, device),
        compiles=False,
        resume=False,
        display=Progress(show=False),
    )
    dit = new_pixel_dit(
        num_classes=num_classes,
        channels=shape[0],
        image_size=shape[1],
        patch_size=denoiser.patch_size,
        num_layers=denoiser.num_layers,
        num_heads=denoiser.num_heads,
        head_dim=denoiser.head_dim,
    ).to(device)

    def images(count: int) -> tuple[Tensor, Tensor]:
        pixels = torch.randint(256, (count, *shape), dtype=torch.uint8, device=device)
        return pixels, torch.arange(count, device=device) % num_classes

    def dit_step(config: PretrainConfig) -> float:
        pixels, labels = images(config.train.batch_size)
        return _train_s(dit, config, lambda: flow_loss(dit, pixels, labels, job), job)

    forward = _image_s(dit, shape, num_classes, fewstep.sampler.micro_batch_images, job)

    networks = {}
    for config, model in ((teacher, teacher.model), (distill, distill.student)):
        network = _classifier(model, shape, num_classes).to(device)
        pixels, labels = images(config.train.batch_size)

        def loss_of(
            network: nn.Module = network, views: Tensor = pixels / 255, labels: Tensor = labels
        ) -> Tensor:
            with job.autocast():
                logits = network(views)
            return nn.functional.cross_entropy(logits.float(), labels)

        step = _train_s(network, config, loss_of, job)
        with torch.inference_mode():
            networks[config.name] = step, _seconds(loss_of, device)

    def steps(config: PretrainConfig | DistillConfig) -> int:
        return config.train.num_views // config.train.batch_size

    grids = GRID_STEPS * (1 + 2 + 2) * GRID_IMAGES * min(num_classes, MOST_ROWS)
    per_pool = fewstep.pool_images * fewstep.num_steps * fewstep.reuse
    pools = math.ceil(fewstep.train.num_views / per_pool)
    made = pools * fewstep.pool_images * fewstep.sampler.steps * 2  # with guidance
    ring = distill.ring
    generated = distill.train.num_views / ring.samples_per_insert + ring.min_fill_images
    taught = networks[distill.name][0] + networks[teacher.name][1]
    return {
        "teacher": START_S + steps(teacher) * networks[teacher.name][0],
        "denoiser": START_S + steps(denoiser) * dit_step(denoiser) + grids * forward,
        "fewstep": START_S + steps(fewstep) * dit_step(fewstep) + made * forward,
        "distill": START_S + steps(distill) * taught + generated * distill.sampler.steps * forward,
    }


def _classifier(
    config: ClassifierConfig, shape: tuple[int, int, int], num_classes: int
) -> nn.Module:
    assert config.arch is not None
    spec = ClassifierSpec(
        architecture=config.arch,
        num_classes=num_classes,
        in_chans=shape[0],
        input_size=shape[1],
        mean=(0.5,) * shape[0],
        std=(0.5,) * shape[0],
        model_args=config.model_args,
        stem=config.stem,
    )
    return to_channels_last(build_classifier(spec))


def _train_s(
    model: nn.Module, config: Any, loss_of: Callable[[], Tensor], job: PretrainJob[Any]
) -> float:
    """Return the seconds of one optimizer step."""
    lengths = config.train.model_dump(exclude={"compile"})
    student = StudentTrainer(
        model, Schedule(**lengths, **config.optim.model_dump()), dtype=job.dtype
    )

    def step() -> None:
        student.start(1e-4)
        student.backward(loss_of())
        student.finish()

    return _seconds(step, job.device)


def _image_s(
    dit: Any, shape: tuple[int, int, int], num_classes: int, count: int, job: PretrainJob[Any]
) -> float:
    """Return the seconds of one evaluation of the DiT on one image, as the sampler makes it."""
    module = lean_dit(dit.dit)
    assert module is not None
    denoiser = Denoiser(
        module=module,
        scheduler=FLOW,
        latent_shape=shape,
        num_classes=num_classes,
        null_class=num_classes,
    )
    sampler = DiffusionSampler(
        denoiser, Steps(count=2), micro_batch_images=count, dtype=job.dtype, device=job.device
    )
    ids = torch.arange(count, device=job.device)
    out = torch.empty((count, *shape), dtype=torch.uint8, device=job.device)
    run = lambda: sampler.sample(ids, ids % num_classes, out=out)  # noqa: E731
    return _seconds(run, job.device) / (2 * count)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the shortest time of three calls after one that is not counted."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
