"""Run a function that changes tensors in place as a CUDA graph: small copies, then one launch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from dmkd_fast.runtime.errors import one_line


class CaptureError(RuntimeError):
    """Error for a function that cannot run as a CUDA graph."""


@contextmanager
def new_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Run the work inside on a new stream of a device, which need not be the current one.

    The work comes after what is queued on the device's current stream, and before what follows.
    """
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield stream
    finally:
        current.wait_stream(stream)


@contextmanager
def capture(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None
) -> Iterator[None]:
    """Capture the work inside as a CUDA graph.

    Args:
        graph: Graph without content.
        stream: Stream for the capture, on the current device.
        pool: Memory pool, as `torch.cuda.graph_pool_handle` makes it; None: a new one.
    """
    # Cycles of references may hold memory, and graphs whose end would break the capture.
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        # Threads of other libraries may use the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    finally:
        if was_enabled:
            gc.enable()


class CapturedFunction:
    """A function of tensors of fixed shapes as a CUDA graph.

    The function is called three times here, and the last call is captured. The caller sees to it
    that these calls have no effect.

    Args:
        function: Function of a tree of tensors (tuples, dictionaries) that returns a tensor. What
            else it reads must stay at its place in memory.
        inputs: Tensors of the first calls; later inputs have the same shapes and dtypes.

    Raises:
        CaptureError: The function waits for the device, or does what a graph cannot do.
    """

    def __init__(self, function: Callable[[Any], Tensor], inputs: Any) -> None:
        self._inputs = tree_map_only(Tensor, Tensor.clone, inputs)
        device = next(x.device for x in tree_leaves(inputs) if isinstance(x, Tensor))
        with new_stream(device) as stream:
            self._graph = torch.cuda.CUDAGraph()
            # Compilation and lazy initialization must be done before the capture.
            function(self._inputs)
            self._capture(function, stream)

    def __call__(self, inputs: Any) -> Tensor:
        """Replay the graph on a stream of launches, without waiting for the device."""
        for mine, given in zip(tree_leaves(self._inputs), tree_leaves(inputs), strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(given)
        self._graph.replay()
        return self._output.clone()  # The next replay overwrites the output.

    def _capture(self, function: Callable[[Any], Tensor], stream: torch.cuda.Stream) -> None:
        before = torch.cuda.get_sync_debug_mode()
        try:
            # A wait during the capture itself would leave the stream in a broken state.
            torch.cuda.set_sync_debug_mode("error")
            try:
                function(self._inputs)
            finally:
                torch.cuda.set_sync_debug_mode(before)
            with capture(self._graph, stream):
                self._output = function(self._inputs)
        except RuntimeError as error:
            raise CaptureError(one_line(error, most=120)) from error
