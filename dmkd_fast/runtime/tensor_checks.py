"""Check tensors of numbers from callers, with one-line errors that name the argument."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from dmkd_fast.runtime.errors import invalid


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
        what = f"{tuple(values.shape)} {values.dtype} on {values.device}"
        expected = f"({'n' if count is None else count},) torch.int64"
        expected += "" if device is None else f" on {device}"
        raise invalid(name, what, expected, "give one number for each image")


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
        raise invalid(name, least if least < low else most, f"{low} to {high}")
