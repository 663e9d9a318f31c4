"""Check numbers from callers, with one-line errors that name the argument.

This module imports neither torch nor numpy; `tensor_checks` checks tensors.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any

from dmkd_fast.runtime.errors import invalid

MAX_SEED = 2**63 - 1


def whole(name: str, value: Any, *, low: int = 0, high: int = 2**31 - 1) -> int:
    """Return `value` as an integer in [low, high].

    Raises:
        TypeError: `value` is not an integer, or is a bool or a tensor.
        UserError: `value` is out of range.
    """
    try:
        if isinstance(value, bool) or _is_tensor(value):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {_shown(value)}, expected a whole number") from None
    if not low <= number <= high:
        raise invalid(name, _shown(value), f"{low} to {high}")
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
        if isinstance(value, bool | str | bytes) or _is_tensor(value):
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
        raise invalid(name, _shown(value), f"a finite number{' of ' * bool(bounds)}{bounds}")
    return result


def fractions(name: str, values: Any) -> tuple[float, float]:
    """Return a part of a whole as its (start, stop), with 0 <= start < stop <= 1.

    Raises:
        TypeError, UserError: `values` is not two such numbers.
    """
    if not isinstance(values, tuple | list) or len(values) != 2:
        raise invalid(name, repr(values)[:60], "two numbers")
    start, stop = (number(name, end) for end in values)
    if not 0 <= start < stop <= 1:
        raise invalid(name, f"({start}, {stop})", "0 <= start < stop <= 1", "change it")
    return start, stop


def image_shape(shape: Any, *, name: str = "image_shape") -> tuple[int, int, int]:
    """Return an image shape as (c, H, W), each 1 or more.

    Raises:
        TypeError, UserError: `shape` is not three such numbers.
    """
    if not isinstance(shape, tuple | list) or len(shape) != 3:
        raise invalid(name, _shown(shape), "(channels, height, width)")
    channels, height, width = (whole(name, side, low=1, high=2**20) for side in shape)
    return channels, height, width


def check_accumulate(accumulate: int, *, batch_size: int) -> None:
    """Refuse a number of micro-batches that does not divide the batch size."""
    if accumulate < 1 or batch_size % accumulate:
        expected = f"a divisor of batch_size={batch_size}"
        raise invalid("accumulate", accumulate, expected, "change one of the two")


def check_milestones(milestones: Sequence[float], *, warmup: float) -> None:
    """Refuse milestones that are not in (0, 1), do not rise, or come before the warm-up ends.

    Args:
        milestones: Values of the progress, from 0 (start) to 1 (end of the run).
        warmup: Progress at which the warm-up of the learning rate ends.
    """
    points = [number("milestones", point) for point in milestones]
    if points != sorted(set(points)) or not all(0 < point < 1 for point in points):
        expected = "rising values of the progress between 0 and 1, as [0.3, 0.6, 0.9]"
        raise invalid("milestones", points, expected)
    if points and points[0] < warmup:
        expected = f"at least warmup={warmup}, because the learning rate still rises before"
        raise invalid("milestones", f"{points[0]} as the first", expected, "change one of the two")


def _is_tensor(value: Any) -> bool:
    """Return whether `value` is a tensor; there is none if torch has not been imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _shown(value: Any) -> str:
    """Return a short text for any value."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python refuses to print integers of too many digits
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 60 else f"{text[:57]}..."
