"""Helpers shared by the package's operators: choice of kernels, memory checks, Triton launches."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmkd_fast.runtime import native
from dmkd_fast.runtime.errors import UserError, one_line, warn_once


def cuda_kernel(module: str, name: str, eager: Callable[..., Any]) -> Callable[..., Any]:
    """Return the CUDA implementation of an operator, whose module is imported on first use.

    The eager definition runs where Triton is missing or cannot launch kernels, and for float64,
    which only checks use.

    Args:
        module: Full name of the module with the Triton implementation.
        name: Name of the implementation in the module.
        eager: Eager definition of the operator.
    """

    def run(*arguments: Any) -> Any:
        if any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in arguments):
            return eager(*arguments)
        try:
            kernels = importlib.import_module(module)
            reason = _why_no_launch()
        except ImportError as error:
            reason = str(error)
        if reason:
            warn_once(
                f"dmkd_fast has no CUDA kernels ({reason}), so {module.split('.')[1]} operators "
                "run their eager definitions, several times slower; install triton, a C compiler "
                "and the header files of Python"
            )
            return eager(*arguments)
        return getattr(kernels, name)(*arguments)

    return run


@functools.cache
def _why_no_launch() -> str:
    """Return why Triton cannot launch kernels in this process; empty if it can.

    For its first launch, Triton builds a C module, unless its cache has one.
    """
    try:
        driver: Any = importlib.import_module("triton.runtime").driver
        driver.active.get_current_target()
    except Exception as error:  # no compiler, no Python.h, no driver: each is another error
        return one_line(error)
    return ""


def warn_if_eager(tensor: Tensor) -> None:
    """Log once that an operator runs its eager definition on the CPU for lack of the extension."""
    if tensor.device.type == "cpu" and native.INSTRUCTION_SET == "none":
        warn_once(
            f"dmkd_fast has no compiled CPU kernels ({native.WHY_MISSING}), so its operators run "
            "their eager definitions, several times slower; install it again where there is a C++ "
            "compiler, which torch.compile on a CPU needs too"
        )


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
        cuda: Any = torch.cuda  # its functions have no static types
        with cuda.device_of(self.arguments[0]):
            self.kernel[self.grid](*self.arguments, **self.constants, **self.options)
