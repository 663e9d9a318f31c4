"""Write the folders of imported networks: complete and loaded once, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from dmkd_fast.classifiers.loading import load_classifier, save_classifier
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.jobs.evaluate import evaluate
from dmkd_fast.runtime import files
from dmkd_fast.runtime.errors import UserError


def check_new(target: Path, option: str) -> None:
    """Refuse to replace a folder.

    Args:
        target: Folder to create.
        option: What a user types for another folder.

    Raises:
        UserError: It exists.
    """
    if target.exists():
        raise UserError(f"{target}: exists already; choose another with {option} or remove it")


@contextmanager
def new_network(target: Path, source: str | Path) -> Iterator[Path]:
    """Fill a new folder under a hidden name; errors about that name are about `source`."""
    with files.new_folder(target) as partial:
        try:
            yield partial
        except UserError as error:
            raise UserError(str(error).replace(str(partial), str(source))) from None


def save_teacher(
    model: nn.Module,
    spec: ClassifierSpec,
    target: Path,
    *,
    source: str | Path,
    weights: str,
    license: str | None = None,
    data: str | Path | None = None,
    classes: str | Path | None = None,
) -> dict[str, Any]:
    """Write a classifier, load it again, and measure its accuracy if there are images.

    Args:
        model: The classifier.
        spec: Its spec.
        target: Folder to create.
        source: Where the weights came from, for messages.
        weights: Which part of `source` they are.
        license: License for the model card, if it is known.
        data: Labeled images; see `open_set`.
        classes: File with the class names of `data`, one a line.

    Returns:
        The facts that `import_teacher` returns.

    Raises:
        UserError: The images cannot be read, or do not fit the classes; nothing is kept.
    """
    facts: dict[str, Any] = {
        "path": str(target),
        "weights": weights,
        "num_classes": spec.num_classes,
        "input_size": spec.input_size,
        "mean": list(spec.mean),
        "std": list(spec.std),
    }
    with new_network(target, source) as partial:
        save_classifier(model, spec, partial)
        load_classifier(partial, "cpu")
        if license is not None:
            card = f"---\nlicense: {license}\n---\n# {spec.architecture}\n"
            (partial / "README.md").write_text(card, encoding="utf-8")
        if data is not None:
            found = evaluate(partial, data, classes=classes)
            facts |= {"top1": found.scores["top1"], "num_images": found.num_images}
    return facts
