"""Open the images of a run: a diffusion model, a directory of images, or a procedure."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dmkd_fast.assets import license
from dmkd_fast.assets import resolve as resolve_path
from dmkd_fast.config.data import SourceConfig
from dmkd_fast.config.generator import SamplerConfig
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.networks import DenoiserConfig
from dmkd_fast.data import sources, stored
from dmkd_fast.data.class_names import compare_class_names, read_class_names
from dmkd_fast.data.listing import CLASS_NAMES, SourceError
from dmkd_fast.data.shards import PLAN
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.dit import LeanDiT
from dmkd_fast.denoisers.loading import load_denoiser
from dmkd_fast.denoisers.prompts.bank import PromptBank, take_bank
from dmkd_fast.denoisers.prompts.by_class import ByClass, prompts_by_class, read_captions
from dmkd_fast.jobs.report.data import NO_CLASS
from dmkd_fast.runtime.errors import UserError, invalid, warn_once
from dmkd_fast.sampling.noise_levels import trained_alike
from dmkd_fast.sampling.tiling import TiledDecoder

# Settings by the arguments of `DiffusionSampler` that they become.
SETTINGS = {
    "steps.count": "sampler.num_steps",
    "steps.solver": "sampler.solver",
    "steps.block_cache": "sampler.block_cache",
    "steps": "sampler.num_steps, sampler.solver",
    "guidance.scale": "sampler.guidance_scale",
    "guidance.by_class": "sampler.class_guidance",
}


@dataclass(frozen=True, kw_only=True)
class OpenSource:
    """A checked directory of images, with the facts that a `Denoiser` states too."""

    source: sources.Source
    kind: sources.Kind
    image_shape: tuple[int, int, int]
    num_classes: int
    license: str


@dataclass(frozen=True, kw_only=True)
class Priors:
    """Procedural images, with the facts that a `Denoiser` states too."""

    image_shape: tuple[int, int, int]
    num_classes: int
    """Number of classes of the teacher; the images themselves have none."""
    license: str = "none, as the images are drawn by a procedure"


Origin = Denoiser | OpenSource | Priors
"""Producer of the images of a run."""


def open_denoiser(
    config: DenoiserConfig | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    class_names: Sequence[str] = (),
) -> Denoiser:
    """Load the diffusion model that a config names; one on the Hub is downloaded first.

    Args:
        config: Section `denoiser` of the config.
        device: Device of the modules.
        dtype: Compute dtype of the job; see `load_denoiser`.
        class_names: Class names of the job, for prompts.
    """
    assert config is not None  # DistillConfig has a denoiser or a source.
    folder = resolve_path(config.path, config.revision)
    decoder = None if config.decoder is None else resolve_path(config.decoder)
    prompts = _prompts(config, class_names)
    load = functools.partial(
        load_denoiser,
        device=device,
        prompts=None if prompts is None else [prompt for some in prompts for prompt in some],
        null_class=config.null_class,
        image_size=config.image_size,
        dtype=dtype,
    )
    loaded = load(folder, decoder=decoder)
    if config.weak is not None:
        vae = folder / "vae" if decoder is None and loaded.decoder is not None else decoder
        loaded = _autoguided(loaded, load(resolve_path(config.weak), decoder=vae))
    if config.decoder_tile is not None:
        loaded = _tiled(loaded, config.decoder_tile)
    if prompts is not None:
        loaded = loaded.with_prompts(prompts)
    elif config.class_map is not None:
        loaded = loaded.restricted(config.class_map)
    return replace(loaded, license=license(config.path) or loaded.license)


def attention_facts(images: Origin, device: torch.device, dtype: str) -> dict[str, str]:
    """Return `attention`, the kernel in use, for a summary; nothing without a denoiser.

    Args:
        images: Producer of the images.
        device: Device of the model.
        dtype: Name of the compute dtype.
    """
    if not isinstance(images, Denoiser):
        return {}
    if isinstance(images.module, LeanDiT):
        return {"attention": images.module.attention_operator(device, getattr(torch, dtype))}
    return {"attention": "sdpa"}


def _prompts(config: DenoiserConfig, class_names: Sequence[str]) -> ByClass | None:
    """Return the prompts of each class of the job; None if the config has none."""
    if config.captions is not None:
        found = read_captions(Path(config.captions), class_names)
    elif config.prompts is not None:
        found = prompts_by_class(config.prompts, class_names, config.prompt_attributes)
    elif config.prompt_attributes:
        raise invalid("denoiser.prompt_attributes", "some without prompts", "prompts", "add them")
    else:
        return None
    if config.class_map is None:
        return found
    if max(config.class_map, default=0) >= len(found) or len(set(config.class_map)) < len(
        config.class_map
    ):
        expected = f"different classes from 0 to {len(found) - 1}, those with prompts"
        raise invalid("denoiser.class_map", str(config.class_map)[:60], expected, "correct it")
    return tuple(found[label] for label in config.class_map)


def job_class_names(config: DistillConfig, teacher: Sequence[str] | None) -> tuple[str, ...]:
    """Return the class names of a job before its test set is open; none if they are not known.

    Args:
        config: Config of the job.
        teacher: Class names that are saved with the teacher.
    """
    if config.eval.classes is not None:
        return read_class_names(Path(config.eval.classes), must_exist=True)
    chosen = config.teacher.class_map
    if chosen is None or teacher is None:
        return tuple(teacher or ())
    return tuple(teacher[label] for label in chosen) if max(chosen) < len(teacher) else ()


def _autoguided(loaded: Denoiser, weak: Denoiser) -> Denoiser:
    """Return a denoiser that is guided by a weaker one, after checking that both fit."""
    for what in ("latent_shape", "num_classes", "class_map"):
        if (got := getattr(weak, what)) != (expected := getattr(loaded, what)):
            raise invalid("denoiser.weak", f"{what} {got}", f"denoiser.path's {expected}")
    if not trained_alike(loaded.scheduler, weak.scheduler):
        got = "other noise levels or predictions in scheduler_config.json"
        raise invalid("denoiser.weak", got, "denoiser.path's", "use a model trained like it")
    license = loaded.license
    if weak.license != license:
        license = f"{license}, weak denoiser {weak.license}"
    bank = None
    if loaded.bank is not None or weak.bank is not None:
        # Both have the same rows, so that neither may keep all prompts on the device.
        bank, other = (_bank(one) for one in (loaded, weak))
        bank = bank.joined(other)
    return replace(loaded, weak=weak.module, bank=bank, license=license)


def _bank(loaded: Denoiser) -> PromptBank:
    """Return the bank of a text-to-image model, made of its tables if it has none."""
    num_rows = loaded.num_classes + (loaded.null_class is not None)
    bank = loaded.bank or take_bank(loaded.module, num_rows, least_bytes=0)
    assert bank is not None
    return bank


def _tiled(loaded: Denoiser, tile: int) -> Denoiser:
    """Return a denoiser whose images, where larger than a tile, are decoded in tiles."""
    if loaded.decoder is None:
        raise invalid("denoiser.decoder_tile", tile, "none for a model of pixels", "remove it")
    shapes = {"latent_shape": loaded.latent_shape, "image_shape": loaded.image_shape}
    decoder = TiledDecoder(loaded.decoder, tile, **shapes)
    return loaded if max(loaded.image_shape[1:]) <= tile else replace(loaded, decoder=decoder)


def denoiser_class_names(config: DenoiserConfig | None) -> tuple[str, ...] | None:
    """Return the names in the denoiser's classes.txt, in the order of the job's classes.

    Returns:
        The names, or None if the file is missing or does not have the classes of `class_map`.
    """
    assert config is not None
    path = resolve_path(config.path, config.revision) / CLASS_NAMES
    names = read_class_names(path, must_exist=False)
    if config.class_map is not None:
        known = max(config.class_map, default=0) < len(names)
        names = tuple(names[label] for label in config.class_map) if known else ()
    return names or None


def open_source(
    config: SourceConfig, *, num_classes: int, channels: int, class_names: tuple[str, ...]
) -> OpenSource:
    """Open the directory that a config names.

    Args:
        config: Section `source` of the config.
        num_classes: Number of classes of the teacher.
        channels: Number of channels that single files are decoded to.
        class_names: Class names of the test set.

    Raises:
        UserError: There are no images, the set is incomplete, or its classes are not the
            teacher's.
    """
    folder = Path(config.folder)
    if config.follow:
        wait_for_plan(folder, config.wait_s)
    kind = sources.find_kind(folder) if config.kind == "auto" else config.kind
    assert kind != "priors"  # It has no folder.
    size = config.image_size
    if kind == "shards":
        shards = sources.ShardSource(folder)
        plan = shards.plan
        if not (shards.is_complete or config.follow):
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
    if config.follow:
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


def check_count(config: DistillConfig, count: int, num_ranks: int = 1) -> None:
    """Check the sizes of the ring against the number of images of `source.path`.

    A warning is logged if a set that fits into the ring does not fill its blocks.

    Raises:
        UserError: There are fewer images than the ring needs to start or than one block, or
            ring.max_uses is set for a set that fits into the ring.
    """
    for name, least in (
        ("ring.min_fill_images", config.ring.min_fill_images),
        ("source.block_images", config.block_images),
    ):
        if least > count:
            raise invalid(name, least, f"at most the {count} images of source.path", "lower it")
    most, block = config.ring.max_uses, config.block_images
    if count > -(-config.ring.capacity_images // block) * block:
        return
    if most is not None:
        got = f"{most} with a source of {count} images that fits into the ring"
        expected = "none, as its images are drawn until train.num_views"
        raise invalid("ring.max_uses", got, expected, "remove it")
    if again := -count % (block * num_ranks):
        # Much smaller blocks would be many files, and slow to decode.
        sizes = (n for n in range(block, block // 4, -1) if count % (n * num_ranks) == 0)
        size = next(sizes, None)
        of_ranks = f" on each of {num_ranks} ranks" if num_ranks > 1 else ""
        fix = "" if size is None else f"; set it to {size}, and each one comes once"
        warn_once(
            f"source.block_images: blocks of {block}{of_ranks} are not filled by the {count} "
            f"images of source.path, so {again} of them come into the ring twice and weigh "
            f"double{fix}"
        )


def row_names(images: Origin, class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the classes by which pictures of images are sorted in rows."""
    return (NO_CLASS,) if isinstance(images, Priors) else class_names


