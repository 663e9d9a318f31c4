"""Evaluate a run's student, or any trained classifier, on labeled images: `dmkd evaluate`.

Networks are loaded from the saved files and run in float32, so that a run's own scores and those of
a later evaluation agree in every digit.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast import assets
from dmkd_fast.classifiers.ensemble import Teachers
from dmkd_fast.classifiers.loading import load_classifier
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.data.class_names import compare_class_names, has_standard_order
from dmkd_fast.data.listing import CLASS_NAMES
from dmkd_fast.data.test_sets import EncodedSet, ImageSet, in_order_of, open_set
from dmkd_fast.jobs import memory, networks, run_dir
from dmkd_fast.runtime.device import resolve_device, set_num_threads
from dmkd_fast.runtime.errors import UserError, invalid, warn_once
from dmkd_fast.runtime.model_files import CONFIG, pickle_hint
from dmkd_fast.runtime.output.progress import Progress
from dmkd_fast.training import scoring

STUDENT = "student"
_LESS_MEMORY = "evaluate fewer or smaller images (--data) or a smaller classifier"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of an evaluation."""

    scores: dict[str, float]
    """Scores by name; see `Scores.result` in `training/scoring.py`."""
    classes: dict[str, dict[str, Any]]
    """For each class name: images, top1, top5 (both None for a class without images)."""
    num_images: int
    """Number of images that were evaluated."""
    num_not_finite: int
    """Number of images whose logits are NaN or infinite; they count as wrong."""
    spec: ClassifierSpec
    """Spec of the classifier."""
    run_dir: str | None
    """Directory of the run that the classifier belongs to, if any."""
    guesses: dict[str, Tensor] = field(repr=False)
    """Guesses for every image; see `Guesses.result` in `training/scoring.py`."""

    def summary(self) -> dict[str, Any]:
        """Return the scores, numbers of images, size and crop of the input, and top-1 by class."""
        by_class = {name: row["top1"] for name, row in self.classes.items()}
        return {
            **self.scores,
            "num_images": self.num_images,
            "num_not_finite": self.num_not_finite,
            "input_size": self.spec.input_size,
            "crop_pct": self.spec.crop_pct,
            "crop_mode": self.spec.crop_mode,
            "run_dir": self.run_dir,
            "class_top1": by_class,
        }

    def describe_input(self) -> str:
        """Describe in one line how images were resized and cropped."""
        spec, size = self.spec, self.spec.input_size
        text = f"input {size} x {size}, crop_pct {spec.crop_pct:g}, {spec.interpolation}"
        if spec.test_input_size not in (None, size):
            text += (
                f"; timm's published accuracy is at test_input_size {spec.test_input_size}, which "
                "is not used"
            )
        return text


def evaluate(
    path: str | Path,
    data: str | Path | None = None,
    *,
    classes: str | Path | None = None,
    show: bool = True,
) -> Evaluation:
    """Evaluate the student of a run, or any trained classifier, on labeled images.

    Args:
        path: Directory of a finished run, or a classifier: a folder with config.json,
            `embedded:NAME`, `hf-hub:OWNER/NAME@COMMIT`, `torchvision:NAME` or a timm name.
        data: Labeled images; see `open_set`. None: the test set of a distillation.
        classes: File with the class names of `data`, one a line.
        show: Whether to show progress.

    Raises:
        UserError: The run, the classifier or the images cannot be loaded, or do not fit each other.
    """
    folder, display = Path(path), Progress(show=show)
    if (folder / run_dir.CONFIG).is_file() and (folder / "model" / CONFIG).is_file():
        path = folder = folder / "model"  # of `dmkd pretrain teacher`, which names no test set
    if folder.is_dir() and not (folder / CONFIG).is_file():
        if classes is not None and data is None:
            raise UserError("--classes: got it without --data, expected both; add --data DIR")
        return evaluate_run(folder, data=data, classes=classes, display=display)
    _check_exists(str(path), folder)
    if data is None:
        got = f"none for {path}, which is not the directory of a run of dmkd distill"
        raise invalid("--data", got, "labeled images", "add --data DIR")
    return evaluate_classifier(str(path), data=data, classes=classes, display=display)


def _check_exists(name: str, folder: Path) -> None:
    """Refuse the path of a run or a folder that does not exist.

    Raises:
        UserError: The name is a path, as of a run, and nothing is there.
    """
    is_path = os.sep in name and not name.startswith((assets.PREFIX, assets.HUB))
    if is_path and not folder.exists():
        there = sorted(path.parent.name for path in folder.parent.glob(f"*/{run_dir.CONFIG}"))
        close = difflib.get_close_matches(folder.name, there, n=1) or there[-1:]
        hint = f"did you mean {folder.parent / close[0]}?" if close else "no run is beside it"
        raise UserError(f"{name}: no such run or classifier; {hint}")


