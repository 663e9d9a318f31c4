"""From settings to the teachers and the student of a job, checked.

Stands on floor 3, below `job.py` and `evaluation.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dmkd_fast import assets, memory, models, runtime
from dmkd_fast import config as cfg
from dmkd_fast.inputs import InputSpec
from dmkd_fast.models import ClassifierSpec
from dmkd_fast.teachers import Teacher, Teachers


@dataclass(frozen=True, kw_only=True)
class LoadedTeachers:
    """The teachers of a job and what must be known about them."""

    together: Teachers
    specs: dict[str, ClassifierSpec]
    """By the name of their section."""
    num_classes: dict[str, int]
    """Classes each has an output for, after its class_map."""
    licence: str
    """Of the weights, as their cards or configs state it."""


def load_trained(name: str, device: torch.device) -> tuple[nn.Module, ClassifierSpec, str]:
    """Any trained classifier by its name.

    Args:
        name: A folder, `embedded:NAME`, `hf-hub:OWNER/NAME@COMMIT`, `torchvision:NAME` or a timm
            name; the last two mean their published weights.
        device: Where to put it.

    Returns:
        The model in eval mode, its spec, and the licence or identity of its weights.

    Raises:
        ValueError: There is no such classifier, or its weights cannot be had.
    """
    if name.startswith(models.TORCHVISION):
        return models.load_torchvision(name, device)
    if name.startswith(assets.HUB):
        path, _, revision = name.partition("@")
        if len(revision) != 40 or set(revision) - set("0123456789abcdef"):
            raise ValueError(
                f"{path}: got revision {revision!r}, expected {path}@COMMIT with 40 hexadecimal "
                "digits, so that the weights never change"
            )
        return _load_saved(path, revision, device)
    if "/" in name or name.startswith(assets.PREFIX) or Path(name).exists():
        return _load_saved(name, None, device)
    repository = models.hub_repository(name)
    _, commit = assets.newest(repository)
    return _load_saved(assets.HUB + repository, commit, device)


def pinned(settings: cfg.TeachingConfig) -> cfg.TeachingConfig:
    """timm's published weights become a Hub path with today's commit; others stay as they are."""
    if not settings.pretrained or (settings.arch or "").startswith(models.TORCHVISION):
        return settings
    repository = models.hub_repository(settings.arch or "")
    _, commit = assets.newest(repository)
    change = {"pretrained": False, "arch": None, "path": assets.HUB + repository}
    return settings.model_copy(update={**change, "revision": commit})


def load_teachers(
    sections: dict[str, cfg.TeachingConfig], *, temperature: float, device: torch.device
) -> LoadedTeachers:
    """All teachers of a job; those with `pretrained` must be pinned or torchvision's.

    Raises:
        ValueError: Weights are missing or do not fit, or classes and times leave a gap.
    """
    members, specs, counts, licences = [], {}, {}, []
    for section, settings in sections.items():
        if settings.path is not None:
            loaded = _load_saved(settings.path, settings.revision, device)
        else:
            loaded = load_trained(settings.arch or "", device)
        module, spec, licence = loaded
        highest = max(settings.class_map or (0,))
        if highest >= spec.num_classes:
            raise ValueError(
                f"{section}.class_map: got {highest}, expected 0 to {spec.num_classes - 1}, the "
                "teacher's classes; correct the map"
            )
        _check_takes(section, module, spec.input, spec.num_classes, device)
        members.append(
            Teacher(
                module=module,
                input=spec.input,
                class_map=settings.class_map,
                teaches=settings.teaches,
                start=settings.start,
                stop=settings.stop,
            )
        )
        specs[section] = spec
        counts[section] = len(settings.class_map or ()) or spec.num_classes
        licences.append(licence)
    if len(set(counts.values())) > 1:
        given = ", ".join(f"{section} has {count}" for section, count in counts.items())
        raise ValueError(
            f"classes: {given}, expected the same; set class_map where a teacher has more"
        )
    together = Teachers(members, num_classes=counts["teacher"], temperature=temperature)
    return LoadedTeachers(
        together=together.to(device), specs=specs, num_classes=counts,
        licence="; ".join(dict.fromkeys(licences)),
    )  # fmt: skip


def load_student(
    settings: cfg.ClassifierConfig, teachers: LoadedTeachers, *, view_size: int,
    device: torch.device, seed: int,
) -> tuple[nn.Module, ClassifierSpec]:  # fmt: skip
    """A new student, normalised like the first teacher, or a saved one to go on with.

    Raises:
        ValueError: It cannot be built or loaded, or does not take the views.
    """
    first, num_classes = teachers.specs["teacher"], teachers.num_classes["teacher"]
    if settings.path is not None:
        folder = assets.resolve(settings.path, settings.revision)
        student, spec = models.load_classifier(folder, device)
        if spec.input_size != view_size:
            raise ValueError(
                f"student.path: got a student for {spec.input_size} pixels, expected "
                f"views.size={view_size}; set views.size={spec.input_size}"
            )
        if spec.in_chans != first.in_chans:
            raise ValueError(
                f"student.path: got a student for {spec.in_chans} channels, expected the teacher's "
                f"{first.in_chans}; use another student"
            )
        if spec.num_classes != num_classes:
            raise ValueError(
                f"student.path: got a student of {spec.num_classes} classes, expected the "
                f"teacher's {num_classes}; use another student or a class_map"
            )
    else:
        spec = ClassifierSpec(
            architecture=settings.arch or "",
            num_classes=num_classes,
            in_chans=first.in_chans,
            input_size=view_size,
            mean=first.mean,
            std=first.std,
            crop_pct=first.crop_pct,
            interpolation=first.interpolation,
            model_args=settings.model_args,
            stem=settings.stem,
        )
        torch.manual_seed(seed)
        student = models.build_classifier(spec)
        student = student.to(device).to(memory_format=torch.channels_last)
    one_view = memory.batch_plan(
        student, 1, 1, spec.in_chans, [view_size], dtype=torch.bfloat16, compiled=False
    )
    memory.check_fits(one_view, runtime.available_bytes(device))
    _check_takes("student", student, spec.input, num_classes, device)
    return student, spec


def _load_saved(
    path: str, revision: str | None, device: torch.device
) -> tuple[nn.Module, ClassifierSpec, str]:
    folder = assets.resolve(path, revision)
    model, spec = models.load_classifier(folder, device)
    licence = assets.licence(path) or models.classifier_licence(folder)
    return model, spec, licence if revision is None else f"{licence} ({path} at {revision})"


def _check_takes(
    name: str, model: nn.Module, input: InputSpec, num_classes: int, device: torch.device
) -> None:
    """One forward pass on zeros, so that a network that cannot take the views fails here."""
    size = input.size
    was_training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, input.num_channels, size, size, device=device))
    except Exception as error:  # Networks raise what they like when a shape does not fit.
        raise ValueError(
            f"{name}: cannot take {input.num_channels} x {size} x {size} views ({error}); use "
            "another architecture or stem"
        ) from None
    finally:
        model.train(was_training)
    if logits.shape != (2, num_classes):
        raise ValueError(
            f"{name}: got logits of shape {tuple(logits.shape)} for 2 views, expected "
            f"(2, {num_classes}); use a classifier"
        )
