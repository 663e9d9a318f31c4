"""Compile Triton kernels as the launcher does for sm_90, and launch them in the PTX emulator.

    monkeypatch.setattr(triton_tile, "tile", EmulatedKernel(triton_tile.tile))
    triton_launch.forward(*problem, False)  # CPU tensors; what a GPU would run runs in NumPy

Triton's own launcher decides what becomes a constant and which pointers and numbers are multiples
of 16; only the device and the launch itself are replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ptx_emulator
from ptx_program import Program, parse
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

TARGET = GPUTarget("cuda", 90, 32)
# The name of the device keeps what is compiled here apart from what a real GPU compiles.
DRIVER = SimpleNamespace(
    get_current_device=lambda: "emulated",
    get_current_stream=lambda device: 0,
    get_current_target=lambda: TARGET,
)


class EmulatedKernel:
    """Stand-in for a Triton kernel that runs its PTX on CPU tensors.

    Args:
        kernel: The kernel.
        change: Function that changes the program, to see whether a test notices.
        backwards: Whether the last block of a launch runs first.

    Attributes:
        programs: The programs launched so far.
    """

    def __init__(
        self,
        kernel: Any,
        change: Callable[[Program], Program] = lambda program: program,
        *,
        backwards: bool = False,
    ) -> None:
        self._kernel, self._change, self._backwards = kernel, change, backwards
        self.arg_names = kernel.arg_names
        self.programs: list[Program] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **named: self._launch(grid, arguments, named)

    def _launch(self, grid: tuple[int, ...], arguments: tuple, named: dict[str, Any]) -> None:
        with mock.patch.object(driver, "_active", DRIVER):
            compiled = self._kernel.run(*arguments, grid=grid, warmup=True, **named)
        types = compiled.src.signature
        passed = [
            value
            for name, value in zip(self.arg_names, arguments, strict=False)
            if types[name] != "constexpr"
        ]
        self.programs.append(self._change(parse(compiled.asm["ptx"])))
        ptx_emulator.run(
            self.programs[-1], grid, passed, compiled.metadata.shared, backwards=self._backwards
        )
