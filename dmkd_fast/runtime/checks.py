"""Check numbers and tensors from callers, with one-line errors that name the argument."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from dmkd_fast.runtime.errors import UserError

MAX_SEED = 2**63 - 1


def whole(name: str, value: Any, *, low: int = 0, high: int = 2**31 - 1) -> int:
    """Return `value` as an integer in [low, high].

    Raises:
        TypeError: `value` is not an integer, or is a bool or a tensor.
        UserError: `value` is out of range.
    """
    try:
        if isinstance(value, bool | Tensor):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {_shown(value)}, expected a whole number") from None
    if not low <= number <= high:
        raise UserError(f"{name}: got {_shown(value)}, expected {low} to {high}; change it")
    return number


def number(
    name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, above: bool = False
) -> float:
    """Return `value` as a finite float in [low, high], or in (low, high] if `above`.

    Raises:
        TypeError: `value` is not a number, or is a bool, a string or a tensor.
        UserError: `value` is not finite or is out of range.
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
        raise UserError(
            f"{name}: got {_shown(value)}, expected a finite number{' of ' * bool(bounds)}{bounds};"
            " change it"
        )
    return result


def rows(
    name: str, values: Any, *, count: int | None = None, device: torch.device | None = None
) -> None:
    """Check that a tensor holds one int64 number per row.

    Args:
        name: Name of the argument, for the error.
        values: Tensor to check.
        count: Expected number of rows; None allows any number.
        device: Expected device; None allows any device.

    Raises:
        TypeError: `values` is not a tensor.
        UserError: The shape, dtype or device of `values` is wrong.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: got {type(values).__name__}, expected a tensor")
    is_wrong = values.ndim != 1 or values.dtype != torch.int64
    if is_wrong or count not in (None, len(values)) or device not in (None, values.device):
        where = "" if device is None else f" on {device}"
        raise UserError(
            f"{name}: got {tuple(values.shape)} {values.dtype} on {values.device}, expected "
            f"({'n' if count is None else count},) torch.int64{where}; give one for each image"
        )


def within(name: str, values: Tensor, *, low: int, high: int) -> None:
    """Check the range of numbers on the CPU; tensors on other devices are not read.

    Raises:
        UserError: A number is outside [low, high].
    """
    if type(values) is not Tensor or not values.is_cpu or torch.compiler.is_compiling():
        return
    if len(values) == 0:
        return
    numbers = numpy.from_dlpack(values)  # works for host memory only
    # One pass in the common case: negative numbers are large ones without a sign.
    if low == 0 and numbers.view(numpy.uint64).max() <= high:
        return
    least, most = int(numbers.min()), int(numbers.max())
    if least < low or most > high:
        raise UserError(
            f"{name}: got {least if least < low else most}, expected {low} to {high}; correct them"
        )


def image_shape(shape: Any, *, name: str = "image_shape") -> tuple[int, int, int]:
    """Return an image shape as (c, H, W), each 1 or more.

    Raises:
        TypeError, UserError: `shape` is not three such numbers.
    """
    if not isinstance(shape, tuple | list | torch.Size) or len(shape) != 3:
        raise UserError(f"{name}: got {_shown(shape)}, expected (channels, height, width)")
    channels, height, width = (whole(name, side, low=1, high=2**20) for side in shape)
    return channels, height, width


def check_accumulate(accumulate: int, *, batch_size: int) -> None:
    """Refuse a number of micro-batches that does not divide the batch size."""
    if accumulate < 1 or batch_size % accumulate:
        raise UserError(
            f"accumulate: got {accumulate}, expected a divisor of batch_size={batch_size}; change "
            "one of the two"
        )


def check_milestones(milestones: Sequence[float], *, warmup: float) -> None:
    """Refuse milestones that are not in (0, 1), do not rise, or come before the warm-up ends.

    Args:
        milestones: Values of the progress, from 0 (start) to 1 (end of the run).
        warmup: Progress at which the warm-up of the learning rate ends.
    """
    points = [number("milestones", point) for point in milestones]
    if points != sorted(set(points)) or not all(0 < point < 1 for point in points):
        raise UserError(
            f"milestones: got {points}, expected rising shares of the run between 0 and 1, as "
            "[0.3, 0.6, 0.9]; correct the list"
        )
    if points and points[0] < warmup:
        raise UserError(
            f"milestones: got {points[0]} as the first, expected at least warmup={warmup}, as the "
            "rate still rises before; change one of the two"
        )


def _shown(value: Any) -> str:
    """Return a short text for any value."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python refuses to print integers of too many digits
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 60 else f"{text[:57]}..."
