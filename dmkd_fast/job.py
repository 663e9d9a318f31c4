"""From settings to a finished run: load the parts, check that they fit, distill, leave the results.

Stands on floor 3; the only place where settings meet the parts of `distill.py`.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmkd_fast import classifiers, denoisers, models, pictures, run_dir, runtime
from dmkd_fast import config as cfg
from dmkd_fast.assets import licence
from dmkd_fast.assets import resolve as resolve_path
from dmkd_fast.distill import Distiller, Schedule
from dmkd_fast.dit import LeanDiT
from dmkd_fast.evaluation import STUDENT, evaluate_run, open_test_set
from dmkd_fast.image_sets import EncodedSet, ImageSet
from dmkd_fast.labels import LabelStream
from dmkd_fast.ring_buffer import RingBuffer
from dmkd_fast.sampler import DiffusionSampler
from dmkd_fast.solvers import choose_solver
from dmkd_fast.views import Views

SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Models and data of a run, loaded and checked against each other."""

    denoiser: denoisers.Denoiser
    teachers: classifiers.LoadedTeachers
    student: nn.Module
    student_spec: models.ClassifierSpec
    test_set: ImageSet | EncodedSet


def resolve(config: cfg.DistillConfig) -> cfg.DistillConfig:
    """Replace every "auto" by what this machine gives; the result is saved with the run.

    Raises:
        ConfigError: The machine does not have what was asked for.
    """
    with cfg.user_errors():
        device = runtime.resolve_device(config.device)
        dtype = runtime.resolve_dtype(config.dtype, device)
        first, *more = (classifiers.pinned(teacher) for teacher in config.teachers.values())
    able = runtime.can_compile(device.type)
    sampler, train = config.sampler.compile, config.train.compile
    # Measured on a CPU: a compiled sampler makes 1.5 times the images, but a compiled ResNet takes
    # 1.4 times as long per step as an eager one, whose convolutions oneDNN runs anyway.
    sampler = able if sampler == "auto" else sampler
    train = able and device.type == "cuda" if train == "auto" else train
    return run_dir.name_new(config).model_copy(
        update={
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "num_threads": runtime.set_num_threads(config.num_threads),
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
    device = torch.device(config.device)
    with cfg.user_errors():
        denoiser = _denoiser(config.denoiser, device)
        teachers = classifiers.load_teachers(
            config.teachers, temperature=config.loss.temperature, device=device
        )
        test_set = open_test_set(config.eval, None, None, device, denoiser.num_classes)
        _check_fit(denoiser, teachers, test_set)
        student, student_spec = classifiers.load_student(
            config.student, teachers, view_size=config.views.size, device=device, seed=config.seed
        )
    parts = Parts(
        denoiser=denoiser, teachers=teachers, student=student, student_spec=student_spec,
        test_set=test_set,
    )  # fmt: skip
    _check_memory(config, parts)
    return parts


def prepare(config: cfg.DistillConfig) -> tuple[cfg.DistillConfig, Parts]:
    """Settings without any "auto" left, and what they name; nothing is written.

    Raises:
        ConfigError: Something about the settings, files or machine is wrong.
    """
    config = resolve(config)
    parts = load_parts(config)
    denoiser, name = parts.denoiser, config.sampler.attention
    with cfg.user_errors():
        solver = choose_solver(denoiser.scheduler, config.sampler.solver)
        if isinstance(denoiser.module, LeanDiT):
            name = denoiser.module.choose_attention(
                name, device=torch.device(config.device), dtype=getattr(torch, config.dtype)
            )
        elif name not in ("auto", "sdpa"):
            raise ValueError(
                f"sampler.attention: got {name} for a {type(denoiser.module).__name__}, expected "
                "sdpa; set sampler.attention=auto"
            )
        else:
            name = "sdpa"
    sampler = config.sampler.model_copy(update={"attention": name, "solver": solver})
    return config.model_copy(update={"sampler": sampler}), parts


def build(config: cfg.DistillConfig, parts: Parts, *, show: bool = True) -> Distiller:
    """Assemble a resolved config and its parts."""
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    denoiser, sampling = parts.denoiser, config.sampler

    def make_sampler(num_steps: int, guidance_scale: float) -> DiffusionSampler:
        return DiffusionSampler(
            denoiser.module, scheduler=denoiser.scheduler, latent_shape=denoiser.latent_shape,
            decoder=denoiser.decoder, null_class=denoiser.null_class,
            takes_guidance=denoiser.takes_guidance, num_classes=denoiser.num_classes,
            class_map=denoiser.class_map, num_steps=num_steps, solver=sampling.solver,
            guidance_scale=guidance_scale, guidance_interval=sampling.guidance_interval,
            guidance_channels=sampling.guidance_channels,
            micro_batch_images=sampling.micro_batch_images, dtype=dtype, device=device,
            seed=config.seed, compile=sampling.compile is True,
        )  # fmt: skip

    with cfg.user_errors():
        sampler = make_sampler(sampling.num_steps, sampling.guidance_scale)
        later = [(p.start, make_sampler(p.num_steps, p.guidance_scale)) for p in sampling.phases]
        ring = RingBuffer(
            config.ring.capacity_images, image_shape=denoiser.image_shape,
            block_images=sampling.micro_batch_images,
            samples_per_insert=config.ring.samples_per_insert,
            min_fill_images=config.ring.min_fill_images, device=device, seed=config.seed,
        )  # fmt: skip
    spec = parts.student_spec
    return Distiller(
        sampler=sampler,
        ring=ring,
        labels=LabelStream(parts.denoiser.num_classes, seed=config.seed, device=device),
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
            batch_size=config.train.batch_size,
            num_views=config.train.num_views,
            checkpoint_every_s=config.train.checkpoint_every_s,
            log_every_steps=config.train.log_every_steps,
            num_evaluations=config.eval.num_points,
        ),
        run_dir=config.run_dir,
        temperature=config.loss.temperature,
        dtype=dtype,
        compile=config.train.compile is True,
        test_set=parts.test_set,
        student_input=spec.input,
        later_samplers=later,
        show=show,
    )


def memory_plan(config: cfg.DistillConfig, parts: Parts) -> dict[str, int]:
    """Bytes that a run keeps on its device, by part; activations come on top."""
    block = config.sampler.micro_batch_images
    slots = -(-config.ring.capacity_images // block) * block
    pixels = math.prod(parts.denoiser.image_shape)
    compute = getattr(torch, config.dtype).itemsize
    weights = sum(p.numel() for p in parts.student.parameters())
    moments = 2 if config.optim.name == "adamw" else 1
    return {
        "ring": slots * (pixels + 3 * 8),
        "denoiser": compute * sum(p.numel() for p in _parameters(parts.denoiser)),
        "teacher": 4 * sum(p.numel() for p in parts.teachers.together.parameters()),
        "student, gradients, optimizer, average": 4 * weights * (3 + moments),
        "test images": parts.test_set.num_bytes,
    }


def run(config: cfg.DistillConfig, *, resume: bool = False, show: bool = True) -> dict[str, Any]:
    """The whole job; leaves student, pictures, statistics and a model card in the run directory.

    Args:
        config: Resolved or not.
        resume: Go on from the newest checkpoint of `config.run_dir`.
        show: Whether to print progress.

    Returns:
        The summary that the command line prints as its last line.

    Raises:
        ConfigError: Something about the settings or files is wrong; nothing was written.
        KeyboardInterrupt: After a checkpoint has been written.
    """
    clock = runtime.Clock()
    config, parts = prepare(run_dir.find(config) if resume else config)
    distiller = build(config, parts, show=show)
    distiller.clock = clock  # Loading counts as part of the run.
    if resume:
        with cfg.user_errors():
            distiller.restore()
    folder = Path(config.run_dir) if resume else run_dir.claim(config)
    if show:
        notes = {config.denoiser.path: parts.denoiser.licence, "teacher": parts.teachers.licence}
        for name, licence_text in notes.items():
            print(f"{name}: weights under licence {licence_text}", file=sys.stderr)
    try:
        distiller.fit()
    except KeyboardInterrupt:
        print(f"to go on: dmkd distill {folder / run_dir.CONFIG} --resume", file=sys.stderr)
        raise

    (folder / STUDENT).mkdir(exist_ok=True)
    models.save_classifier(distiller.average.module, parts.student_spec, folder / STUDENT)
    scores = evaluate_run(folder).scores
    _draw(distiller, parts, folder, scores["teacher_top1"])
    summary = {
        **{name: scores[name] for name in ("top1", "top5", "teacher_top1", "agreement")},
        **distiller.totals(),
        "denoiser_licence": parts.denoiser.licence,
        "teacher_licence": parts.teachers.licence,
        "run_dir": str(folder),
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _write_card(folder, config, parts, summary)
    return summary


def _denoiser(settings: cfg.DenoiserConfig, device: torch.device) -> denoisers.Denoiser:
    """The diffusion model that the settings name; fetched first if it is on the Hub."""
    loaded = denoisers.load_denoiser(
        resolve_path(settings.path, settings.revision), device, prompts=settings.prompts,
        decoder=None if settings.decoder is None else resolve_path(settings.decoder),
    )  # fmt: skip
    if settings.class_map is not None:
        loaded = loaded.restricted(settings.class_map)
    return replace(loaded, licence=licence(settings.path) or loaded.licence)


def _parameters(denoiser: denoisers.Denoiser) -> list[nn.Parameter]:
    decoder = [] if denoiser.decoder is None else list(denoiser.decoder.parameters())
    return [*denoiser.module.parameters(), *decoder]


def _check_fit(
    denoiser: denoisers.Denoiser, teachers: classifiers.LoadedTeachers,
    test_set: ImageSet | EncodedSet,
) -> None:  # fmt: skip
    """Classes and channels must agree."""
    for section, spec in teachers.specs.items():
        facts = (
            ("classes", denoiser.num_classes, teachers.num_classes[section],
             len(test_set.class_names)),
            ("channels", denoiser.image_shape[0], spec.in_chans, test_set.num_channels),
        )  # fmt: skip
        for what, made, judged, tested in facts:
            if made != judged or tested not in (judged, None):
                raise ValueError(
                    f"{what}: denoiser.path has {made}, {section}.path has {judged}, eval.path has "
                    f"{tested}, expected the same; change the one that is off"
                )


def _check_memory(config: cfg.DistillConfig, parts: Parts) -> None:
    plan = memory_plan(config, parts)
    have = runtime.available_bytes(torch.device(config.device))
    # Models and test images are loaded by now; what is still to come has to fit.
    need = sum(count for name, count in plan.items() if name != "test images")
    if need > have:
        slot = plan["ring"] // config.ring.capacity_images
        fits = max(0, (have - need + plan["ring"]) // max(1, slot))
        raise cfg.ConfigError(
            f"ring.capacity_images: got {config.ring.capacity_images}, which needs "
            f"{plan['ring'] / 2**30:.1f} GiB of {have / 2**30:.1f} GiB available; lower it to at "
            f"most {fits}"
        )


def _draw(distiller: Distiller, parts: Parts, folder: Path, teacher_top1: float) -> None:
    """samples.png from the ring and curves.png from the statistics."""
    ring, names = distiller.ring, parts.test_set.class_names
    filled = ring.labels[: ring.num_filled]
    chosen = [(filled == label).nonzero()[:10, 0] for label in range(len(names))]
    if all(len(slots) == 10 for slots in chosen):
        pictures.grid(ring.images[torch.cat(chosen)], names, folder / "samples.png")
    pictures.curves(folder / "stats.jsonl", folder / "curves.png", teacher_top1=teacher_top1)


def _write_card(
    folder: Path, config: cfg.DistillConfig, parts: Parts, summary: dict[str, Any]
) -> None:
    """README.md beside the student's weights."""
    spec = parts.student_spec
    judges = ", ".join(f"`{t.path or t.arch}`" for t in config.teachers.values())
    rows = "\n".join(f"| {name} | {value} |" for name, value in summary.items())
    text = (
        f"---\nlibrary_name: dmkd_fast\ntags: [knowledge-distillation, synthetic-data]\n---\n"
        f"# {spec.architecture} distilled from generated images\n\n"
        f"Teacher {judges}, images from `{config.denoiser.path}` "
        f"({config.sampler.num_steps} steps, guidance {config.sampler.guidance_scale:g}). The "
        "student saw no real training image; the images' generator was trained on real ones. "
        "Accuracies are shares of the real test set, which decided nothing.\n\n"
        f"| figure | value |\n|---|---|\n{rows}\n\n"
        "```python\nfrom pathlib import Path\nimport torch\n"
        "from dmkd_fast import load_classifier\n\n"
        'model, spec = load_classifier(Path("."), torch.device("cpu"))\n```\n'
        f"Inputs: {spec.in_chans} x {spec.input_size} x {spec.input_size}, pixels in [0, 1] "
        f"normalised with mean {list(spec.mean)} and std {list(spec.std)}.\n"
    )
    (folder / STUDENT / "README.md").write_text(text, encoding="utf-8")
