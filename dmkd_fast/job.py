"""From settings to a finished run: load the parts, check that they fit, distill, leave the results.

Stands on floor 3; the only place where settings meet the parts of `distill.py`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmkd_fast import config as cfg
from dmkd_fast import denoisers, evaluate, memory, models, pictures, run_dir, runtime
from dmkd_fast.assets import licence
from dmkd_fast.assets import resolve as resolve_path
from dmkd_fast.distill import Distiller, Schedule
from dmkd_fast.dit import LeanDiT
from dmkd_fast.labels import LabelStream
from dmkd_fast.ring_buffer import RingBuffer
from dmkd_fast.sampler import DiffusionSampler
from dmkd_fast.solvers import choose_solver
from dmkd_fast.views import Views

STUDENT, SUMMARY = "student", "summary.json"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Models and data of a run, loaded and checked against each other."""

    denoiser: denoisers.Denoiser
    teacher: nn.Module
    student: nn.Module
    student_spec: models.ClassifierSpec
    test_set: evaluate.ImageSet


def resolve(config: cfg.DistillConfig) -> cfg.DistillConfig:
    """Replace every "auto" by what this machine gives; the result is saved with the run.

    Raises:
        ConfigError: The machine does not have what was asked for.
    """
    with cfg.user_errors():
        device = runtime.resolve_device(config.device)
        dtype = runtime.resolve_dtype(config.dtype, device)
        if config.ring.overlap and device.type != "cuda":
            raise ValueError(
                f"ring.overlap: got true with device {device.type}, which has one stream, expected "
                "false; set ring.overlap=false"
            )
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
        test_set = evaluate.load_idx(resolve_path(config.eval.path), "t10k").to(device)
        if config.teacher.path is None:
            raise ValueError("teacher: got arch, expected path; a teacher needs trained weights")
        teacher, teacher_spec = models.load_classifier(resolve_path(config.teacher.path), device)
        _check_fit(config, denoiser, teacher_spec, test_set)
        student, student_spec = _student(config.student, teacher_spec, device, config.seed)
        for name, model in (("teacher", teacher), ("student", student)):
            _check_takes(name, model, teacher_spec, device)
    return Parts(
        denoiser=denoiser, teacher=teacher, student=student, student_spec=student_spec,
        test_set=test_set,
    )  # fmt: skip


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
    with cfg.user_errors():
        sampler = DiffusionSampler(
            denoiser.module, scheduler=denoiser.scheduler, latent_shape=denoiser.latent_shape,
            decoder=denoiser.decoder, null_class=denoiser.null_class,
            takes_guidance=denoiser.takes_guidance, num_classes=denoiser.num_classes,
            num_steps=sampling.num_steps, solver=sampling.solver,
            guidance_scale=sampling.guidance_scale, guidance_interval=sampling.guidance_interval,
            guidance_channels=sampling.guidance_channels,
            micro_batch_images=sampling.micro_batch_images, dtype=dtype, device=device,
            seed=config.seed, compile=sampling.compile is True,
        )  # fmt: skip
        ring = RingBuffer(
            config.ring.capacity_images, image_shape=denoiser.image_shape,
            block_images=sampling.micro_batch_images,
            **config.ring.model_dump(exclude={"capacity_images", "overlap"}),
            guard_blocks=int(config.ring.overlap), own_stream=config.ring.overlap,
            num_classes=denoiser.num_classes, device=device, seed=config.seed,
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
        teacher=parts.teacher,
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
        show=show,
    )


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
    memory.check(config, parts)
    distiller = build(config, parts, show=show)
    distiller.clock = clock  # Loading counts as part of the run.
    if resume:
        with cfg.user_errors():
            distiller.restore()
    folder = Path(config.run_dir) if resume else run_dir.claim(config)
    if show:
        note = f"{config.denoiser.path}: weights under licence {parts.denoiser.licence}"
        print(note, file=sys.stderr)
    try:
        distiller.fit()
    except KeyboardInterrupt:
        print(f"to go on: dmkd distill {folder / run_dir.CONFIG} --resume", file=sys.stderr)
        raise

    (folder / STUDENT).mkdir(exist_ok=True)
    models.save_classifier(distiller.average.module, parts.student_spec, folder / STUDENT)
    scores = evaluate_run(folder)
    _draw(distiller, parts, folder, scores["teacher_top1"])
    summary = {
        **{name: scores[name] for name in ("top1", "top5", "teacher_top1", "agreement")},
        **distiller.totals(),
        "denoiser_licence": parts.denoiser.licence,
        "run_dir": str(folder),
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _write_card(folder, config, parts, summary)
    return summary


def evaluate_run(folder: Path) -> dict[str, float]:
    """Accuracy of a run's saved student on its real test set, in float32.

    Returns:
        top1, top5, ece, teacher_top1 and agreement, shares in [0, 1].

    Raises:
        ConfigError: The folder is not a finished run, or its files are damaged.
    """
    config = cfg.load(cfg.DistillConfig, folder / run_dir.CONFIG)
    runtime.set_num_threads(config.num_threads)
    with cfg.user_errors():
        device = runtime.resolve_device(config.device)
        test_set = evaluate.load_idx(resolve_path(config.eval.path), "t10k").to(device)
        student, spec = models.load_classifier(folder / STUDENT, device)
        teacher, _ = models.load_classifier(resolve_path(config.teacher.path or ""), device)
    views = Views(size=config.views.size, mean=spec.mean, std=spec.std, device=device)
    student_logits, teacher_logits = (
        evaluate.predict(model, test_set.images, views.whole) for model in (student, teacher)
    )
    return evaluate.score(student_logits, test_set.labels, teacher_logits)


def _denoiser(settings: cfg.DenoiserConfig, device: torch.device) -> denoisers.Denoiser:
    """The diffusion model that the settings name; fetched first if it is on the Hub."""
    loaded = denoisers.load_denoiser(
        resolve_path(settings.path, settings.revision), device, prompts=settings.prompts,
        decoder=None if settings.decoder is None else resolve_path(settings.decoder),
    )  # fmt: skip
    return replace(loaded, licence=licence(settings.path) or loaded.licence)


def _student(
    settings: cfg.ClassifierConfig, teacher: models.ClassifierSpec, device: torch.device, seed: int
) -> tuple[nn.Module, models.ClassifierSpec]:
    """A new student fed like the teacher, or a saved one to go on with."""
    if settings.path is not None:
        student, spec = models.load_classifier(resolve_path(settings.path), device)
        # Both see the same views, so they must agree on what a view is.
        if (spec.mean, spec.std) != (teacher.mean, teacher.std):
            raise ValueError(
                f"student.path: got mean {spec.mean} and std {spec.std}, expected the teacher's "
                f"{teacher.mean} and {teacher.std}; use a student with the same normalisation"
            )
        return student, spec
    spec = models.ClassifierSpec(
        architecture=settings.arch or "",
        num_classes=teacher.num_classes,
        in_chans=teacher.in_chans,
        input_size=teacher.input_size,
        mean=teacher.mean,
        std=teacher.std,
        model_args=settings.model_args,
        stem=settings.stem,
    )
    torch.manual_seed(seed)
    student = models.build_classifier(spec)
    return student.to(device).to(memory_format=torch.channels_last), spec


def _check_fit(
    config: cfg.DistillConfig, denoiser: denoisers.Denoiser, teacher: models.ClassifierSpec,
    test_set: evaluate.ImageSet,
) -> None:  # fmt: skip
    """Classes, channels and sizes must agree."""
    facts = (
        ("classes", denoiser.num_classes, teacher.num_classes, len(test_set.class_names)),
        ("channels", denoiser.image_shape[0], teacher.in_chans, test_set.images.shape[1]),
    )
    for what, made, judged, tested in facts:
        if not made == judged == tested:
            raise ValueError(
                f"{what}: denoiser.path has {made}, teacher.path has {judged}, eval.path has "
                f"{tested}, expected the same; change the one that is off"
            )
    if config.views.size != teacher.input_size:
        raise ValueError(
            f"views.size: got {config.views.size}, expected the teacher's input size "
            f"{teacher.input_size}; set views.size={teacher.input_size}"
        )


def _check_takes(
    name: str, model: nn.Module, spec: models.ClassifierSpec, device: torch.device
) -> None:
    """One forward pass on zeros, so that a network that cannot take the views fails here."""
    size = spec.input_size
    was_training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, spec.in_chans, size, size, device=device))
    except Exception as error:  # Networks raise what they like when a shape does not fit.
        raise ValueError(
            f"{name}: cannot take {spec.in_chans} x {size} x {size} views ({error}); use another "
            "architecture or stem"
        ) from None
    finally:
        model.train(was_training)
    if logits.shape != (2, spec.num_classes):
        raise ValueError(
            f"{name}: got logits of shape {tuple(logits.shape)} for 2 views, expected "
            f"(2, {spec.num_classes}); use a classifier"
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
    rows = "\n".join(f"| {name} | {value} |" for name, value in summary.items())
    text = (
        f"---\nlibrary_name: dmkd_fast\ntags: [knowledge-distillation, synthetic-data]\n---\n"
        f"# {spec.architecture} distilled from generated images\n\n"
        f"Teacher `{config.teacher.path}`, images from `{config.denoiser.path}` "
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
