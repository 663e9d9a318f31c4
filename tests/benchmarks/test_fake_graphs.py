"""The stand-in for CUDA graphs refuses what a capture refuses, and notices memory that is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fake_cuda import pretended
from benchmarks.fake_graphs import CaptureError


@pytest.fixture(autouse=True)
def cuda() -> Iterator[None]:
    with pretended():
        yield


def captured(function: Callable[[], Any]) -> tuple[Any, Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = function()
    return graph, made


GENERATOR = torch.Generator()
REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 1),
    "branch": lambda x: x if x.sum() > 1 else -x,
    "tolist": Tensor.tolist,
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "to the CPU": lambda x: x.to("cpu"),
    "device by name": lambda x: x.to(device=torch.device("cpu")),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": torch.nonzero,
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: torch.masked_select(x, x > 0),
    "unique": lambda x: x.unique(),
    "from pinned memory": lambda x: x.copy_(PINNED["memory"], non_blocking=True),
    "to pinned memory": lambda x: PINNED["memory"].copy_(x, non_blocking=True),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device="cuda"),
    "as_tensor": lambda x: torch.as_tensor(3, device="cuda"),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "list of indices": lambda x: x[[0, 1]],
    "made on the host": lambda x: torch.zeros(3),
    "made on the CPU": lambda x: torch.arange(3, device="cpu"),
    "generator": lambda x: torch.rand(3, generator=GENERATOR, device="cuda"),
    "randperm": lambda x: torch.randperm(3, generator=GENERATOR, device="cuda"),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "event": lambda x: torch.cuda.Event().synchronize(),
    "event query": lambda x: torch.cuda.Event().query(),
    "elapsed time": lambda x: torch.cuda.Event().elapsed_time(torch.cuda.Event()),
    "stream": lambda x: torch.cuda.current_stream().synchronize(),
    "stream query": lambda x: torch.cuda.current_stream().query(),
    "random state": lambda x: torch.cuda.get_rng_state(),
    "second capture": lambda x: captured(lambda: x),
}
PINNED: dict[str, Tensor] = {}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_capture_refuses_is_an_error_inside_and_works_outside(name: str) -> None:
    x = torch.ones(3, device="cuda")
    PINNED["memory"] = torch.zeros(3, pin_memory=True)
    if name != "elapsed time":  # of events that were not recorded
        REFUSED[name](x)
    with pytest.raises(CaptureError):
        captured(lambda: REFUSED[name](x))
    assert not torch.cuda.is_current_stream_capturing()


def test_what_a_capture_permits_is_recorded() -> None:
    x, index = torch.ones(3, device="cuda"), torch.tensor([2, 0], device="cuda")
    generator = torch.Generator()

    def permitted() -> Tensor:
        assert torch.cuda.is_current_stream_capturing()
        y = torch.zeros(3, device="cuda") + torch.arange(3, device=x.device)
        y[0] = 5.0
        torch.cuda.current_stream().wait_event(torch.cuda.Event())
        noise = torch.rand(3, generator=generator, device="cuda")
        return torch.where(y > 1, y * x, 0.0)[index] + 0 * noise[:2] + torch.full_like(x[:2], 7)

    graph: Any = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        made = permitted()
    x.fill_(10)
    graph.replay()
    assert made.tolist() == [27.0, 57.0]


def test_replay_is_an_error_once_memory_that_the_graph_reads_is_gone() -> None:
    kept, lost = torch.ones(3, device="cuda"), torch.ones(3, device="cuda")
    views = {"lost": lost[1:]}
    graph, made = captured(lambda: (kept + 1)[1:] * views["lost"])
    lost.fill_(2)
    graph.replay()
    assert made.tolist() == [4.0, 4.0]
    del lost
    graph.replay()  # a view keeps the memory alive
    views.clear()
    with pytest.raises(CaptureError, match=r"nobody kept alive: \(2,\)"):
        graph.replay()


def test_a_graph_keeps_what_it_made_and_writes_in_place_to_what_it_was_given() -> None:
    count = torch.zeros((), device="cuda")

    def step() -> Tensor:
        made = torch.ones(2, device="cuda") * 3
        count.add_(1)
        return made.sum()

    graph, total = captured(step)
    for _ in range(3):
        graph.replay()
    assert int(count) == 4 and int(total) == 6  # the stand-in runs what it records
