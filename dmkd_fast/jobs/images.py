"""Open the images of a run: a diffusion model, or a directory of images."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dmkd_fast.assets import license
from dmkd_fast.assets import resolve as resolve_path
from dmkd_fast.config.data import SourceConfig
from dmkd_fast.config.generator import PhaseConfig, SamplerConfig
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.networks import DenoiserConfig
from dmkd_fast.data import sources, stored
from dmkd_fast.data.class_names import compare_class_names
from dmkd_fast.data.listing import SourceError
from dmkd_fast.data.shards import PLAN
from dmkd_fast.data.stored import ImageDecoder, StoredImages
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.dit import LeanDiT
from dmkd_fast.denoisers.loading import load_denoiser as load_denoiser_
from dmkd_fast.runtime.device import resolve_device
from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.sampling.arguments import Guidance, Steps
from dmkd_fast.sampling.generated import GeneratedImages
from dmkd_fast.sampling.labels import LabelStream
from dmkd_fast.sampling.noise_levels import choose_solver
from dmkd_fast.sampling.sampler import DiffusionSampler

# Settings of section `sampler`, by the arguments of `DiffusionSampler` that they become.
SETTINGS = {
    "steps.count": "num_steps",
    "steps.solver": "solver",
    "guidance.scale": "guidance_scale",
    "guidance.by_class": "class_guidance",
}


@dataclass(frozen=True, kw_only=True)
class OpenSource:
    """A checked directory of images, with the facts that a `Denoiser` states too."""

    source: sources.Source
    kind: sources.Kind
    image_shape: tuple[int, int, int]
    num_classes: int
    license: str


def open_denoiser(settings: DenoiserConfig | None, device: torch.device) -> Denoiser:
    """Load the diffusion model that the settings name; one on the Hub is downloaded first."""
    assert settings is not None  # DistillConfig has a denoiser or a source.
    loaded = load_denoiser_(
        resolve_path(settings.path, settings.revision),
        device,
        prompts=settings.prompts,
        decoder=None if settings.decoder is None else resolve_path(settings.decoder),
        null_class=settings.null_class,
    )
    if settings.class_map is not None:
        loaded = loaded.restricted(settings.class_map)
    return replace(loaded, license=license(settings.path) or loaded.license)


def resolve_sampler(config: DistillConfig, denoiser: Denoiser) -> DistillConfig:
    """Replace every "auto" of the sampler that depends on the denoiser.

    Raises:
        UserError: The solver or the kind of attention does not work with the denoiser.
    """
    with _named_as_settings():
        solver = choose_solver(denoiser.scheduler, config.sampler.solver)
    name = config.sampler.attention
    if isinstance(denoiser.module, LeanDiT):
        name = denoiser.module.choose_attention(
            name, device=resolve_device(config.device), dtype=getattr(torch, config.dtype)
        )
    elif name not in ("auto", "sdpa"):
        raise UserError(
            f"sampler.attention: got {name} for a {type(denoiser.module).__name__}, expected "
            "sdpa; set sampler.attention=auto"
        )
    else:
        name = "sdpa"
    sampler = config.sampler.model_copy(update={"attention": name, "solver": solver})
    return config.model_copy(update={"sampler": sampler})


def make_sampler(
    config: DistillConfig, denoiser: Denoiser, phase: PhaseConfig | None = None
) -> DiffusionSampler:
    """Build the sampler of a resolved config, for the start of the run or for a later phase."""
    sampling = config.sampler
    which = sampling if phase is None else phase
    guidance = Guidance(
        scale=which.guidance_scale,
        by_class=sampling.guidance_of_classes,
        interval=sampling.guidance_interval,
        channels=sampling.guidance_channels,
    )
    with _named_as_settings():
        return DiffusionSampler(
            denoiser,
            Steps(count=which.num_steps, solver=sampling.solver),
            guidance,
            micro_batch_images=sampling.micro_batch_images,
            dtype=getattr(torch, config.dtype),
            device=resolve_device(config.device),
            seed=config.seed,
            compile=sampling.compile is True,
        )


def open_source(
    settings: SourceConfig, *, num_classes: int, channels: int, class_names: tuple[str, ...]
) -> OpenSource:
    """Open the directory that the settings name.

    Args:
        settings: Section `source` of the config.
        num_classes: Number of classes of the teacher.
        channels: Number of channels that single files are decoded to.
        class_names: Class names of the test set.

    Raises:
        UserError: There are no images, the set is incomplete, or its classes are not the
            teacher's.
    """
    stored.check_dali()
    folder = Path(settings.path)
    if settings.follow:
        _wait_for_plan(folder, settings.wait_s)
    kind = sources.find_kind(folder) if settings.kind == "auto" else settings.kind
    size = settings.image_size
    if kind == "shards":
        shards = sources.ShardSource(folder)
        plan = shards.plan
        if not (shards.is_complete or settings.follow):
            raise UserError(
                f"source.path: {shards.num_ready:,} of {plan.num_images:,} images are in "
                f"{folder}; finish it with the same dmkd generate, or set source.follow=true"
            )
        if plan.num_classes == num_classes:
            compare_class_names(str(folder), plan.class_names, class_names, setting="eval.classes")
        shape = plan.image_shape if size is None else (plan.image_shape[0], size, size)
        return OpenSource(
            source=shards,
            kind=kind,
            image_shape=shape,
            num_classes=plan.num_classes,
            license=plan.license,
        )
    if settings.follow:
        raise UserError(f"source.follow: got true for {folder}, which is no set of shards")
    files = sources.open_files(folder, kind, num_classes=num_classes, class_names=class_names)
    height, width = stored.image_size(files) if size is None else (size, size)
    return OpenSource(
        source=files,
        kind=kind,
        image_shape=(channels, height, width),
        num_classes=num_classes,
        license="unknown",
    )


def resolve_source(config: DistillConfig, opened: OpenSource) -> DistillConfig:
    """Replace `source.kind: auto`, and check the ring's settings against the number of images.

    Raises:
        UserError: There are fewer images than the ring needs to start or than one block, or
            ring.max_uses is set for a set that fits into the ring.
    """
    assert config.source is not None
    count = opened.source.num_images
    for name, least in (
        ("ring.min_fill_images", config.ring.min_fill_images),
        ("source.block_images", config.source.block_images),
    ):
        if least > count:
            raise UserError(
                f"{name}: got {least}, expected at most the {count} images of source.path; lower it"
            )
    most, block = config.ring.max_uses, config.source.block_images
    if most is not None and count <= -(-config.ring.capacity_images // block) * block:
        raise UserError(
            f"ring.max_uses: got {most} with a source of {count} images that fits into the ring, "
            "expected none, as its images are drawn until train.num_views; remove it"
        )
    return config.model_copy(
        update={"source": config.source.model_copy(update={"kind": opened.kind})}
    )


def make_stream(
    config: DistillConfig,
    images: Denoiser | OpenSource,
    ring_images: int,
    *,
    show: bool,
    ranks: Ranks = ALONE,
) -> GeneratedImages | StoredImages:
    """Build the stream of images of a resolved config.

    Args:
        config: Settings of the job.
        images: Diffusion model or directory of images.
        ring_images: Number of slots of the ring, summed over all ranks.
        show: Whether to print a message while waiting for images.
        ranks: Ranks among which the images are divided.
    """
    device = resolve_device(config.device)
    if isinstance(images, OpenSource):
        assert config.source is not None
        decoder = ImageDecoder(
            images.image_shape,
            resize=config.source.image_size is not None,
            device=device,
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
        images.num_classes,
        seed=config.seed,
        device=device,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    return GeneratedImages(labels, make_samplers(config, images), ranks=ranks)


def make_samplers(config: DistillConfig, images: Denoiser) -> list[tuple[float, DiffusionSampler]]:
    """Build the samplers of all phases, each with the progress at which it starts."""
    later = [(phase.start, make_sampler(config, images, phase)) for phase in config.sampler.phases]
    return [(0.0, make_sampler(config, images)), *later]


def describe_images(config: DistillConfig, images: Denoiser | OpenSource) -> str:
    """Describe the images and their license in one line for the log."""
    if isinstance(images, OpenSource):
        path = config.source.path if config.source else ""
        text = f"{path}: {images.source.num_images:,} images ({images.kind})"
        made = f", made with weights under license {images.license}"
        return text + made if images.kind == "shards" else text
    path = config.denoiser.path if config.denoiser else ""
    return f"{path}: weights under license {images.license}"


def card_sentence(config: DistillConfig) -> str:
    """Describe the images for the model card, and whether the student saw real ones."""
    no_real = (
        "The student saw no real training image; the images' generator was trained on real ones."
    )
    if config.source is not None:
        text = f"`{config.source.path}` ({config.source.kind})."
        return f"{text} {no_real}" if config.source.kind == "shards" else text
    assert config.denoiser is not None
    return f"`{config.denoiser.path}` ({_steps(config.sampler)}). {no_real}"


@contextmanager
def _named_as_settings() -> Iterator[None]:
    """Name settings of the config in errors about the arguments of a sampler."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for argument, setting in SETTINGS.items():
            text = text.replace(argument, f"sampler.{setting}")
        raise UserError(text) from None


def _steps(sampling: SamplerConfig) -> str:
    """Describe steps and guidance of every phase."""
    text = f"{sampling.num_steps} steps, guidance {sampling.guidance_scale:g}"
    for phase in sampling.phases:
        text += f"; from {phase.start:.0%} of the run {phase.num_steps}, {phase.guidance_scale:g}"
    for classes, scale in sampling.class_guidance.items():
        text += f"; guidance {scale:g} for class {classes}"
    return text


def _wait_for_plan(folder: Path, wait_s: float) -> None:
    """Wait for the plan, since generators started with the trainer write it a little later."""
    end = time.monotonic() + wait_s
    if not (folder / PLAN).is_file():
        print(f"waiting for {folder / PLAN}", file=sys.stderr, flush=True)
    while not (folder / PLAN).is_file():
        if time.monotonic() > end:
            raise SourceError(f"{folder / PLAN}: not there after {wait_s:g} s; start dmkd generate")
        time.sleep(stored.POLL_S)
