"""Make random calls of every C++ operator, with right and with wrong arguments.

Results are compared with the eager definitions. `tests/hard/test_operators.py` runs this script in
a Python whose operators are built with sanitizers. Tensors end exactly where their memory ends.
They have any strides that a view of a tensor can have, and an offset of up to three elements.

    python run_operator_calls.py CALLS LARGE SEED PROGRESS   ->   a line of JSON per operator
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from draws import BF16, F16, F32, F64, MOST, Draw
from operator_calls import OPERATORS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MOST_LARGE = 2**19
# One call in eight is compared with the eager definition, another one has a wrong argument.
COMPARED, WRONG = 8, 8


class Recorder(TorchDispatchMode):
    """Records the calls of the package's operators with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dmkd_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def wrong(draw: Draw, value: Any) -> Any:
    """Return a value that the operator does not expect for this argument."""
    if not isinstance(value, Tensor):
        if value is None:
            return torch.randn(draw.randint(0, 5))
        if isinstance(value, float):
            return draw.choice((float("nan"), float("inf"), -1.0, 0.0, 1e300))
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        return draw.choice((-1, 0, 1, value + 1, value - 1, 2**40, -(2**40), 2**63 - 1, -(2**63)))
    kinds = [
        lambda x: x.to(
            draw.choice((F32, F64, F16, BF16, torch.int64, torch.int32, torch.uint8, torch.bool))
        ),
        lambda x: x.unsqueeze(draw.randint(0, x.ndim)),
        lambda x: x.new_empty(0),
        lambda x: x.new_zeros(()),
        lambda x: None,
        lambda x: draw.place(x.clone()),
    ]
    if value.ndim:
        axis = draw.randrange(value.ndim)
        length = value.shape[axis]
        kinds += [
            lambda x: x.narrow(axis, 0, max(0, length - 1)).clone(),
            lambda x: x.new_zeros([n + (i == axis) for i, n in enumerate(x.shape)]),
            lambda x: x.flatten(),
            lambda x: x.transpose(axis, 0),
            lambda x: x[..., :1].expand(x.shape) if x.numel() else x,
        ]
    if value.dtype in (torch.int64, torch.int32):
        kinds.append(lambda x: torch.full_like(x, draw.choice((-1, 2**31 - 1, 1000))))
    return draw.choice(kinds)(value)


def call_wrongly(draw: Draw, run: Callable[[], Any]) -> None:
    """Repeat each operator call of `run` with one wrong argument; any exception is fine."""
    recorder = Recorder()
    with recorder:
        run()
    for operator, arguments in recorder.calls:
        changed = list(arguments)
        place = draw.randrange(len(changed))
        changed[place] = wrong(draw, changed[place])
        with contextlib.suppress(Exception):
            operator(*changed)


def main(calls: str, large: str, seed: str, progress: str) -> None:
    """Make all calls; the file `progress` names the current one, to report a crash."""
    file = os.open(progress, os.O_WRONLY | os.O_CREAT)
    for name, make in OPERATORS.items():
        start, failures = time.monotonic(), []
        for case in range(int(calls) + int(large)):
            key = f"{name} {seed} {case}"
            os.pwrite(file, key.ljust(60).encode(), 0)
            draw = Draw(key)
            draw.room = MOST if case < int(calls) else MOST_LARGE
            torch.default_generator.manual_seed(case)
            run, compare = make(draw)
            try:
                if case % WRONG == 1:
                    call_wrongly(draw, run)
                    continue
                got = run()
                if case % COMPARED == 0:
                    compare(got)
            except Exception as error:
                failures.append(f"{key}: {type(error).__name__}: {error}"[:300])
        seconds = round(time.monotonic() - start, 1)
        print(
            json.dumps(
                {
                    "operator": name,
                    "cases": case + 1,
                    "failures": len(failures),
                    "first": failures[:5],
                    "seconds": seconds,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
