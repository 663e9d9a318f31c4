"""Inputs and outputs of a classifier: image size, normalization and evaluation crop; logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from dmkd_fast.runtime import checks
from dmkd_fast.runtime.errors import invalid

Interpolation = Literal["bilinear", "bicubic"]
CropMode = Literal["center", "squash"]


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """The images that a classifier expects; networks with equal specs can share rendered views."""

    size: int
    """Side of the square input, in pixels."""
    mean: tuple[float, ...]
    """Mean per channel, of pixel values in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation per channel, of pixel values in [0, 1]."""
    crop_pct: float = 1.0
    """Ratio of the evaluation crop: the short side is resized to size / crop_pct, then the center
    is cut out. 0.875 is the usual 256 -> 224; 1 keeps all of a square image."""
    interpolation: Interpolation = "bilinear"
    """Interpolation of the evaluation resize; both choices are antialiased."""
    crop_mode: CropMode = "center"
    """`center` keeps the aspect ratio. `squash` resizes both sides to size / crop_pct, which
    distorts an image that is not square (timm's SigLIP and EVA models)."""

    def __post_init__(self) -> None:
        check_normalization(self.mean, self.std)
        checks.whole("size", self.size)
        checks.number("crop_pct", self.crop_pct)
        if self.size < 1 or not 0 < self.crop_pct <= 1:
            got, expected = f"size {self.size} and crop_pct {self.crop_pct}", "1 or more and (0, 1]"
            raise invalid("input", got, expected, "correct the model's config")
        if self.interpolation not in ("bilinear", "bicubic"):
            got, fix = repr(self.interpolation), "correct the model's config"
            raise invalid("interpolation", got, "bilinear or bicubic", fix)
        if self.crop_mode not in ("center", "squash"):
            got, fix = repr(self.crop_mode), "use a model that was trained without borders"
            raise invalid("crop_mode", got, "center or squash", fix)

    @property
    def num_channels(self) -> int:
        """Number of channels: 1 for gray images, 3 for color."""
        return len(self.mean)

    @property
    def short_side(self) -> int:
        """Length that the short side of an image is resized to before the center is cut out."""
        return math.floor(self.size / self.crop_pct)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that an image is resized to before the center is cut out."""
        if self.crop_mode == "squash":
            return self.short_side, self.short_side
        short = min(height, width)
        return self.short_side * height // short, self.short_side * width // short


def check_normalization(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse means and standard deviations that cannot be those of pixel values in [0, 1].

    Raises:
        TypeError: An entry is not a number.
        UserError: An entry is out of range, or `mean` and `std` differ in length or are empty.
    """
    got = f"{tuple(mean)} and {tuple(std)}"
    for name, values in (("mean", mean), ("std", std)):
        for value in values:
            number = checks.number(f"mean, std: {name}", value)
            if not 0 <= number <= 1 or (name == "std" and number == 0):
                raise invalid(
                    "mean, std",
                    got,
                    "means from 0 to 1 and std above 0 and at most 1, of pixel values in [0, 1]",
                    "divide numbers of pixel values in [0, 255] by 255",
                )
    if len(mean) != len(std) or len(mean) == 0:
        raise invalid("mean, std", got, "one number of each per channel")


def check_logits(name: str, logits: Any, num_images: int, num_classes: int | None = None) -> None:
    """Refuse an output that is not a tensor of logits (num_images, num_classes).

    Args:
        name: Name of the network, for the message.
        logits: Output of the network.
        num_images: Number of images that the network was given.
        num_classes: Expected number of classes; None allows any number.

    Raises:
        UserError: The output is not a tensor, or has another shape.
    """
    shape = f"({num_images}, {'' if num_classes is None else f'{num_classes} '}classes)"
    if not isinstance(logits, Tensor):
        got, expected = f"a {type(logits).__name__} from forward", f"a tensor of logits {shape}"
        raise invalid(name, got, expected, "return the logits alone, or wrap the network")
    good = logits.ndim == 2 and logits.shape[0] == num_images
    if not good or num_classes not in (None, logits.shape[1]):
        got = f"logits of shape {tuple(logits.shape)} for {num_images} images"
        fix = "use a classifier of that many classes, or pool and transpose its output"
        raise invalid(name, got, f"{shape}, classes last", fix)
