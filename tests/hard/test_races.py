"""Operators on several threads: the same bits as on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import operator_calls
import pytest
import torch
from draws import Draw
from torch import Tensor

pytestmark = pytest.mark.hard
THREADS = (1, 2, 7)


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bits(result: Any) -> list[Tensor]:
    """Copies of the results as integers, so that NaN equals itself."""
    tensors = result if isinstance(result, tuple) else (result,)
    dense = (torch.empty(x.numel(), dtype=x.dtype).copy_(x.detach().flatten()) for x in tensors)
    return [x.view(torch.uint8) for x in dense]


@pytest.mark.parametrize("name", list(operator_calls.OPERATORS))
def test_threads_change_no_bit(
    name: str, num_cases: Callable[[int, int], int], record_property: Callable[[str, object], None]
) -> None:
    cases, failures = num_cases(1000, 100), []
    for case in range(cases):
        draw = Draw(f"{name} races {case}")
        draw.room, draw.fills_room = 2**17, True
        torch.manual_seed(case)
        run, _ = operator_calls.OPERATORS[name](draw)
        results = []
        for threads in THREADS:
            torch.set_num_threads(threads)
            results.append(bits(run()))
        others = (all(map(torch.equal, result, results[0])) for result in results[1:])
        failures += [case for is_equal in others if not is_equal]
    record_property("claim", f"operators: equal bits at {THREADS} threads")
    record_property("cases", cases)
    record_property("failures", len(failures))
    assert not failures, f"{name}: cases {failures[:10]} of `Draw('{name} races CASE')`"
