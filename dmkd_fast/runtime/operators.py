"""What the package's operators share: a warning on first use, checks of memory, a Triton launch."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

_said: set[str] = set()


def warn_once(what: str, text: str) -> None:
    """Warn the first time that `what` happens; tracing says nothing."""
    if what not in _said and not torch.compiler.is_compiling():
        _said.add(what)
        warnings.warn(text, stacklevel=5)


def check_own_memory(out: Tensor, inputs: dict[str, Tensor | None]) -> None:
    """Refuse an `out` whose memory lies among that of an input: it would be read after writing."""
    if type(out) is not Tensor or torch.compiler.is_compiling():  # fake tensors have no memory
        return
    begin, end = _memory(out)
    for name, tensor in inputs.items():
        if tensor is not None:
            first, last = _memory(tensor)
            if begin < last and first < end:
                raise ValueError(f"out: shares memory with {name}, expected a tensor of its own")


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Address of the first element and the one after the last."""
    start = tensor.data_ptr()
    if start == 0 or tensor.is_contiguous():
        return start, start + tensor.nbytes * (start != 0)
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return start, start + (1 + sum((n - 1) * step for n, step in steps)) * tensor.element_size()


class Launch(NamedTuple):
    """One kernel launch: positional arguments, compile-time constants, grid, warps."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    grid: tuple[int, ...]
    num_warps: int

    @property
    def options(self) -> dict[str, Any]:
        """For the compiler. Left to itself, ptxas spills a few bytes to fit in one more program."""
        registers = 128 if self.num_warps == 16 else 255
        # Fusion off: q - p must be 0 where q equals p.
        return {"num_warps": self.num_warps, "maxnreg": registers, "enable_fp_fusion": False}

    def run(self) -> None:
        """Queue it on the current stream."""
        with torch.cuda.device_of(self.arguments[0]):
            self.kernel[self.grid](*self.arguments, **self.constants, **self.options)
