"""Store the teacher's logits with generated images, and check stored ones against a job.

`dmkd generate --teacher-logits` stores them, `teacher.stored` reads them. They belong to crops that
follow from (seed, image id, view) and the settings of the views, whatever the size of the
student's views is.

Shapes: n images, V views an image, C classes, K largest logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.data.shards import Plan, read_plan
from dmkd_fast.data.sources import ShardSource
from dmkd_fast.data.teacher_logits import MOST_VIEWS, LogitsPlan
from dmkd_fast.jobs import networks
from dmkd_fast.jobs.images import OpenSource, wait_for_plan
from dmkd_fast.runtime.errors import UserError, invalid
from dmkd_fast.training.targets import Targets
from dmkd_fast.views.crops import Views, ViewSpec

if TYPE_CHECKING:
    from dmkd_fast.jobs.resolve import ResolvedJob

# What a teacher's logits depend on beside its weights.
_CLASSES = ("class_map", "teaches")


class Wanted(NamedTuple):
    """What `dmkd generate` is asked to store of the teacher's logits."""

    top_k: int | None
    """Number of the largest logits; None: all."""
    views_per_image: int = 8


def plan_of(config: DistillConfig, wanted: Wanted, num_classes: int) -> LogitsPlan:
    """Return the plan of the logits that are asked for.

    Raises:
        UserError: K is larger than the number of classes, or a teacher is not there all the time.
    """
    if wanted.top_k is not None and wanted.top_k > num_classes:
        expected = f"K from 1 to {num_classes}, the teacher's classes"
        raise invalid("--teacher-logits", f"topk:{wanted.top_k}", expected)
    if wanted.views_per_image > MOST_VIEWS:
        raise invalid("--views", wanted.views_per_image, f"at most {MOST_VIEWS}", "lower it")
    for name, teacher in config.teachers.items():
        if (teacher.start, teacher.stop) != (0.0, 1.0):
            got, expected = f"start={teacher.start} and stop={teacher.stop}", "the whole run"
            raise invalid(name, got, f"{expected} with --teacher-logits", "remove them")
    depends = wanted.top_k is not None or len(config.teachers) > 1
    return LogitsPlan(
        views_per_image=wanted.views_per_image,
        top_k=wanted.top_k,
        temperature=config.loss.temperature if depends else None,
        views=_views(config),
    )


