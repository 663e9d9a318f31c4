"""Accuracy of a classifier on a real set, and the reading of such sets.

Stands on floor 2. A set is an idx folder (the MNIST file format): `*-images-idx3-ubyte.gz` and
`*-labels-idx1-ubyte.gz` with one prefix per split, and optionally `classes.txt`.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Labelled real images."""

    images: Tensor
    """(N, c, H, W) uint8."""
    labels: Tensor
    """(N,) int64."""
    class_names: tuple[str, ...]

    def to(self, device: torch.device) -> ImageSet:
        """The same set on a device."""
        return ImageSet(
            images=self.images.to(device), labels=self.labels.to(device),
            class_names=self.class_names,
        )  # fmt: skip


def load_idx(folder: Path, split: str) -> ImageSet:
    """Read `SPLIT-images-idx3-ubyte(.gz)` and its labels; `t10k` is the test split.

    Raises:
        ValueError: A file is missing, damaged, or labels and images do not match.
    """
    images = _read_idx(folder, f"{split}-images-idx3-ubyte", 3)[:, None]  # (N, 1, H, W)
    labels = _read_idx(folder, f"{split}-labels-idx1-ubyte", 1).long()
    if len(images) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"{folder}: got {len(images)} images and {len(labels)} labels for {split!r}, "
            "expected equally many, at least one; fetch the files again"
        )
    names = folder / "classes.txt"
    count = int(labels.max()) + 1
    if names.is_file():
        class_names = tuple(names.read_text(encoding="utf-8").split("\n")[:-1])
        if len(class_names) < count:
            raise ValueError(f"{names}: got {len(class_names)} names, expected {count}, one a line")
    else:
        class_names = tuple(str(i) for i in range(count))
    return ImageSet(images=images, labels=labels, class_names=class_names)


@torch.inference_mode()
def predict(
    model: nn.Module, images: Tensor, prepare: Callable[[Tensor, Tensor], Tensor], *,
    batch_size: int = 500,
) -> Tensor:  # fmt: skip
    """Logits (N, C) float32 of all images, in eval mode; the model's mode is put back.

    Args:
        model: Classifier.
        images: (N, c, H, W) uint8.
        prepare: `(images, indices) -> views`, for example `Views.whole`.
        batch_size: Fixes the bits of the result, as a matrix product's rounding may depend on it.
    """
    was_training = model.training
    model.eval()
    parts = []
    for indices in torch.arange(len(images), device=images.device).split(batch_size):
        parts.append(model(prepare(images, indices)).float())
    model.train(was_training)
    return torch.cat(parts)


def score(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> dict[str, float]:
    """Shares in [0, 1]: top1, top5, ece and, with a teacher, teacher_top1 and agreement.

    Args:
        logits: (N, C).
        labels: (N,) int64.
        teacher_logits: (N, C) or None.

    Returns:
        `ece` is the expected calibration error over 15 equal-width bins (Guo et al. 2017).
    """
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (N, 5)
    hits = top == labels[:, None]
    scores = {
        "top1": hits[:, 0].double().mean().item(),
        "top5": hits.any(dim=1).double().mean().item(),
        "ece": _calibration_error(logits, hits[:, 0]),
    }
    if teacher_logits is not None:
        guess = teacher_logits.argmax(dim=1)
        scores["teacher_top1"] = (guess == labels).double().mean().item()
        scores["agreement"] = (guess == top[:, 0]).double().mean().item()
    return scores


def _calibration_error(logits: Tensor, hits: Tensor) -> float:
    confidence = logits.double().softmax(dim=1).amax(dim=1)
    bins = (confidence * 15).long().clamp_max(14)
    gap = torch.zeros(15, dtype=torch.float64, device=logits.device)
    gap.index_add_(0, bins, hits.double() - confidence)
    return (gap.abs().sum() / len(hits)).item()


def _read_idx(folder: Path, stem: str, num_dims: int) -> Tensor:
    """One idx file of unsigned bytes, gzip-compressed or not."""
    path = next((p for p in (folder / f"{stem}.gz", folder / stem) if p.is_file()), None)
    if path is None:
        raise ValueError(f"{folder / stem}.gz: no such file; give a folder with idx files")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{num_dims}I", data[4 : 4 + 4 * num_dims])
    except (OSError, EOFError, struct.error) as error:
        raise ValueError(f"{path}: damaged ({error}); fetch it again") from None
    body = data[4 + 4 * num_dims :]
    expected = 1
    for length in shape:
        expected *= length
    if magic != (0, 8, num_dims) or len(body) != expected:
        raise ValueError(
            f"{path}: got header {magic} and {len(body)} bytes, expected (0, 8, {num_dims}) and "
            f"{expected}; it is not an idx file of bytes"
        )
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(shape)
