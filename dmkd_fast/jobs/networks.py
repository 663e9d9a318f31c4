"""Load the teachers and the student of a job, and check that they fit its views and classes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dmkd_fast import assets
from dmkd_fast.classifiers.ensemble import Teacher, Teachers
from dmkd_fast.classifiers.loading import (
    TORCHVISION,
    build_classifier,
    classifier_folder,
    classifier_license,
    hub_repository,
    load_classifier,
    load_torchvision,
    to_channels_last,
)
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.config.networks import ClassifierConfig, TeachingConfig
from dmkd_fast.data.class_names import order_by_name
from dmkd_fast.jobs import memory, run_dir
from dmkd_fast.runtime.device import available_bytes
from dmkd_fast.runtime.errors import UserError, invalid, one_line
from dmkd_fast.views.spec import InputSpec, check_logits


@dataclass(frozen=True, kw_only=True)
class LoadedTeachers:
    """The teachers of a job, with their specs, classes and license."""

    together: Teachers
    specs: dict[str, ClassifierSpec]
    """Spec of each teacher, by the name of its section of the config."""
    num_classes: dict[str, int]
    """Number of classes of each teacher, after its class_map."""
    class_names: dict[str, tuple[str, ...] | None]
    """Names of those classes, or None where the teacher's file states none."""
    license: str
    """License of the weights, as their cards or configs state it."""


def load_trained(name: str, device: torch.device) -> tuple[nn.Module, ClassifierSpec, str]:
    """Load any trained classifier by its name.

    Args:
        name: A folder, the directory of a finished run, `embedded:NAME`,
            `hf-hub:OWNER/NAME@COMMIT`, `torchvision:NAME` or a timm name; the last two mean their
            published weights.
        device: Device to load the model to.

    Returns:
        The model in eval mode, its spec, and the license or identity of its weights.

    Raises:
        UserError: There is no such classifier, or its weights cannot be loaded.
    """
    if name.startswith(TORCHVISION):
        return load_torchvision(name, device)
    if name.startswith(assets.HUB):
        return _load_saved(*assets.split_commit(name), device)
    if "/" in name or name.startswith(assets.PREFIX) or Path(name).exists():
        return _load_saved(name, None, device)
    repository = hub_repository(name)
    _, commit = assets.newest(repository)
    return _load_saved(assets.HUB + repository, commit, device)


def pin(config: TeachingConfig) -> TeachingConfig:
    """Pin timm's published weights to the newest commit on the Hub; leave others unchanged."""
    if not config.pretrained or (config.arch or "").startswith(TORCHVISION):
        return config
    repository = hub_repository(config.arch or "")
    _, commit = assets.newest(repository)
    change = {"pretrained": False, "arch": None, "path": assets.HUB + repository}
    return config.model_copy(update={**change, "revision": commit})


def load_teachers(
    sections: dict[str, TeachingConfig], *, temperature: float, device: torch.device
) -> LoadedTeachers:
    """Load all teachers of a job.

    Args:
        sections: Config of each teacher by the name of its section. Those with `pretrained` must
            be pinned (see `pin`) or torchvision's.
        temperature: Softmax temperature.
        device: Device to load the teachers to.

    Raises:
        UserError: Weights are missing or do not fit, or some class has no teacher at some point of
            the run.
    """
    members: list[Teacher] = []
    names: dict[str, tuple[str, ...] | None] = {}
    specs, counts, licenses = {}, {}, []
    for section, config in sections.items():
        if config.path is not None:
            loaded = _load_saved(config.path, config.revision, device)
        else:
            loaded = load_trained(config.arch or "", device)
        module, spec, license = loaded
        class_map = config.class_map
        if class_map is None and spec.label_names is not None and members:
            # Reorder a further teacher's classes if the names equal the first teacher's.
            places = order_by_name(names["teacher"] or (), spec.label_names)
            class_map = None if places is None else tuple(places)
        highest = max(class_map or (0,))
        if highest >= spec.num_classes:
            expected = f"0 to {spec.num_classes - 1}, the teacher's classes"
            raise invalid(f"{section}.class_map", highest, expected, "correct the map")
        check_takes(section, module, spec.input, spec.num_classes, device)
        members.append(
            Teacher(
                module=to_channels_last(module),  # as views and test images are
                input=spec.input,
                class_map=class_map,
                teaches=config.teaches,
                start=config.start,
                stop=config.stop,
            )
        )
        specs[section] = spec
        counts[section] = len(class_map or ()) or spec.num_classes
        names[section] = spec.label_names
        if spec.label_names is not None and class_map is not None:
            names[section] = tuple(spec.label_names[k] for k in class_map)
        licenses.append(license)
    if len(set(counts.values())) > 1:
        given = ", ".join(f"{section} has {count}" for section, count in counts.items())
        raise UserError(
            f"classes: {given}, expected the same; set class_map where a teacher has more"
        )
    together = Teachers(members, num_classes=counts["teacher"], temperature=temperature)
    return LoadedTeachers(
        together=together.to(device),
        specs=specs,
        num_classes=counts,
        class_names=names,
        license="; ".join(dict.fromkeys(licenses)),
    )


