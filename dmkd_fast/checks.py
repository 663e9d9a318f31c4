"""Checks of numbers and tensors that callers pass: one line that names the argument.

Stands on floor 0.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy
import torch
from torch import Tensor

MAX_SEED = 2**63 - 1


def whole(name: str, value: Any, *, low: int = 0, high: int = 2**31 - 1) -> int:
    """Return a whole number in [low, high].

    Raises:
        TypeError: `value` is not an integer; a bool is not one.
        ValueError: It is out of range.
    """
    try:
        if isinstance(value, bool | Tensor):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {_shown(value)}, expected a whole number") from None
    if not low <= number <= high:
        raise ValueError(f"{name}: got {_shown(value)}, expected {low} to {high}; change it")
    return number


def number(
    name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, above: bool = False
) -> float:
    """Return a finite number in [low, high], or in (low, high] if `above`.

    Raises:
        TypeError: `value` is not a number.
        ValueError: It is not finite or out of range.
    """
    try:
        if isinstance(value, bool | str | bytes | Tensor):
            raise TypeError
        result = float(value)
    except OverflowError:
        result = math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {_shown(value)}, expected a number") from None
    if not (math.isfinite(result) and low <= result <= high and (result > low or not above)):
        bounds = f"more than {low:g}" if above else "" if low == -math.inf else f"at least {low:g}"
        if high != math.inf:
            bounds = f"{bounds} and at most {high:g}" if bounds else f"at most {high:g}"
        raise ValueError(
            f"{name}: got {_shown(value)}, expected a finite number{' of ' * bool(bounds)}{bounds};"
            " change it"
        )
    return result


def rows(
    name: str, values: Any, *, count: int | None = None, device: torch.device | None = None
) -> None:
    """Check a tensor of one int64 number per row.

    Args:
        name: Argument that the error names.
        values: Tensor to check.
        count: Expected number of rows; None: any.
        device: Expected device; None: any.

    Raises:
        TypeError: `values` is not a tensor.
        ValueError: Its shape, dtype or device differs.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: got {type(values).__name__}, expected a tensor")
    is_wrong = values.ndim != 1 or values.dtype != torch.int64
    if is_wrong or count not in (None, len(values)) or device not in (None, values.device):
        where = "" if device is None else f" on {device}"
        raise ValueError(
            f"{name}: got {tuple(values.shape)} {values.dtype} on {values.device}, expected "
            f"({'n' if count is None else count},) torch.int64{where}; give one for each image"
        )


def within(name: str, values: Tensor, *, low: int, high: int) -> None:
    """Check numbers that the host has; tensors on other devices are not read.

    Raises:
        ValueError: A number is outside [low, high].
    """
    if type(values) is not Tensor or not values.is_cpu or torch.compiler.is_compiling():
        return
    if len(values) == 0:
        return
    numbers = numpy.from_dlpack(values)  # only memory of the host can be read in this way
    # One pass in the common case: negative numbers are large ones without a sign.
    if low == 0 and numbers.view(numpy.uint64).max() <= high:
        return
    least, most = int(numbers.min()), int(numbers.max())
    if least < low or most > high:
        raise ValueError(
            f"{name}: got {least if least < low else most}, expected {low} to {high}; correct them"
        )


def image_shape(shape: Any, *, name: str = "image_shape") -> tuple[int, int, int]:
    """Return (c, H, W) with 1 or more of each.

    Raises:
        TypeError, ValueError: It is not three such numbers.
    """
    if not isinstance(shape, tuple | list | torch.Size) or len(shape) != 3:
        raise ValueError(f"{name}: got {_shown(shape)}, expected (channels, height, width)")
    channels, height, width = (whole(name, side, low=1, high=2**20) for side in shape)
    return channels, height, width


def _shown(value: Any) -> str:
    """A short form of any value."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python limits the digits of an integer that it prints.
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 60 else f"{text[:57]}..."
