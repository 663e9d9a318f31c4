"""Collect the batches of a test set, and preprocess an image file with torchvision."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dmkd_fast import InputSpec

CPU = torch.device("cpu")


def all_of(images: Any, spec: InputSpec, **part: int) -> tuple[Tensor, Tensor]:
    views, labels = zip(*images.batches([spec], **part), strict=True)
    return torch.cat([v[spec] for v in views]), torch.cat(labels)


def torchvision_of(item: Any, spec: InputSpec) -> Tensor:
    """Read an image with PIL; apply torchvision's Resize, CenterCrop, ToTensor, Normalize."""
    from torchvision import transforms as t

    image = Image.open(io.BytesIO(item.read()))
    return t.Compose(
        [
            t.Resize(spec.short_side, interpolation=t.InterpolationMode(spec.interpolation)),
            t.CenterCrop(spec.size),
            t.ToTensor(),
            t.Normalize(spec.mean, spec.std),
        ]
    )(image.convert("L" if spec.num_channels == 1 else "RGB"))
