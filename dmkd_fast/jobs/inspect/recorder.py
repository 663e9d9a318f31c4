"""Record which operators run, and which of them make the host wait for the device."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result the host reads, so that it waits for a device.
READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "_unique2")
_TORCH, _OWN = str(Path(torch.__file__).parent), str(Path(__file__).parents[2])


class Recorder(TorchDispatchMode):
    """Record the names of operators, and the places in the code from which values are read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.reads: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator, and record it."""
        del types
        name = func.overloadpacket.__name__
        self.names.add(name)
        if name in READS:
            path, line = _caller()
            # This package reads values on a CPU only to check them, and draws some on the host.
            if not str(path).startswith(_OWN):
                self.reads.append(f"{path.name}:{line}")
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_reads(device: torch.device) -> Iterator[list[str]]:
    """Return a list that receives the places from which the host reads device values inside.

    On CUDA, PyTorch itself reports each wait.
    """
    if device.type != "cuda":
        with Recorder() as recorder:
            yield recorder.reads
        return
    places: list[str] = []

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "synchroniz" in str(message):
            path, line = _caller()
            places.append(f"{path.name}:{line}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown: Callable[..., None] = warnings.showwarning
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = shown


def _caller() -> tuple[Path, int]:
    """Return file and line of the innermost frame outside of PyTorch and of this module."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        inside = frame.filename.startswith((_TORCH, "<")) or frame.filename == __file__
        if not inside and path.name != "warnings.py":
            return path, frame.lineno or 0
    return Path("unknown"), 0
