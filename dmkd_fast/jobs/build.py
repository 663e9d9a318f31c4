"""Assemble a resolved job and its loaded parts into a `Distiller`."""

from __future__ import annotations

import torch

from dmkd_fast.config.generator import PhaseConfig
from dmkd_fast.data.stored import ImageDecoder, StoredImages
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.jobs import memory
from dmkd_fast.jobs.images import OpenSource, Origin, Priors, named_as_settings
from dmkd_fast.jobs.parts import Parts
from dmkd_fast.jobs.resolve import ResolvedJob
from dmkd_fast.ring.buffer import RingBuffer
from dmkd_fast.runtime.errors import invalid
from dmkd_fast.sampling.arguments import Guidance, Steps
from dmkd_fast.sampling.block_cache import BlockCache
from dmkd_fast.sampling.generated import GeneratedImages
from dmkd_fast.sampling.hooks import NO_HOOKS, Guide, Hooks
from dmkd_fast.sampling.labels import LabelStream
from dmkd_fast.sampling.priors import PriorImages
from dmkd_fast.sampling.sampler import DiffusionSampler
from dmkd_fast.training.distiller import Distiller
from dmkd_fast.training.images import ImageStream
from dmkd_fast.training.objective import Objective
from dmkd_fast.training.stored_teacher import StoredTeacher
from dmkd_fast.training.student import StudentTrainer
from dmkd_fast.training.targets import Targets
from dmkd_fast.views.crops import Views, ViewSpec
from dmkd_fast.views.mixing import Mixer


def build(
    job: ResolvedJob, parts: Parts, *, hooks: Hooks = NO_HOOKS, show: bool = True
) -> Distiller:
    """Assemble a `Distiller` from a resolved job, its loaded parts and a caller's hooks."""
    config, ranks = job.config, job.ranks
    if ranks.world_size > 1:
        # Each rank draws its own dropout masks, and draws the same ones after a restart.
        torch.manual_seed(ranks.seed(config.seed))
    student = StudentTrainer(
        parts.student,
        job.schedule,
        Objective(**config.loss.model_dump()),
        dtype=job.dtype,
        compile=job.compile_student,
        ranks=ranks,
    )
    # On a CPU, float32 views are rendered as fast, and recorded digits depend on them.
    dtype = job.dtype if job.device.type == "cuda" else torch.float32
    images, ring, targets = build_images(job, parts, hooks=hooks, show=show, dtype=dtype)
    return Distiller(
        images, ring, student, targets, config.run_dir, test_set=parts.test_set, show=show
    )


def build_images(
    job: ResolvedJob,
    parts: Parts,
    *,
    hooks: Hooks = NO_HOOKS,
    show: bool,
    dtype: torch.dtype = torch.float32,
) -> tuple[ImageStream, RingBuffer, Targets]:
    """Assemble what a job trains on: the stream of images, the ring, and views of this dtype."""
    config, ranks, spec = job.config, job.ranks, parts.student_spec
    ring = RingBuffer(
        memory.ring_plan(config, parts.origin.image_shape, ranks),
        order=config.ring.order,
        num_classes=parts.origin.num_classes,
        device=job.device,
        seed=ranks.seed(config.seed),
    )
    views = Views(
        ViewSpec(
            size=config.views.size, mean=spec.mean, std=spec.std, dtype=dtype, device=job.device
        ),
        **config.views.model_dump(exclude={"size"}),
        # The crops of stored logits are those of the shards' seed.
        seed=config.seed if parts.stored is None else parts.stored.plan.settings["seed"],
    )
    stored = None
    if parts.stored is not None:
        stored = StoredTeacher(parts.stored, ring.capacity, job.device, ranks=ranks)
    targets = Targets(
        parts.teachers.together,
        views,
        mixer=Mixer(**config.mix.model_dump(), seed=config.seed) if config.mix.is_on else None,
        input=spec.input,
        dtype=job.dtype,
        compile=job.compile_student,
        stored=stored,
    )
    num_slots = ranks.world_size * ring.capacity
    images = make_stream(job, parts.origin, num_slots, hooks=hooks, show=show)
    return images, ring, targets


def make_stream(
    job: ResolvedJob, images: Origin, ring_images: int, *, hooks: Hooks = NO_HOOKS, show: bool
) -> ImageStream:
    """Build the stream of images of a job.

    Args:
        job: Resolved job.
        images: Producer of the images.
        ring_images: Number of slots of the ring, summed over all ranks.
        hooks: Objects that take part in the making of images.
        show: Whether to print a message while waiting for images.

    Raises:
        UserError: There are hooks for images that no denoiser makes.
    """
    config, ranks = job.config, job.ranks
    if not isinstance(images, Denoiser) and hooks.in_use:
        got = f"{', '.join(hooks.names)} with source"
        raise invalid("hooks", got, "none for images that no denoiser makes", "remove them")
    if isinstance(images, OpenSource):
        assert config.source is not None
        decoder = ImageDecoder(
            images.image_shape,
            resize=config.source.image_size is not None,
            device=job.device,
            num_threads=config.num_threads,
        )
        return StoredImages(
            images.source,
            decoder,
            ring_images=ring_images,
            seed=config.seed,
            wait_s=config.source.wait_s,
            show=show,
            ranks=ranks,
        )
    labels = LabelStream(
        1 if isinstance(images, Priors) else images.num_classes,
        seed=config.seed,
        device=job.device,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    if isinstance(images, Priors):
        return PriorImages(labels, images.image_shape)
    first, *later = (
        (0.0 if phase is None else phase.start, make_sampler(job, images, phase, hooks.guide))
        for phase in (None, *config.sampler.phases)
    )
    return GeneratedImages(labels, first[1], later=later, selection=hooks.selection, ranks=ranks)


def make_sampler(
    job: ResolvedJob,
    denoiser: Denoiser,
    phase: PhaseConfig | None = None,
    guide: Guide | None = None,
) -> DiffusionSampler:
    """Build the sampler for the start of a run, or for a later phase."""
    config = job.config.sampler
    count, scale = config.steps, config.scale
    if phase is not None:
        count, scale = phase.num_steps, phase.guidance_scale
    cache = None
    if config.block_cache is not None:
        cache = BlockCache(**config.block_cache.model_dump())
    guidance = Guidance(
        scale=scale,
        by_class=config.guidance_of_classes,
        interval=config.guidance_interval,
        channels=config.guidance_channels,
        guide=guide,
    )
    with named_as_settings():
        return DiffusionSampler(
            denoiser,
            Steps(count=count, solver=config.solver, block_cache=cache),
            guidance,
            micro_batch_images=config.micro_batch_images,
            dtype=job.dtype,
            device=job.device,
            seed=job.config.seed,
            compile=job.compile_sampler,
        )
