"""Assemble the parts of a resolved job into a `Distiller`; no config is seen after this."""

from __future__ import annotations

import torch

from dmkd_fast.config.generator import PhaseConfig
from dmkd_fast.data.stored import ImageReader
from dmkd_fast.denoisers.loading import Denoiser
from dmkd_fast.jobs.images import OpenSource
from dmkd_fast.jobs.parts import Parts
from dmkd_fast.jobs.resolve import ResolvedJob, share
from dmkd_fast.ring.buffer import RingBuffer
from dmkd_fast.sampling.labels import LabelStream
from dmkd_fast.sampling.sampler import DiffusionSampler
from dmkd_fast.training.distiller import Distiller
from dmkd_fast.views.crops import Views
from dmkd_fast.views.mixing import Mixer


def build(job: ResolvedJob, parts: Parts, *, show: bool = True) -> Distiller:
    """Assemble a `Distiller` from a resolved job and its loaded parts."""
    config, ranks = job.config, job.ranks
    if ranks.world_size > 1:
        # Each rank draws its own dropout masks, and draws the same ones after a restart.
        torch.manual_seed(ranks.seed(config.seed))
    ring = make_ring(job, parts.origin)
    sampler, labels = make_origin(job, parts.origin, ranks.world_size * ring.capacity, show=show)
    spec = parts.student_spec
    return Distiller(
        sampler=sampler,
        ring=ring,
        labels=labels,
        views=Views(
            **config.views.model_dump(),
            mean=spec.mean,
            std=spec.std,
            device=job.device,
            seed=config.seed,
        ),
        teacher=parts.teachers.together,
        student=parts.student,
        schedule=job.schedule,
        run_dir=config.run_dir,
        **config.loss.model_dump(),
        mixer=Mixer(**config.mix.model_dump(), seed=config.seed) if config.mix.is_on else None,
        dtype=job.dtype,
        compile=job.compile_student,
        test_set=parts.test_set,
        student_input=spec.input,
        later_samplers=later_samplers(job, parts.origin),
        show=show,
        ranks=ranks,
    )


def make_ring(job: ResolvedJob, images: Denoiser | OpenSource) -> RingBuffer:
    """Build the ring buffer of this rank."""
    config = share(job.config, job.ranks).ring
    return RingBuffer(
        config.capacity_images,
        image_shape=images.image_shape,
        block_images=job.config.block_images,
        **config.model_dump(exclude={"capacity_images", "overlap"}),
        guard_blocks=int(config.overlap),
        own_stream=config.overlap,
        num_classes=images.num_classes,
        device=job.device,
        seed=job.ranks.seed(job.config.seed),
    )


def make_origin(
    job: ResolvedJob, images: Denoiser | OpenSource, ring_images: int, *, show: bool
) -> tuple[DiffusionSampler | ImageReader, LabelStream | ImageReader]:
    """Build the producers of images and of labels; for images on disk, one reader is both."""
    config, ranks = job.config, job.ranks
    if isinstance(images, OpenSource):
        assert config.source is not None
        reader = ImageReader(
            images.source,
            image_shape=images.image_shape,
            resize=config.source.image_size is not None,
            ring_images=ring_images,
            device=job.device,
            num_threads=config.num_threads,
            seed=config.seed,
            wait_s=config.source.wait_s,
            show=show,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        return reader, reader
    labels = LabelStream(
        images.num_classes,
        seed=config.seed,
        device=job.device,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    return make_sampler(job, images), labels


def later_samplers(
    job: ResolvedJob, images: Denoiser | OpenSource
) -> list[tuple[float, DiffusionSampler]]:
    """Build the samplers of later phases, each with the progress at which it starts."""
    if isinstance(images, OpenSource):
        return []
    phases = job.config.sampler.phases
    return [(phase.start, make_sampler(job, images, phase)) for phase in phases]


def make_sampler(
    job: ResolvedJob, denoiser: Denoiser, phase: PhaseConfig | None = None
) -> DiffusionSampler:
    """Build the sampler for the start of a run, or for a later phase."""
    config = job.config.sampler
    part = config if phase is None else phase
    return DiffusionSampler(
        denoiser.module,
        scheduler=denoiser.scheduler,
        latent_shape=denoiser.latent_shape,
        decoder=denoiser.decoder,
        null_class=denoiser.null_class,
        takes_guidance=denoiser.takes_guidance,
        num_classes=denoiser.num_classes,
        class_map=denoiser.class_map,
        num_steps=part.num_steps,
        solver=config.solver,
        guidance_scale=part.guidance_scale,
        class_guidance=config.guidance_of_classes,
        guidance_interval=config.guidance_interval,
        guidance_channels=config.guidance_channels,
        micro_batch_images=config.micro_batch_images,
        dtype=job.dtype,
        device=job.device,
        seed=job.config.seed,
        compile=job.compile_sampler,
    )
