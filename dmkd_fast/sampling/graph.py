"""Run a function of fixed shapes with few launches: a compiled copy, and a CUDA graph."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dmkd_fast.runtime.cuda_graph import capture, new_stream


def compiled(function: Any, **options: Any) -> Any:
    """Compile a copy of `function` that has its own code object.

    torch.compile stores its graphs by code object and stops compiling after eight of them, so
    several samplers that share a code object would exceed this limit.

    Args:
        function: Function without a closure.
        options: Further arguments of torch.compile.
    """
    copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(copy, fullgraph=True, dynamic=False, **options)


def compiled_for(module: nn.Module, function: Any, key: Hashable) -> Any:
    """Return a compiled copy of a function of a module, the same one for the same key.

    The phases of a run sample from one module, so each kind of step is compiled once for all.

    Args:
        module: Module that the function calls.
        function: Function without a closure.
        key: What else the graphs depend on, shapes included.
    """
    copies = _COPIES.setdefault(module, {})
    if (function, key) not in copies:
        copies[function, key] = compiled(function)
    return copies[function, key]


_COPIES: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()


class CudaGraph:
    """A function of ids and labels as a CUDA graph: two small copies, then one launch.

    Args:
        make: Function of ids and labels, (B,) int64 each, that never waits for the device.
        ids, labels: Inputs of the warm-up runs; later inputs have the same shape.
        memory: Memory of other graphs that never run at the same time as this one: a pool, as
            `torch.cuda.graph_pool_handle` makes it, and the stream of all captures into it, since
            memory of one stream is not given to another; None: memory of its own.
    """

    def __init__(
        self,
        make: Callable[[Tensor, Tensor], Tensor],
        ids: Tensor,
        labels: Tensor,
        *,
        memory: tuple[Any, torch.cuda.Stream] | None = None,
    ) -> None:
        self._ids, self._labels = ids.clone(), labels.clone()
        # Not the stream of the warm-up runs: what cuBLAS keeps for a stream would lie outside of
        # the pool, and graphs of torch.compile free that while this one still writes there.
        pool, stream = memory or (None, torch.cuda.Stream(ids.device))
        with new_stream(ids.device):
            # Compilation and lazy initialization must be done before the capture.
            for _ in range(2):
                make(self._ids, self._labels)
            self._graph = torch.cuda.CUDAGraph()
            with capture(self._graph, stream, pool):
                self._images = make(self._ids, self._labels)

    def __call__(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Replay the graph; the next call overwrites the result."""
        self._ids.copy_(ids)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._images
