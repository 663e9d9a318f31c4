"""PyTorch's CUDA sanitizer over a whole job without a GPU, on the stand-in for torch.cuda.

    with pretended(), sanitized() as log:
        job.fit()
    assert not log.races

Inside `benchmarks.fake_cuda.pretended`, streams and events report to the sanitizer's engine, and a
dispatch mode reports what each operator reads and writes: slots of the ring one by one, all other
tensors by their memory. A graph's replay runs its operators, so its static memory counts too. Each
thread of the host is a stream of its own: it reads pinned memory when it writes a file, and waits
for events. When the main thread waits, all later work comes after what it waited for.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.cuda._sanitizer import FACTORY_FUNCTION_REGEX, EventHandler
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import dmkd_fast
from dmkd_fast.runtime import model_files

PACKAGE = str(Path(dmkd_fast.__file__).parent)
FIRST_HOST = 1000  # number of the first thread
Names = tuple[str, ...]  # functions of the package that make a call, innermost first


class Log:
    """What the sanitizer found, and the calls that order streams.

    Args:
        leave_out: Function that leaves out a call if it returns True. Arguments: a kind ("record",
            "wait", "synchronize" or "device"), and the names of the functions that make the call.

    Attributes:
        races: One line for each race.
        calls: Number of calls for each kind and innermost function.
    """

    def __init__(self, leave_out: Callable[[str, Names], bool] = lambda kind, names: False) -> None:
        self.races: list[str] = []
        self.calls: Counter[str] = Counter()
        self.num_kernels = 0
        self._engine, self._leave_out = EventHandler(), leave_out
        self._lock = threading.RLock()
        self._threads: dict[int, int] = {}
        self._memories: dict[int, StorageWeakRef] = {}
        self._count = 0
        self._main = threading.get_ident()
        self.current = 0
        self.images: Tensor | None = None

    def number(self) -> int:
        """Return a new number for a stream or an event."""
        self._count += 1
        return self._count

    def new_stream(self) -> int:
        """Announce a stream."""
        number = self.number()
        self._engine._handle_stream_creation(number)
        return number

    def order(self, kind: str, event: int, stream: int | None) -> None:
        """Record an event on a stream, or let a stream, or the calling thread, wait for one."""
        names = _package_functions()
        with self._lock:
            self.calls[f"{kind} in {names[0]}"] += 1
            if self._leave_out(kind, names):
                return
            if kind == "record":
                self._engine._handle_event_record(event, stream)
            elif stream is not None:
                self._engine._handle_event_wait(event, stream)
            elif threading.get_ident() == self._main:
                self._engine._handle_event_synchronization(event)
            else:
                self._engine._handle_event_wait(event, self.thread())

    def synchronize(self) -> None:
        """Let the main thread wait for the device."""
        names = _package_functions()
        with self._lock:
            if not self._leave_out("device", names):
                self._engine._handle_device_synchronization()

    def wait_for_stream(self) -> None:
        """Let the main thread wait for the current stream."""
        with self._lock:
            self._engine._handle_stream_synchronization(self.current)

    def thread(self) -> int:
        """Return the stream that stands for the calling thread."""
        ident = threading.get_ident()
        if ident not in self._threads:
            self._threads[ident] = FIRST_HOST + len(self._threads)
            self._engine._handle_stream_creation(self._threads[ident])
        return self._threads[ident]

    def kernel(self, stream: int, reads: set[Any], writes: set[Any], what: str) -> None:
        """Report what an operator reads and writes."""
        with self._lock:
            self.num_kernels += 1
            keys = {hash(place): place for place in reads | writes}
            for key in keys:
                if key not in self._engine.tensors_accessed.accesses:
                    self._engine._handle_memory_allocation(key)
            found = self._engine._handle_kernel_launch(
                stream,
                {hash(place) for place in reads - writes},
                {hash(place) for place in writes},
                set(),
                what,
                {key: [] for key in keys},
            )
            if found:
                where = ", ".join(_package_functions()[:4])
                self.races += [f"{keys[e.data_ptr]}: {what} in {where}" for e in found]

    def places(self, tensor: Tensor, index: Tensor | None = None) -> set[Any]:
        """Return the memory of a tensor; for the ring's images the slots, or those of an index."""
        memory = tensor.untyped_storage()
        if memory.nbytes() == 0:
            return set()
        if self.images is None or memory._cdata != self.images.untyped_storage()._cdata:
            if memory._cdata not in self._memories:  # a weak reference keeps the number taken
                self._memories[memory._cdata] = StorageWeakRef(memory)
            return {("memory", memory._cdata)}
        if index is not None:
            return {("slot", slot) for slot in index.flatten().tolist()}
        first = tensor.storage_offset() // self.images.stride(0)
        return {("slot", slot) for slot in range(first, first + len(tensor))}


