"""From settings to a finished run: load the parts, check that they fit, distill, leave the results.

Stands on floor 3; the only place where settings meet the parts of `distill.py`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from dmkd_fast import (
    classifiers,
    denoisers,
    durable,
    memory,
    models,
    origin,
    results,
    run_dir,
    runtime,
)
from dmkd_fast import config as cfg
from dmkd_fast.distill import Distiller
from dmkd_fast.evaluation import open_test_set
from dmkd_fast.image_reader import SourceError
from dmkd_fast.image_sets import EncodedSet, ImageSet
from dmkd_fast.limiter import slots_for
from dmkd_fast.mix import Mixer
from dmkd_fast.ranks import ALONE, Ranks, use_device
from dmkd_fast.ring_buffer import RingBuffer
from dmkd_fast.schedule import Schedule
from dmkd_fast.views import Views


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Models and data of a run, loaded and checked against each other."""

    origin: denoisers.Denoiser | origin.OpenSource
    """Where images come from: a diffusion model, or files."""
    teachers: classifiers.LoadedTeachers
    student: nn.Module
    student_spec: models.ClassifierSpec
    test_set: ImageSet | EncodedSet


def resolve(config: cfg.DistillConfig, ranks: Ranks = ALONE) -> cfg.DistillConfig:
    """Replace every "auto" by what this machine gives; the result is saved with the run.

    Raises:
        ConfigError: The machine does not have what was asked for.
    """
    with cfg.user_errors():
        use_device(ranks, config.device)
        device = runtime.resolve_device(config.device)
        dtype = runtime.resolve_dtype(config.dtype, device)
        first, *more = (classifiers.pinned(teacher) for teacher in config.teachers.values())
        if config.ring.overlap and device.type != "cuda":
            raise ValueError(
                f"ring.overlap: got true with device {device.type}, which has one stream, expected "
                "false; set ring.overlap=false"
            )
    sampler, train = config.sampler.compile, config.train.compile
    # Measured on a CPU: compiling the sampler takes 22 s and gives 3 % more images, as the denoiser
    # runs fused kernels already; the student 38 s, and 11 % more views: for long runs, by hand.
    able = device.type == "cuda" and runtime.can_compile(device.type)
    sampler = able if sampler == "auto" else sampler
    train = able if train == "auto" else train
    return run_dir.name_new(config).model_copy(
        update={
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "num_threads": runtime.set_num_threads(
                config.num_threads, num_processes=ranks.local_world_size
            ),
            "sampler": config.sampler.model_copy(update={"compile": sampler}),
            "train": config.train.model_copy(update={"compile": train}),
            "teacher": first,
            "more_teachers": tuple(more),
        }
    )


def load_parts(config: cfg.DistillConfig) -> Parts:
    """Load everything a resolved config names; nothing is written.

    Raises:
        ConfigError: A file is missing or damaged, or parts do not fit together.
    """
    with cfg.user_errors():
        device = runtime.resolve_device(config.device)
        teachers = classifiers.load_teachers(
            config.teachers, temperature=config.loss.temperature, device=device
        )
        first = teachers.specs["teacher"]
        num_classes = teachers.num_classes["teacher"]
        images: denoisers.Denoiser | origin.OpenSource
        if config.source is None:
            images = origin.load_denoiser(config.denoiser, device)
            num_classes = images.num_classes
        test_set = open_test_set(config.eval, None, None, device, num_classes)
        if config.source is not None:
            images = origin.open_source(
                config.source, num_classes=num_classes, channels=first.in_chans,
                class_names=test_set.class_names,
            )  # fmt: skip
        check_fit(config, images, teachers, test_set)
        student, student_spec = classifiers.load_student(
            config.student, teachers, view_size=config.views.size, device=device, seed=config.seed
        )
    return Parts(
        origin=images, teachers=teachers, student=student, student_spec=student_spec,
        test_set=test_set,
    )  # fmt: skip


def prepare(config: cfg.DistillConfig, ranks: Ranks = ALONE) -> tuple[cfg.DistillConfig, Parts]:
    """Settings without any "auto" left, and what they name; nothing is written.

    Raises:
        ConfigError: Something about the settings, files or machine is wrong.
    """
    config = resolve(config, ranks)
    with memory.explained(config):
        parts = load_parts(config)
    with cfg.user_errors():
        if isinstance(parts.origin, origin.OpenSource):
            return origin.resolve_source(config, parts.origin), parts
        return origin.resolve_sampler(config, parts.origin), parts


