"""Rehearse GPU programs without a GPU, with a CPU-backed stand-in for torch.cuda.

    python -m benchmarks.fake_cuda -m pytest -m cuda
    python -m benchmarks.fake_cuda -m benchmarks imagenet --tiny

Every tensor says that it lies on cuda:0 and is computed on the CPU; streams and events are names;
a captured graph is the list of its operators, which replay runs again into the same memory; where
waiting for the device is an error, reading a value is one. Calls of torch.cuda are held to the
signatures of the real ones. So each line of a GPU program runs, with the CPU's kernels. What it
proves nothing about: CUDA kernels, the order of streams, speed.
"""

from __future__ import annotations

import contextlib
import inspect
import runpy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # looks at the real torch.cuda when imported
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAME = "no GPU: rehearsal"
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
_IS_ON_CUDA: dict[Any, Any] = {
    Tensor.device.__get__: CUDA,
    Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
}
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "nonzero")


def main(argv: list[str]) -> None:
    """Run a module with its arguments as if there were a GPU."""
    if argv[:1] != ["-m"] or len(argv) < 2:
        raise SystemExit("usage: python -m benchmarks.fake_cuda -m MODULE ...")
    sys.argv = argv[1:]
    with pretended():
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """There is a GPU inside."""
    with contextlib.ExitStack() as stack:
        mode = _Cuda()
        for name, answer in _answers(mode).items():
            checked = _with_signature_of(getattr(torch.cuda, name), answer)
            stack.enter_context(mock.patch.object(torch.cuda, name, checked))
        for name, kind in (("Stream", _Stream), ("Event", _Event), ("CUDAGraph", _Graph)):
            stack.enter_context(mock.patch.object(torch.cuda, name, kind))
        for name in ("stream", "device"):
            stack.enter_context(mock.patch.object(torch.cuda, name, contextlib.nullcontext))
        stack.enter_context(mock.patch.object(torch.cuda, "graph", _capture))
        stack.enter_context(
            mock.patch.object(torch.accelerator, "current_accelerator", return_value=None)
        )
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        ignored = _with_signature_of(lambda self, stream: None, lambda **_: None)
        stack.enter_context(mock.patch.object(Tensor, "record_stream", ignored))
        # Compiled code would be the CPU's: nothing of a GPU's to be seen there.
        same = _with_signature_of(torch.compile, lambda model=None, **_: model)
        stack.enter_context(mock.patch.object(torch, "compile", same))
        stack.enter_context(mode)
        yield


class _Cuda(TorchFunctionMode):
    """Replace cuda by cpu in every call, and cpu by cuda in every answer."""

    def __init__(self) -> None:
        super().__init__()
        self.waits_are_errors = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "pin_memory"}
        name = getattr(func, "__name__", "")
        if func is torch.device:
            return func(*args, **kwargs)
        if func in _IS_ON_CUDA:
            # Networks are described on the meta device, which stays what it is.
            return func(*args) if args[0].is_meta else _IS_ON_CUDA[func]
        kwargs = {k: _real(v) for k, v in kwargs.items()}
        if self.waits_are_errors:
            from_host = name in ("tensor", "as_tensor") and kwargs.get("device") is CPU
            if from_host or (name in READS and getattr(Tensor, name, None) is func):
                raise RuntimeError(f"called a synchronizing operation: {name}")
        if name == "cuda":
            return args[0]
        if name == "pin_memory":
            return args[0]
        if name == "cpu":
            return args[0].clone()
        return func(*(_real(a) for a in args), **kwargs)


class _Graph:
    """Stand-in for a CUDA graph: a list of operators in the order of their capture."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        """Run the operators again, and write their results into the tensors of the capture."""
        with torch.no_grad():  # Those of a backward pass are among them.
            for func, args, kwargs, before in self.calls:
                now = func(*args, **kwargs)
                for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
                    if isinstance(old, Tensor) and _memory(old) != _memory(new):
                        old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: _Graph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        self.graph.calls.append((func, args, kwargs, made))
        return made


def _capture(
    cuda_graph: _Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
) -> _Recorder:
    return _Recorder(cuda_graph)


class _Generator(torch.Generator):
    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls)

    def __init__(self, device: Any = None) -> None:
        pass


class _Stream:
    cuda_stream = 0

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        pass

    def wait_stream(self, stream: _Stream) -> None:
        pass

    def wait_event(self, event: _Event) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None:
        pass


class _Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.has_time = enable_timing

    def record(self, stream: _Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: _Event) -> float:
        assert self.has_time and end_event.has_time
        return 1.0


def _answers(mode: _Cuda) -> dict[str, Callable[..., Any]]:
    """Functions of torch.cuda."""

    def sync_debug(debug_mode: int | str) -> None:
        mode.waits_are_errors = debug_mode in ("error", 2)

    constants: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": NAME,
        "get_device_capability": (8, 0),
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 2**20,
        "max_memory_allocated": 2**21,
        "memory_reserved": 2**22,
        "current_stream": _Stream(),
        "mem_get_info": (2**34, 2**35),
        "memory_stats": defaultdict(int),
        "is_current_stream_capturing": False,
        "graph_pool_handle": (0, 1),

        "get_device_properties": SimpleNamespace(
            major=8, minor=0, total_memory=2**35, L2_cache_size=2**25
        ),
    }
    return {name: lambda value=value, **_: value for name, value in constants.items()} | {
        "set_sync_debug_mode": sync_debug,
        "get_sync_debug_mode": lambda: 2 * mode.waits_are_errors,
        "get_rng_state": lambda **_: torch.get_rng_state(),
        "set_rng_state": lambda new_state, **_: torch.set_rng_state(new_state),
    }


def _with_signature_of(real: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    """`answer`, called by name; a TypeError where the real one would not take the arguments."""
    signature = inspect.signature(real)

    def call(*args: Any, **kwargs: Any) -> Any:
        return answer(**signature.bind(*args, **kwargs).arguments)

    return call


def _real(value: Any) -> Any:
    """The device that computes."""
    is_cuda = isinstance(value, str | torch.device) and str(value).split(":")[0] == "cuda"
    return CPU if is_cuda else value


def _memory(tensor: Tensor) -> tuple[Any, Any]:
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset()


if __name__ == "__main__":
    main(sys.argv[1:])
