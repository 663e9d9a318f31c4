"""Assemble a resolved config and its loaded parts into a `Distiller`."""

from __future__ import annotations

import torch

from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.jobs import memory
from dmkd_fast.jobs.images import make_stream
from dmkd_fast.jobs.parts import Parts
from dmkd_fast.ring.buffer import RingBuffer
from dmkd_fast.runtime.device import resolve_device
from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.training.distiller import Distiller
from dmkd_fast.training.schedule import Schedule
from dmkd_fast.training.student import StudentTrainer
from dmkd_fast.training.targets import Targets
from dmkd_fast.views.crops import Views, ViewSpec
from dmkd_fast.views.mixing import Mixer


def build(
    config: DistillConfig, parts: Parts, *, show: bool = True, ranks: Ranks = ALONE
) -> Distiller:
    """Assemble a `Distiller` from a resolved config and its loaded parts."""
    device, dtype = resolve_device(config.device), getattr(torch, config.dtype)
    if ranks.world_size > 1:
        # Each rank draws its own dropout masks, and draws the same ones after a restart.
        torch.manual_seed(ranks.seed(config.seed))
    ring = RingBuffer(
        memory.ring_plan(config, parts.origin.image_shape, ranks),
        order=config.ring.order,
        num_classes=parts.origin.num_classes,
        device=device,
        seed=ranks.seed(config.seed),
    )
    images = make_stream(
        config, parts.origin, ranks.world_size * ring.capacity, show=show, ranks=ranks
    )
    spec, compiles = parts.student_spec, config.train.compile is True
    student = StudentTrainer(
        parts.student,
        Schedule(
            **config.optim.model_dump(),
            **config.train.model_dump(exclude={"compile"}),
            num_evaluations=config.eval.num_points,
        ),
        **config.loss.model_dump(),
        dtype=dtype,
        compile=compiles,
        ranks=ranks,
    )
    views = Views(
        ViewSpec(size=config.views.size, mean=spec.mean, std=spec.std, device=device),
        **config.views.model_dump(exclude={"size"}),
        seed=config.seed,
    )
    targets = Targets(
        parts.teachers.together,
        views,
        mixer=Mixer(**config.mix.model_dump(), seed=config.seed) if config.mix.is_on else None,
        input=spec.input,
        dtype=dtype,
        compile=compiles,
    )
    return Distiller(
        images, ring, student, targets, config.run_dir, test_set=parts.test_set, show=show
    )