def evaluate_run(
    folder: Path,
    *,
    data: str | Path | None = None,
    classes: str | Path | None = None,
    display: Progress,
) -> Evaluation:
    """Evaluate a run's saved student and compare it with the run's teachers.

    Args:
        folder: Run directory of a finished run.
        data: Labeled images in place of the run's own test set; see `open_set`.
        classes: File with the class names of `data`; see `open_set`.
        display: Display of the progress.

    Raises:
        UserError: The folder is not a finished run, its files are damaged, or the images do not
            fit the student.
    """
    if not (folder / run_dir.CONFIG).is_file():
        raise UserError(
            f"{folder}: got neither the config.yaml of a run nor the config.json of a classifier"
            f"{pickle_hint(folder)}"
        )
    if not (folder / STUDENT / CONFIG).is_file():
        run_dir.check_classifier(folder)
    config = load_config(DistillConfig, folder / run_dir.CONFIG)
    set_num_threads(config.num_threads)
    with memory.named(_LESS_MEMORY):
        device = resolve_device(config.device)
        student, spec = load_classifier(folder / STUDENT, device)
        own = (config.eval.path, config.eval.classes)
        place, chosen = own if data is None else (data, classes)
        images = open_test_set(place, chosen, device, spec.num_classes, spec.label_names)
        teachers = networks.load_teachers(
            config.teachers, temperature=config.loss.temperature, device=device
        )
        if chosen is None:
            named = {STUDENT: spec.label_names, **teachers.class_names}
            for section, names in named.items():
                setting = "eval.classes" if data is None else "--classes"
                compare_class_names(section, names, images.class_names, setting=setting)
        name = str(folder / STUDENT)
        together = teachers.together
        return _measure(student, spec, images, together, display, name=name, run_dir=folder)


def evaluate_classifier(
    name: str, *, data: str | Path, classes: str | Path | None = None, display: Progress
) -> Evaluation:
    """Evaluate any trained classifier.

    Args:
        name: Name or folder of the classifier; see `load_trained` in `jobs/networks.py`.
        data: Labeled images; see `open_set`.
        classes: File with the class names of `data`; see `open_set`.
        display: Display of the progress.

    Raises:
        UserError: The classifier or the images cannot be loaded, or do not fit each other.
    """
    set_num_threads(0)
    with memory.named(_LESS_MEMORY):
        device = resolve_device("auto")
        model, spec, _ = networks.load_trained(name, device)
        images = open_test_set(data, classes, device, spec.num_classes, spec.label_names)
        if classes is None:
            compare_class_names(name, spec.label_names, images.class_names, setting="--classes")
        owner = Path(name).parent
        run = owner if (owner / run_dir.CONFIG).is_file() else None
        return _measure(model, spec, images, None, display, name=name, run_dir=run)


def open_test_set(
    path: str | Path,
    classes: str | Path | None,
    device: torch.device,
    num_classes: int,
    names: Sequence[str] | None,
) -> ImageSet | EncodedSet:
    """Open labeled images, check their number of classes, and order the classes by name.

    Args:
        path: Folder of labeled images, or `embedded:NAME`.
        classes: File with their class names; see `open_set`.
        device: Device for the batches.
        num_classes: Number of classes that the networks have and the set must have.
        names: Class names of a network, whose order the set gets if it has the same names and
            `classes` is None; None if they are unknown.

    Raises:
        UserError: There is no such set, it is damaged, or its number of classes differs.
    """
    folder = assets.resolve(str(path))
    listed = None if classes is None else Path(classes)
    images = open_set(folder, device, classes=listed, num_classes=num_classes)
    if len(images.class_names) != num_classes:
        raise UserError(
            f"classes: {folder} has {len(images.class_names)}, the networks have {num_classes}, "
            "expected the same; use another set, or a classifier for these classes"
        )
    is_listed = classes is not None or (folder / CLASS_NAMES).is_file()
    if names is None and not is_listed and not has_standard_order(images.class_names):
        first = ", ".join(images.class_names[:3])
        warn_once(
            f"{folder}: the networks state no class names, so the classes are taken in the order "
            f"{first}, ...; set eval.classes (--classes) if theirs is another"
        )
    return images if classes is not None else in_order_of(images, names)


def _measure(
    model: nn.Module,
    spec: ClassifierSpec,
    images: ImageSet | EncodedSet,
    teachers: Teachers | None,
    display: Progress,
    *,
    name: str,
    run_dir: Path | None,
) -> Evaluation:
    inputs = [spec.input, *([] if teachers is None else teachers.inputs_at(1.0))]
    guesses = scoring.Guesses()
    scores = scoring.measure(
        model,
        scoring.tracked(images.batches(inputs), len(images), display),
        input=spec.input,
        num_classes=len(images.class_names),
        teacher=None if teachers is None else teachers.predict,
        guesses=guesses,
    )
    if scores.num_not_finite == scores.num_images:
        got = f"NaN or infinite logits for all of {scores.num_images} images"
        fix = "the weights are damaged or their training diverged, use others"
        raise invalid(name, got, "finite ones", fix)
    return Evaluation(
        scores=scores.result(),
        classes=dict(zip(images.class_names, scores.by_class(), strict=True)),
        num_images=scores.num_images,
        num_not_finite=scores.num_not_finite,
        spec=spec,
        run_dir=None if run_dir is None else str(run_dir),
        guesses=guesses.result(),
    )