def weights_sha256(*modules: nn.Module) -> str:
    """Hash all weights, so that different weights under the same path are noticed."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(data.numpy().data)
    return digest.hexdigest()


def load_student(
    config: ClassifierConfig,
    teachers: LoadedTeachers,
    *,
    view_size: int,
    device: torch.device,
    seed: int,
) -> tuple[nn.Module, ClassifierSpec]:
    """Build a new student, normalized like the first teacher, or load a saved one.

    Raises:
        UserError: The student cannot be built or loaded, or does not accept the views.
    """
    first, num_classes = teachers.specs["teacher"], teachers.num_classes["teacher"]
    if config.path is not None:
        folder = assets.resolve(config.path, config.revision)
        student, spec = load_classifier(folder, device)
        if spec.input_size != view_size:
            got, expected = f"a student for {spec.input_size} pixels", f"views.size={view_size}"
            raise invalid("student.path", got, expected, f"set views.size={spec.input_size}")
        if spec.in_chans != first.in_chans:
            got, fix = f"a student for {spec.in_chans} channels", "use another student"
            raise invalid("student.path", got, f"the teacher's {first.in_chans}", fix)
        if spec.num_classes != num_classes:
            expected, fix = f"the teacher's {num_classes}", "use another student or a class_map"
            raise invalid("student.path", f"a student of {spec.num_classes} classes", expected, fix)
    else:
        spec = replace(
            first,
            architecture=config.arch or "",
            num_classes=num_classes,
            input_size=view_size,
            model_args=config.model_args,
            stem=config.stem,
            test_input_size=None,
            label_names=None,
        )
        torch.manual_seed(seed)
        student = build_classifier(spec).to(device)
    if config.path is None or device.type == "cuda":
        student = to_channels_last(student)
    one_view = memory.batch_plan(
        student, 1, 1, spec.in_chans, [view_size], dtype=torch.bfloat16, compiled=False
    )
    memory.check_fits(one_view, available_bytes(device))
    check_takes("student", student, spec.input, num_classes, device)
    return student, spec


def _load_saved(
    path: str, revision: str | None, device: torch.device
) -> tuple[nn.Module, ClassifierSpec, str]:
    folder = classifier_folder(assets.resolve(path, revision))
    run_dir.check_classifier(folder)
    model, spec = load_classifier(folder, device)
    license = assets.license(path) or classifier_license(folder)
    return model, spec, license if revision is None else f"{license} ({path} at {revision})"


def check_takes(
    name: str, model: nn.Module, input: InputSpec, num_classes: int, device: torch.device
) -> None:
    """Run one forward pass on zeros to refuse a network that cannot take the views.

    Args:
        name: Section of the config that names the network, for the message.
        model: Network, (B, c, S, S) -> logits.
        input: Views.
        num_classes: Number of logits.
        device: Device of the network.

    Raises:
        UserError: It cannot, or its logits have another shape or are not finite.
    """
    size = input.size
    was_training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, input.num_channels, size, size, device=device))
    except Exception as error:  # Networks raise any kind of error for a wrong shape.
        reason = one_line(error)
        raise UserError(
            f"{name}: cannot take {input.num_channels} x {size} x {size} views ({reason}); use "
            "another architecture, stem or size"
        ) from None
    finally:
        model.train(was_training)
    check_logits(name, logits, 2, num_classes)
    if not logits.isfinite().all():
        fix = "the weights are damaged or their training diverged, use others"
        raise invalid(name, "NaN or infinite logits for a gray image", "finite ones", fix)
