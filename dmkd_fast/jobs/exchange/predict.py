"""Classify image files with the student of a run or any trained classifier: `dmkd predict`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dmkd_fast.data.listing import Item
from dmkd_fast.data.test_sets import EncodedSet
from dmkd_fast.jobs import networks
from dmkd_fast.runtime.device import exact_float32, resolve_device, set_num_threads
from dmkd_fast.runtime.errors import UserError, invalid


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The most probable classes of one image."""

    image: str
    """Path of the image."""
    classes: dict[str, float]
    """Probability of each of the most probable classes by name, highest first."""


@torch.inference_mode()
def predict(what: str | Path, images: Sequence[str | Path], *, top: int = 5) -> list[Prediction]:
    """Classify image files, prepared as for evaluation, in float32.

    Args:
        what: Run directory of a finished run, or name of a classifier; see `load_trained` in
            `jobs/networks.py`.
        images: Paths of image files.
        top: Number of classes to return for each image, at most.

    Raises:
        UserError: The classifier or an image cannot be loaded, or logits are not finite.

    Examples:
        >>> from dmkd_fast import predict
        >>> predict("embedded:fashion_mnist/weak", [])
        []
    """
    for path in map(Path, images):
        if not path.is_file():
            what_is = "a folder" if path.is_dir() else "no such file"
            raise UserError(f"{path}: {what_is}; give image files")
    set_num_threads(0)
    device = resolve_device("auto")
    model, spec, _ = networks.load_trained(str(what), device)
    names = spec.label_names or tuple(map(str, range(spec.num_classes)))
    items = tuple(Item(str(path), 0) for path in images)
    encoded = EncodedSet(items=items, class_names=names, device=device)
    found: list[Prediction] = []
    with exact_float32():
        for views, _ in encoded.batches([spec.input]):
            best = model(views[spec.input]).softmax(dim=1).topk(min(top, spec.num_classes))
            for values, labels in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                image = items[len(found)].path
                if not all(map(math.isfinite, values)):
                    fix = f"the weights of {what} are damaged or their training diverged"
                    raise invalid(image, "NaN or infinite logits", "finite ones", fix)
                classes = {names[k]: value for k, value in zip(labels, values, strict=True)}
                found.append(Prediction(image=image, classes=classes))
    return found