class Stream:
    """Stand-in for a stream; number 0 is the default stream."""

    def __init__(self, log: Log, number: int) -> None:
        self._log, self.number = log, number
        self.cuda_stream = number

    def record_event(self, event: Any = None) -> Any:
        event = event or torch.cuda.Event()
        self._log.order("record", event.number, self.number)
        return event

    def wait_event(self, event: Any) -> None:
        self._log.order("wait", event.number, self.number)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Kernels(TorchDispatchMode):
    """Reports what each operator reads and writes on the current stream."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._schema.name == "aten::set_":  # of the stand-in's graphs; moves no data
            return result
        reads: set[Any] = set()
        writes: set[Any] = set()
        is_gather = func is torch.ops.aten.index.Tensor
        index = args[1][0] if is_gather else None
        if func._schema.name in ("dmkd_fast::views", "dmkd_fast::views_out"):
            index = args[1 + func._schema.name.endswith("_out")]
        is_factory = FACTORY_FUNCTION_REGEX.match(func._schema.name) is not None
        named = {a.name: a for a in func._schema.arguments}
        given = [*zip(func._schema.arguments, args, strict=False)]
        given += [(named[name], value) for name, value in kwargs.items()]
        for argument, value in given:
            is_write = argument.alias_info is not None and argument.alias_info.is_write
            if (argument.alias_info is not None or is_factory) and not is_write:
                continue  # a view reads nothing
            values = value if isinstance(value, list | tuple) else [value]
            for tensor in (v for v in values if isinstance(v, Tensor)):
                (writes if is_write else reads).update(self._log.places(tensor, index))
        makes = [r for r in func._schema.returns if r.alias_info is None]
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if makes and isinstance(tensor, Tensor):
                writes |= self._log.places(tensor) - reads
        if reads or writes:
            self._log.kernel(self._log.current, reads, writes, str(func))
        if torch.Tag.data_dependent_output in func.tags:  # the host waits for a value
            self._log.wait_for_stream()
        return result


@contextmanager
def sanitized(log: Log) -> Iterator[Log]:
    """Report streams, events, operators and files to a log; inside of `pretended`."""

    class Event:
        def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
            self.number = log.number()
            log._engine._handle_event_creation(self.number)

        def record(self, stream: Stream | None = None) -> None:
            (stream or Stream(log, log.current)).record_event(self)

        def synchronize(self) -> None:
            log.order("synchronize", self.number, None)

        def elapsed_time(self, end_event: Event) -> float:
            return 1.0

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, log.current = log.current, stream.number
        try:
            yield
        finally:
            log.current = before

    def file_parts(tensors: Any) -> Iterator[Any]:
        reads = {place for tensor in tensors.values() for place in log.places(tensor)}
        log.kernel(log.thread(), reads, set(), "a file is written")
        yield from real_parts(tensors)

    real_parts = model_files.file_parts
    # The engine keeps a stack trace for each access, which takes most of its time.
    no_trace = SimpleNamespace(extract=lambda *_, **__: [])
    stub = SimpleNamespace(StackSummary=no_trace, walk_stack=lambda frame: None)
    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda._sanitizer, "traceback", stub),
            (torch.cuda, "Stream", lambda device=None, priority=0: Stream(log, log.new_stream())),
            (torch.cuda, "current_stream", lambda device=None: Stream(log, log.current)),
            (torch.cuda, "stream", on),
            (torch.cuda, "Event", Event),
            (torch.cuda, "synchronize", lambda device=None: log.synchronize()),
            (model_files, "file_parts", file_parts),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(Kernels(log))
        yield log


def _package_functions() -> Names:
    """Return the functions of the package on the stack, innermost first."""
    names = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE) and frame.f_code.co_name != "_record":
            names.append(frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(names) or ("",)
