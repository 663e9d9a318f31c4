"""Rehearse GPU programs without a GPU, with a CPU-backed stand-in for torch.cuda.

    python -m benchmarks.fake_cuda -m pytest -m cuda
    python -m benchmarks.fake_cuda -m benchmarks imagenet --tiny

Every tensor says that it lies on cuda:0 and is computed on the CPU; streams and events are names;
a captured graph is the list of its operators, which replay runs again into the same memory
(`fake_graphs.py`), and a capture refuses what CUDA refuses. Where waiting for the device is an
error, reading a value is one. Calls of torch.cuda are held to the signatures of the real ones. So
each line of a GPU program runs, with the CPU's kernels. What it proves nothing about: CUDA kernels,
the order of streams, speed.
"""

from __future__ import annotations

import contextlib
import inspect
import runpy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # looks at the real torch.cuda when imported
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from benchmarks.fake_graphs import CPU, READS, Capture, Graph, Recorder

NAME = "no GPU: rehearsal"
CUDA = torch.device("cuda", 0)
_IS_ON_CUDA: dict[Any, Any] = {
    Tensor.device.__get__: CUDA,
    Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
}


# Float16 has no instructions on most CPUs, where these would take 20 times as long in it.
PRODUCTS = {
    *("linear", "linear_gelu", "conv2d", "matmul", "__matmul__", "bmm", "baddbmm"),
    "scaled_dot_product_attention",
}


def main(argv: list[str]) -> None:
    """Run a module with its arguments as if there were a GPU."""
    if argv[:1] != ["-m"] or len(argv) < 2:
        raise SystemExit("usage: python -m benchmarks.fake_cuda -m MODULE ...")
    sys.argv = argv[1:]
    with pretended():
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)


