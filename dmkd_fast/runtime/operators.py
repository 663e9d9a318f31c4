"""Helpers shared by the package's operators: one-time warnings, memory checks, Triton launches."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmkd_fast.runtime.errors import UserError

_said: set[str] = set()


def warn_once(what: str, text: str) -> None:
    """Warn the first time that `what` happens; never warns while torch.compile traces."""
    if what not in _said and not torch.compiler.is_compiling():
        _said.add(what)
        warnings.warn(text, stacklevel=5)


def check_own_memory(out: Tensor, inputs: dict[str, Tensor | None]) -> None:
    """Refuse an `out` that shares memory with an input, which would be overwritten while read."""
    if type(out) is not Tensor or torch.compiler.is_compiling():  # fake tensors have no memory
        return
    begin, end = _memory(out)
    for name, tensor in inputs.items():
        if tensor is not None:
            first, last = _memory(tensor)
            if begin < last and first < end:
                raise UserError(f"out: shares memory with {name}, expected a tensor of its own")


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Return the address of the first element and the address after the last one."""
    start = tensor.data_ptr()
    if start == 0 or tensor.is_contiguous():
        return start, start + tensor.nbytes * (start != 0)
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return start, start + (1 + sum((n - 1) * step for n, step in steps)) * tensor.element_size()


class Launch(NamedTuple):
    """A Triton kernel launch: kernel, arguments, compile-time constants, grid, warps."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    grid: tuple[int, ...]
    num_warps: int

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options of the launch."""
        # Without `maxnreg`, ptxas spills a few bytes of registers to fit in one more program.
        registers = 128 if self.num_warps == 16 else 255
        # Without fused multiply-add, so that q - p is 0 where q equals p.
        return {"num_warps": self.num_warps, "maxnreg": registers, "enable_fp_fusion": False}

    def run(self) -> None:
        """Queue the kernel on the current stream."""
        with torch.cuda.device_of(self.arguments[0]):
            self.kernel[self.grid](*self.arguments, **self.constants, **self.options)
