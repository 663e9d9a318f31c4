"""Plant faults in Triton kernels, to see that a test notices them."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptx_program import Program

Change = Callable[[Program], Program]
_numbers = itertools.count()


def without_barrier(number: int) -> Change:
    """Leave out one barrier of the PTX."""
    return lambda program: program.without(program.positions("bar")[number])


def mutated(module: Any, old: str, new: str, folder: Path) -> Any:
    """Import a copy of a module in which `new` takes the place of the first `old`.

    Args:
        module: Module with kernels.
        old, new: Text of its source.
        folder: Folder for the copy, which Triton reads.
    """
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert old in source, old
    name = f"mutant_{next(_numbers)}"
    path = folder / f"{name}.py"
    path.write_text(source.replace(old, new, 1), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
