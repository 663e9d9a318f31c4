"""What goes into a classifier and what comes out: size, normalization, crop of a photo; logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from dmkd_fast.runtime import checks

Interpolation = Literal["bilinear", "bicubic"]
CropMode = Literal["center", "squash"]


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """The images a classifier expects; two networks with equal ones can share a rendering."""

    size: int
    """Side of the square input, in pixels."""
    mean: tuple[float, ...]
    """Per channel, of pixel values in [0, 1]."""
    std: tuple[float, ...]
    crop_pct: float = 1.0
    """Evaluation resizes the short side to size / crop_pct and takes the centre: 0.875 is the
    usual 256 -> 224; 1 keeps all of a square image."""
    interpolation: Interpolation = "bilinear"
    """Of that resizing; antialiased either way."""
    crop_mode: CropMode = "center"
    """`squash` resizes both sides to size / crop_pct, so an image that is not square is distorted
    (timm's SigLIP and EVA models); both are the same for square images."""

    def __post_init__(self) -> None:
        check_normalization(self.mean, self.std)
        checks.whole("size", self.size)
        checks.number("crop_pct", self.crop_pct)
        if self.size < 1 or not 0 < self.crop_pct <= 1:
            raise ValueError(
                f"input: got size {self.size} and crop_pct {self.crop_pct}, expected at least 1 "
                "and a share in (0, 1]; correct the model's config"
            )
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(
                f"interpolation: got {self.interpolation!r}, expected bilinear or bicubic; correct "
                "the model's config"
            )
        if self.crop_mode not in ("center", "squash"):
            raise ValueError(
                f"crop_mode: got {self.crop_mode!r}, expected center or squash; use a model that "
                "was trained without borders"
            )

    @property
    def num_channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return len(self.mean)

    @property
    def short_side(self) -> int:
        """What the short side of a whole image is resized to before the centre is cut out."""
        return math.floor(self.size / self.crop_pct)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that a whole image is resized to before the center is cut out."""
        if self.crop_mode == "squash":
            return self.short_side, self.short_side
        short = min(height, width)
        return self.short_side * height // short, self.short_side * width // short


def check_normalization(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse means and standard deviations that are not of pixel values in [0, 1].

    Raises:
        TypeError: An entry is not a number.
        ValueError: One is out of range, or there are not as many of both.
    """
    for name, values in (("mean", mean), ("std", std)):
        for value in values:
            number = checks.number(f"mean, std: {name}", value)
            if not 0 <= number <= 1 or (name == "std" and number == 0):
                raise ValueError(
                    f"mean, std: got {tuple(mean)} and {tuple(std)}, expected means from 0 to 1 "
                    "and std above 0 and at most 1, of pixel values in [0, 1]; divide numbers of "
                    "pixel values in [0, 255] by 255"
                )
    if len(mean) != len(std) or len(mean) == 0:
        raise ValueError(
            f"mean, std: got {tuple(mean)} and {tuple(std)}, expected one number of each per "
            "channel; correct them"
        )


def check_logits(name: str, logits: Any, num_images: int, num_classes: int | None = None) -> None:
    """Refuse what is no tensor of logits (num_images, num_classes).

    Args:
        name: Of the network, for the message.
        logits: What the network returned.
        num_images: How many images it was given.
        num_classes: None allows any number.

    Raises:
        ValueError: The output is no tensor, or has another shape.
    """
    expected = f"({num_images}, {'' if num_classes is None else f'{num_classes} '}classes)"
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{name}: got a {type(logits).__name__} from forward, expected a tensor of logits "
            f"{expected}; return the logits alone, or wrap the network"
        )
    good = logits.ndim == 2 and logits.shape[0] == num_images
    if not good or num_classes not in (None, logits.shape[1]):
        raise ValueError(
            f"{name}: got logits of shape {tuple(logits.shape)} for {num_images} images, expected "
            f"{expected}, classes last; use a classifier of that many classes, or pool and "
            "transpose its output"
        )