def share(config: cfg.DistillConfig, ranks: Ranks) -> cfg.DistillConfig:
    """The part of a run that one rank has: of batch and ring, so that reuse is that of the run.

    Raises:
        ConfigError: They do not divide, or the ranks would not read the same.
    """
    block, ring, train = config.block_images, config.ring, config.train
    if ranks.world_size == 1:
        return config
    with cfg.user_errors():
        if config.source is not None and config.source.follow:
            raise ValueError(
                f"source.follow: got true with {ranks.world_size} ranks, expected false, as each "
                "would find new shards at another time; let dmkd generate finish first"
            )
        slots = slots_for(ring.capacity_images, block)
        sizes: dict[str, Any] = {
            "capacity_images": ranks.share("ring.capacity_images", slots, unit=block),
            # Only when training begins depends on it: no reason to refuse 19 blocks for two ranks.
            "min_fill_images": max(1, ring.min_fill_images // (ranks.world_size * block)) * block,
        }
        if ring.error_buffer is not None:
            sizes["error_buffer"] = ring.error_buffer / ranks.world_size
        batch = ranks.share("train.batch_size", train.batch_size)
        values = config.model_dump()
        values["ring"] |= sizes
        values["train"] |= {"batch_size": batch}
        try:
            return cfg.DistillConfig.model_validate(values)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"{reason} (of each of {ranks.world_size} ranks)") from None


def build(
    config: cfg.DistillConfig, parts: Parts, *, show: bool = True, ranks: Ranks = ALONE
) -> Distiller:
    """Assemble a resolved config and its parts."""
    device, dtype = runtime.resolve_device(config.device), getattr(torch, config.dtype)
    part = share(config, ranks).ring
    if ranks.world_size > 1:
        # Each rank has dropout of its own, and the same one after a restart.
        torch.manual_seed(ranks.seed(config.seed))
    with cfg.user_errors():
        ring = RingBuffer(
            part.capacity_images, image_shape=parts.origin.image_shape,
            block_images=config.block_images,
            **part.model_dump(exclude={"capacity_images", "overlap"}),
            guard_blocks=int(part.overlap), own_stream=part.overlap,
            num_classes=parts.origin.num_classes, device=device, seed=ranks.seed(config.seed),
        )  # fmt: skip
        sampler, labels = origin.make_origin(
            config, parts.origin, ranks.world_size * ring.capacity, show=show, ranks=ranks
        )
        later = origin.later_samplers(config, parts.origin)
    spec = parts.student_spec
    with cfg.user_errors():
        return Distiller(
            sampler=sampler,
            ring=ring,
            labels=labels,
            views=Views(
                **config.views.model_dump(),
                mean=spec.mean,
                std=spec.std,
                device=device,
                seed=config.seed,
            ),
            teacher=parts.teachers.together,
            student=parts.student,
            schedule=Schedule(
                **config.optim.model_dump(),
                **config.train.model_dump(exclude={"compile"}),
                num_evaluations=config.eval.num_points,
            ),
            run_dir=config.run_dir,
            **config.loss.model_dump(),
            mixer=Mixer(**config.mix.model_dump(), seed=config.seed) if config.mix.is_on else None,
            dtype=dtype,
            compile=config.train.compile is True,
            test_set=parts.test_set,
            student_input=spec.input,
            later_samplers=later,
            show=show,
            ranks=ranks,
        )


