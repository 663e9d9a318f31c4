"""Stand-in for CUDA graphs: records operators, and refuses what a capture refuses (`fake_cuda.py`).

While a graph is recorded, host reads, copies from or to the host, tensors made from host values or
on the host, generators that the graph does not know, and calls that wait for the device or ask it
are errors, on every thread. A graph does not keep alive what it reads: replay is an error once the
memory of such a tensor is gone.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")
Generator = torch.Generator  # which the rehearsal replaces
LIFT = torch.ops.aten.lift_fresh.default
# Methods that read values, before any operator runs.
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "nonzero")
FROM_HOST = ("tensor", "as_tensor", "asarray", "from_numpy", "frombuffer", "new_tensor")
FACTORIES = ("empty", "empty_strided", "zeros", "ones", "full", "arange", "linspace", "eye")
DRAWS = ("rand", "randn", "randint", "randperm")


class CaptureError(RuntimeError):
    """A capture does not permit an operation, or a graph reads memory that is gone."""


class Capture:
    """What is recorded now; operations that capture does not permit ask here.

    Attributes:
        graph: The graph that is being recorded, or None.
    """

    def __init__(self) -> None:
        self.graph: Graph | None = None
        self._host: dict[int, StorageWeakRef] = {}

    def forbid(self, what: str) -> None:
        """Raise an error if a graph is being recorded."""
        if self.graph is not None:
            raise CaptureError(f"operation not permitted when stream is capturing: {what}")

    def check_call(self, name: str, args: Any, kwargs: dict[str, Any], *, is_method: bool) -> None:
        """Refuse calls of torch that read the host or write to it.

        Args:
            name: Name of the function or method.
            args, kwargs: Its arguments, with the devices that the caller named.
            is_method: Whether it is a method of Tensor.
        """
        if self.graph is None:
            return
        if is_method and name in READS:
            self.forbid(f"the host reads a tensor ({name})")
        if name in FROM_HOST:
            self.forbid(f"a tensor made from host values ({name})")
        if name in (*FACTORIES, *DRAWS) and not is_method and is_host(kwargs.get("device") or CPU):
            self.forbid(f"a tensor made on the host ({name})")
        if is_method and name == "to" and any(map(is_host, [*args, *kwargs.values()])):
            self.forbid("a copy to the host")

    def mark_host(self, tensor: Tensor) -> None:
        """Note that the memory of a tensor is the host's."""
        ref = StorageWeakRef(tensor.untyped_storage())
        self._host = {k: v for k, v in self._host.items() if not v.expired()}
        self._host[ref.cdata] = ref

    def is_marked(self, tensor: Tensor) -> bool:
        """Return whether the memory of a tensor was marked."""
        return tensor.untyped_storage()._cdata in self._host


class _Kept:
    """A tensor whose memory belongs to others, who may free it."""

    def __init__(self, tensor: Tensor) -> None:
        self._memory = StorageWeakRef(tensor.untyped_storage())
        self._view = tensor.storage_offset(), tensor.shape, tensor.stride()
        self._dtype = tensor.dtype

    def tensor(self) -> Tensor:
        """Return the tensor; an error if its memory is gone."""
        storage: Any = torch.UntypedStorage
        memory = storage._new_with_weak_ptr(self._memory.cdata)
        if memory is None:
            what = f"{tuple(self._view[1])} {self._dtype}"
            raise CaptureError(f"replay: the graph reads a tensor that nobody kept alive: {what}")
        return torch.empty(0, dtype=self._dtype).set_(memory, *self._view)


class _Call:
    """An operator, its frozen arguments, and its frozen results of the capture."""

    def __init__(self, func: Any, args: Any, kwargs: Any, results: Any) -> None:
        self._func, self._args, self._kwargs = func, args, kwargs
        self._results = tree_leaves(results)
        leaves = [*tree_leaves((args, kwargs)), *self._results]
        self._is_own = not any(isinstance(leaf, _Kept) for leaf in leaves)

    def replay(self) -> None:
        """Run the operator, and write into the results that do not share memory with the new."""
        args, kwargs, results = self._args, self._kwargs, self._results
        if not self._is_own:  # Most are, and a replay of all calls must be fast.
            args, kwargs, results = _thawed((args, kwargs, results))
        made = self._func(*args, **kwargs)
        news = [made] if isinstance(made, Tensor) else tree_leaves(made)
        for old, new in zip(results, news, strict=True):
            if isinstance(old, Tensor) and _memory(old) != _memory(new):
                old.copy_(new)


class Graph:
    """Stand-in for `torch.cuda.CUDAGraph`: a list of operators in the order of their capture."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._calls: list[_Call] = []
        self._own: set[int] = set()
        self._generators: dict[int, torch.Generator] = {}

    def register_generator_state(self, generator: torch.Generator) -> None:
        """Let the graph draw from a generator."""
        self._generators[_address(generator)] = generator

    def replay(self) -> None:
        """Run the operators again, and write their results into the tensors of the capture."""
        # Devices are those that compute, so nothing is left for the rehearsal to replace.
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for call in self._calls:
                call.replay()

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator and note it."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Generator) and _address(value) not in self._generators:
                raise CaptureError("operation not permitted: a generator that is not registered")
        if func is LIFT:  # a number of the host becomes an argument of the kernel
            self._own |= _memories(args)
        frozen = self._frozen(args), self._frozen(kwargs)
        theirs = _memories((args, kwargs)) - self._own
        made = func(*args, **kwargs)
        self._own |= _memories(made) - theirs
        self._calls.append(_Call(func, *frozen, self._frozen(made)))
        return made

    def _frozen(self, values: Any) -> Any:
        """Replace tensors that the graph did not make by weak references."""
        return tree_map_only(Tensor, lambda t: t if _memory(t) in self._own else _Kept(t), values)


class Recorder(TorchDispatchMode):
    """Context that records a graph; as `torch.cuda.graph`."""

    def __init__(self, graph: Graph, capture: Capture) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph, self._capture = graph, capture

    def __enter__(self) -> Recorder:
        self._capture.forbid("a second capture")
        self._capture.graph = self._graph
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._capture.graph = None
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags:
            self._capture.forbid(f"{func}: the host reads a value")
        if func is LIFT and args[0].ndim:  # a number needs no copy
            self._capture.forbid("a tensor made from host values")
        if torch.Tag.dynamic_output_shape in func.tags and _depends_on_values(func, args):
            self._capture.forbid(f"{func}: the host reads the shape of the result")
        tree_map_only(Tensor, self._check_place, (args, kwargs))
        return self._graph.record(func, args, kwargs)

    def _check_place(self, tensor: Tensor) -> Tensor:
        if self._capture.is_marked(tensor):
            self._capture.forbid("a copy from or to the host")
        return tensor


def is_host(value: Any) -> bool:
    """Return whether a value names the CPU."""
    return (isinstance(value, torch.device) and value.type == "cpu") or value == "cpu"


def _depends_on_values(func: Any, args: Any) -> bool:
    """Return whether an operator reads values to find the shape; indexing does for masks alone."""
    if func is not torch.ops.aten.index.Tensor:
        return True
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _address(generator: Any) -> int:
    return int(generator._cdata)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _memories(values: Any) -> set[int]:
    found: set[int] = set()
    tree_map_only(Tensor, lambda t: found.add(_memory(t)), values)
    return found


def _thawed(values: Any) -> Any:
    return tree_map_only(_Kept, lambda kept: kept.tensor(), values)