def describe_images(config: DistillConfig, images: Origin) -> str:
    """Describe the images and their license in one line for the log."""
    if isinstance(images, Priors):
        return f"{' x '.join(map(str, images.image_shape))} procedural images, made without weights"
    if isinstance(images, OpenSource):
        path = config.source.folder if config.source else ""
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
    if config.source is not None and not config.source.is_on_disk:
        return (
            "a procedure (`source.kind: priors`). The student saw no real image, and no generator "
            "was trained."
        )
    if config.source is not None:
        text = f"`{config.source.path}` ({config.source.kind})."
        return f"{text} {no_real}" if config.source.kind == "shards" else text
    assert config.denoiser is not None
    return f"`{config.denoiser.path}` ({_steps(config.sampler)}). {no_real}"


@contextmanager
def named_as_settings() -> Iterator[None]:
    """Name settings of the config in errors about the arguments of a sampler."""
    try:
        yield
    except UserError as error:
        raise error.renamed(SETTINGS.get(error.name, error.name)) from None


def _steps(config: SamplerConfig) -> str:
    """Describe steps and guidance of every phase."""
    text = f"{config.steps} steps, guidance {config.scale:g}"
    for phase in config.phases:
        text += f"; from {phase.start:.0%} of the run {phase.num_steps}, {phase.guidance_scale:g}"
    for classes, scale in config.class_guidance.items():
        text += f"; guidance {scale:g} for class {classes}"
    return text


def wait_for_plan(folder: Path, wait_s: float) -> None:
    """Wait for the plan, since generators started with the trainer write it a little later.

    Raises:
        SourceError: It is not there after `wait_s` seconds.
    """
    end = time.monotonic() + wait_s
    if not (folder / PLAN).is_file():
        print(f"waiting for {folder / PLAN}", file=sys.stderr, flush=True)
    while not (folder / PLAN).is_file():
        if time.monotonic() > end:
            raise SourceError(f"{folder / PLAN}: not there after {wait_s:g} s; start dmkd generate")
        time.sleep(stored.POLL_S)