def run(
    config: cfg.DistillConfig, *, resume: bool = False, show: bool = True, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """The whole job; leaves student, pictures, statistics and a model card in the run directory.

    Args:
        config: Resolved or not.
        resume: Go on from the newest checkpoint of `config.run_dir`; ranks that torchrun starts
            anew do so by themselves.
        show: Whether to print progress.
        ranks: This process among those that run the job together.

    Returns:
        The summary that the command line prints as its last line; on other ranks than the first,
        nothing.

    Raises:
        ConfigError: Something about the settings or files is wrong, and nothing was written; or
            training cannot go on, after a checkpoint.
        KeyboardInterrupt: After a checkpoint has been written.
    """
    clock, show = runtime.Clock(), show and ranks.is_first
    config, resume = _place(config, resume, ranks)
    with ranks.agreed(cfg.ConfigError):
        config, parts = prepare(run_dir.find(config) if resume else config, ranks)
        part = share(config, ranks)
        memory.check(part, parts, ranks)
    with memory.explained(part, parts):
        return _run(config, parts, clock, resume=resume, show=show, ranks=ranks)


def _run(
    config: cfg.DistillConfig, parts: Parts, clock: runtime.Clock, *, resume: bool, show: bool,
    ranks: Ranks,
) -> dict[str, Any]:  # fmt: skip
    distiller = build(config, parts, show=show, ranks=ranks)
    distiller.clock = clock  # Loading counts as part of the run.
    folder = Path(config.run_dir)
    with ranks.agreed(cfg.ConfigError), cfg.user_errors():
        if not resume:  # Before anything is written.
            distiller.check_folder()
    with run_dir.locked(folder, ranks=ranks):
        if resume and run_dir.has_checkpoint(folder):
            with cfg.user_errors():
                restored = distiller.restore()
            for note in restored.notes:
                print(note, file=sys.stderr)
        with ranks.agreed(cfg.ConfigError):
            with cfg.user_errors():
                distiller.check_folder()
            if ranks.is_first and resume:
                run_dir.mark(folder, ranks.launch)
            elif ranks.is_first:
                run_dir.claim(config, launch=ranks.launch)
        if show:
            print(origin.describe(config, parts.origin), file=sys.stderr)
            print(f"teacher: weights under licence {parts.teachers.licence}", file=sys.stderr)
        _fit(distiller, folder, ranks)
        return results.write(distiller, config, parts) if ranks.is_first else {}


def _fit(distiller: Distiller, folder: Path, ranks: Ranks) -> None:
    """Train; after a stop, print how to go on."""
    try:
        distiller.fit()
    except BaseException as stop:
        is_known = isinstance(
            stop, KeyboardInterrupt | SourceError | runtime.NotFiniteError | durable.SaveError
        )
        is_known |= runtime.is_out_of_memory(stop)
        if is_known and ranks.is_first and run_dir.has_checkpoint(folder):
            print(f"to go on: {run_dir.resume_command(folder, ranks)}", file=sys.stderr)
        if isinstance(stop, SourceError | runtime.NotFiniteError):
            raise cfg.ConfigError(str(stop)) from None
        raise


def _place(
    config: cfg.DistillConfig, resume: bool, ranks: Ranks
) -> tuple[cfg.DistillConfig, bool]:  # fmt: skip
    """Which run directory it is, and whether its run goes on: what the first rank says."""
    answer = ""
    with ranks.agreed(cfg.ConfigError):
        if ranks.world_size > ranks.local_world_size and config.run_dir == "auto":
            raise cfg.ConfigError(
                "run_dir: got auto on several machines, expected a directory that all of them see"
            )
        if ranks.is_first:
            ours = run_dir.find_launched(config, ranks.launch) if ranks.restarts else None
            if ours is not None:
                config, resume = ours, True
            config = run_dir.find(config) if resume else run_dir.name_new(config)
            if not resume:
                run_dir.check_new(config)
            answer = json.dumps([config.run_dir, resume])
    place, resume = json.loads(ranks.gather(answer)[0])
    return config.model_copy(update={"run_dir": place}), resume


def check_fit(
    config: cfg.DistillConfig, images: denoisers.Denoiser | origin.OpenSource,
    teachers: classifiers.LoadedTeachers, test_set: ImageSet | EncodedSet,
) -> None:  # fmt: skip
    """Classes and channels must agree."""
    whose = "denoiser.path" if config.source is None else "source.path"
    for section, spec in teachers.specs.items():
        facts = (
            ("classes", images.num_classes, teachers.num_classes[section],
             len(test_set.class_names)),
            ("channels", images.image_shape[0], spec.in_chans, test_set.num_channels),
        )  # fmt: skip
        for what, made, judged, tested in facts:
            if made != judged or tested not in (judged, None):
                raise ValueError(
                    f"{what}: {whose} has {made}, {section}.path has {judged}, eval.path has "
                    f"{tested}, expected the same; change the one that is off"
                )
        if config.eval.classes is None:
            classifiers.check_names(
                f"{section}.path", teachers.class_names[section], test_set.class_names,
                fix="eval.classes",
            )  # fmt: skip