class LogitsMaker:
    """Compute the logits of the stored views of generated images.

    Args:
        job: Resolved job.
        teachers: Loaded teachers.
        plan: What is stored.
    """

    def __init__(
        self, job: ResolvedJob, teachers: networks.LoadedTeachers, plan: LogitsPlan
    ) -> None:
        input = teachers.specs["teacher"].input
        spec = ViewSpec(size=input.size, mean=input.mean, std=input.std, device=job.device)
        views = Views(spec, **plan.views, seed=job.config.seed)
        self._targets = Targets(teachers.together, views, input=input, dtype=job.dtype)
        self._plan, self._num_classes = plan, teachers.num_classes["teacher"]

    def start(self, images: Tensor, labels: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Compute what `finish` needs on the host, without waiting for the device.

        Args:
            images: Images (n, c, H, W) uint8.
            labels: Their classes (n,) int64.
            ids: Their ids (n,) int64.
        """
        slots, found = torch.arange(len(ids), device=images.device), []
        for view in range(self._plan.views_per_image):
            uses = torch.full_like(ids, view)
            seen = self._targets.render(images, slots, ids, uses, progress=0.0)
            found.append(self._targets.logits(seen, labels, progress=0.0).to(torch.float16))
        logits = torch.stack(found, dim=1)  # (n, V, C)
        return {**self._arrays(logits), "is_finite": logits.isfinite().all()}

    def finish(self, started: dict[str, Tensor]) -> Iterator[dict[str, bytes]]:
        """Yield the arrays of each image, as `ShardWriter.add` takes them.

        Args:
            started: Result of `start`, on the host.

        Raises:
            UserError: Logits are not finite in float16.
        """
        if not started["is_finite"]:
            fix = "use another teacher, as its logits do not fit into float16"
            raise invalid("--teacher-logits", "logits that are not finite", "finite ones", fix)
        arrays = self._plan.arrays(self._num_classes)
        made = {name: started[name].numpy().astype(dtype) for name, (dtype, _) in arrays.items()}
        for row in range(len(next(iter(made.values())))):
            yield {
                name: np.ascontiguousarray(values[row]).tobytes() for name, values in made.items()
            }

    def _arrays(self, logits: Tensor) -> dict[str, Tensor]:
        top_k, temperature = self._plan.top_k, self._plan.temperature
        if top_k is None or temperature is None:
            return {"logits": logits}
        # A stable sort, as the order of equal logits must be the same everywhere.
        values, indices = logits.sort(dim=-1, descending=True, stable=True)
        total = (logits.float() / temperature).logsumexp(dim=-1)
        return {"values": values[..., :top_k], "indices": indices[..., :top_k], "logsumexp": total}


def with_teachers_of_source(config: DistillConfig) -> DistillConfig:
    """Return a config that names the teachers of its shards, if it names none itself.

    Raises:
        UserError: The shards cannot be read, or name no teacher.
    """
    if not config.teacher.is_named_by_source:
        return config
    assert config.source is not None
    if config.more_teachers:
        got = "some beside teacher.stored without path"
        raise invalid("more_teachers", got, "none, as the shards name all teachers", "remove them")
    folder = Path(config.source.folder)
    if config.source.follow:
        wait_for_plan(folder, config.source.wait_s)
    named = _teachers_of(read_plan(folder))
    if not named:
        got = f"true without path, for {config.source.path}, which names no teacher"
        raise invalid("teacher.stored", got, "shards of dmkd generate", "set teacher.path")
    first, *more = named.values()
    return load_config(
        DistillConfig, config, {"teacher": {**first, "stored": True}, "more_teachers": tuple(more)}
    )


def open_stored(
    config: DistillConfig, images: OpenSource, teachers: networks.LoadedTeachers
) -> ShardSource | None:
    """Return the shards whose logits a job reads; None if it runs its teachers.

    Raises:
        UserError: There are no logits, or they are of other teachers, views or temperatures.
    """
    if not config.teacher.stored:
        return None
    assert config.source is not None
    path, source = config.source.folder, images.source
    plan = source.plan.teacher_logits if isinstance(source, ShardSource) else None
    if not isinstance(source, ShardSource) or plan is None:
        expected = "a directory of dmkd generate --teacher-logits"
        raise invalid("teacher.stored", f"true with {path}", expected, "set teacher.stored=false")
    made_with = source.plan.settings
    if networks.weights_sha256(teachers.together) != made_with.get("teacher_sha256"):
        expected = f"those whose logits are in {path}"
        fix = "set teacher={stored: true} for the teachers of the shards"
        raise invalid("teacher", "other weights", expected, fix)
    theirs = {name: _classes(each) for name, each in _teachers_of(source.plan).items()}
    ours = {name: _classes(each.model_dump(mode="json")) for name, each in config.teachers.items()}
    _compare("teacher", ours, theirs, path)
    for name, value in _views(config).items():
        _compare(f"views.{name}", value, plan.views.get(name), path)
    _compare("source.image_size", images.image_shape, source.plan.image_shape, path)
    if not isinstance(made_with.get("seed"), int):
        raise UserError(f"{path}: damaged (seed in job.json); make the directory again")
    _check_loss(config, plan, path, source.plan.num_classes)
    return source


def _check_loss(config: DistillConfig, plan: LogitsPlan, path: str, num_classes: int) -> None:
    """Refuse losses that the stored logits cannot give."""
    loss, at_any = config.loss, plan.top_k is not None and config.loss.rest == "renormalize"
    if len(config.teachers) > 1:
        at_any = False  # Several teachers were averaged at the temperature.
    if plan.temperature not in (None, loss.temperature) and not at_any:
        fix = f"set loss.temperature={plan.temperature:g}"
        if (plan.top_k or 1) > 1 and len(config.teachers) == 1:
            fix += " or loss.rest=renormalize"
        expected = f"{plan.temperature:g}, that of the logits in {path}"
        raise invalid("loss.temperature", f"{loss.temperature:g}", expected, fix)
    if plan.top_k is None:
        if loss.rest != "bucket":
            expected = f"none, as {path} has the logits of all classes"
            raise invalid("loss.rest", loss.rest, expected, "remove it")
        return
    why = f"as {path} has only the {plan.top_k} largest logits of a view"
    if plan.top_k == 1 and loss.rest == "renormalize":
        expected = "bucket, as the softmax over the one class that is stored is always 1"
        raise invalid("loss.rest", loss.rest, expected, "remove it")
    if loss.uses_classes:
        raise invalid("loss.divergence", "dkd", f"one without classes, {why}", "choose another")
    if loss.correlates and plan.top_k < num_classes:
        # Columns would be ranks, which are another class in each view.
        expected = f"one that does not correlate views of a class, {why}"
        raise invalid("loss.divergence", "dist", expected, "choose another")
    if loss.standardize_logits:
        raise invalid("loss.standardize_logits", "true", f"false, {why}", "remove it")


def _compare(name: str, ours: Any, theirs: Any, path: str) -> None:
    """Refuse a setting that differs from the one that the logits were made with."""
    ours, theirs = _plain(ours), _plain(theirs)
    if ours != theirs:
        fix = "put it back, or set teacher.stored=false"
        raise invalid(name, ours, f"{theirs}, as for the logits in {path}", fix)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _teachers_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the config of each teacher that shards were made with; empty if they name none."""
    named = plan.settings.get("teachers")
    good = isinstance(named, dict) and all(isinstance(each, dict) for each in named.values())
    return dict(named) if good and isinstance(named, dict) else {}


def _classes(teacher: dict[str, Any]) -> dict[str, Any]:
    return {name: teacher.get(name) for name in _CLASSES}


def _views(config: DistillConfig) -> dict[str, Any]:
    """Return the settings that crops and flips depend on."""
    return config.views.model_dump(exclude={"size"})