def _on_cuda(group: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
    """A function that groups tensors by device; C++ names the device that computes."""

    def call(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        return {(CUDA, dtype): found for (_, dtype), found in group(*args, **kwargs).items()}

    return call


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """There is a GPU inside."""
    with contextlib.ExitStack() as stack:
        mode = _Cuda()
        for name, answer in _answers(mode).items():
            checked = _with_signature_of(getattr(torch.cuda, name), answer)
            stack.enter_context(mock.patch.object(torch.cuda, name, checked))
        for name, kind in (("Stream", _Stream), ("Event", _Event), ("CUDAGraph", Graph)):
            stack.enter_context(mock.patch.object(torch.cuda, name, kind))
        stack.enter_context(mock.patch.object(_Stream, "capture", mode.capture))
        for home in (Optimizer, clip_grad):
            group = "_group_tensors_by_device_and_dtype"
            stack.enter_context(mock.patch.object(home, group, _on_cuda(getattr(home, group))))
        stack.enter_context(mock.patch.object(_Event, "capture", mode.capture))
        for name in ("stream", "device"):
            stack.enter_context(mock.patch.object(torch.cuda, name, contextlib.nullcontext))
        stack.enter_context(mock.patch.object(torch.cuda, "graph", mode.recorder))
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
        self.capture = Capture()

    def recorder(
        self,
        cuda_graph: Graph,
        pool: Any = None,
        stream: Any = None,
        capture_error_mode: str = "global",
    ) -> Recorder:
        """Return the context that records a graph."""
        return Recorder(cuda_graph, self.capture)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        is_pinned = kwargs.pop("pin_memory", False)
        name = getattr(func, "__name__", "")
        if func is torch.device:
            return func(*args, **kwargs)
        if func in _IS_ON_CUDA:
            # Networks are described on the meta device, which stays what it is.
            return func(*args) if args[0].is_meta else _IS_ON_CUDA[func]
        is_method = getattr(Tensor, name, None) is func
        self.capture.check_call(name, args, kwargs, is_method=is_method)
        kwargs = {k: _real(v) for k, v in kwargs.items()}
        if self.waits_are_errors:
            from_host = name in ("tensor", "as_tensor") and kwargs.get("device") is CPU
            if from_host or (name in READS and is_method):
                raise RuntimeError(f"called a synchronizing operation: {name}")
        if name in ("pin_memory", "cuda"):
            return self._moved(args[0])
        if name == "cpu":
            return self._on_host(args[0].clone())
        call = partial(_in_float32, func) if name in PRODUCTS else func
        made = call(*(_real(a) for a in args), **kwargs)
        if is_pinned:
            return self._on_host(made)
        return self._moved(made) if name == "to" and is_method else made

    def _on_host(self, tensor: Tensor) -> Tensor:
        self.capture.mark_host(tensor)
        return tensor

    def _moved(self, tensor: Tensor) -> Tensor:
        """A copy on the device of what is known to lie on the host."""
        return tensor.clone() if self.capture.is_marked(tensor) else tensor


class _Generator(torch.Generator):
    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls)

    def __init__(self, device: Any = None) -> None:
        pass


class _Stream:
    cuda_stream = 0
    capture = Capture()

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        pass

    def wait_stream(self, stream: _Stream) -> None:
        pass

    def wait_event(self, event: _Event) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None:
        self.capture.forbid("Stream.synchronize")

    def query(self) -> bool:
        self.capture.forbid("Stream.query")
        return True


class _Event:
    capture = Capture()

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.has_time = enable_timing

    def record(self, stream: _Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        self.capture.forbid("Event.synchronize")

    def query(self) -> bool:
        self.capture.forbid("Event.query")
        return True

    def elapsed_time(self, end_event: _Event) -> float:
        self.capture.forbid("Event.elapsed_time")
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
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 2**20,
        "max_memory_allocated": 2**21,
        "memory_reserved": 2**22,
        "current_stream": _Stream(),
        "mem_get_info": (2**34, 2**35),
        "memory_stats": defaultdict(int),
        "graph_pool_handle": (0, 1),
        "get_device_properties": SimpleNamespace(
            major=8, minor=0, total_memory=2**35, L2_cache_size=2**25
        ),
    }

    def forbidden(name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
        def call(**named: Any) -> Any:
            mode.capture.forbid(f"torch.cuda.{name}")
            return answer(**named)

        return call

    asked: dict[str, Callable[..., Any]] = {
        "synchronize": lambda **_: None,
        "get_rng_state": lambda **_: torch.get_rng_state(),
        "set_rng_state": lambda new_state, **_: torch.set_rng_state(new_state),
    }
    return {
        **{name: lambda value=value, **_: value for name, value in constants.items()},
        **{name: forbidden(name, answer) for name, answer in asked.items()},
        "set_sync_debug_mode": sync_debug,
        "get_sync_debug_mode": lambda: 2 * mode.waits_are_errors,
        "is_current_stream_capturing": lambda: mode.capture.graph is not None,
    }


def _with_signature_of(real: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    """`answer`, called by name; a TypeError where the real one would not take the arguments."""
    signature = inspect.signature(real)

    def call(*args: Any, **kwargs: Any) -> Any:
        return answer(**signature.bind(*args, **kwargs).arguments)

    return call


def _in_float32(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compute a product of float16 tensors in float32 and round it."""
    flat, spec = tree_flatten((args, kwargs))
    is_half = [isinstance(x, Tensor) and x.dtype == torch.float16 for x in flat]
    if not any(is_half) or kwargs.get("out") is not None:
        return func(*args, **kwargs)
    wide = [x.float() if half else x for x, half in zip(flat, is_half, strict=True)]
    args, kwargs = tree_unflatten(wide, spec)
    return func(*args, **kwargs).half()


def _real(value: Any) -> Any:
    """The device that computes."""
    is_cuda = isinstance(value, str | torch.device) and str(value).split(":")[0] == "cuda"
    return CPU if is_cuda else value


if __name__ == "__main__":
    main(sys.argv[1:])
