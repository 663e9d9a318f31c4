"""Device, dtype, threads and what this machine can do, decided once.

Stands on floor 0. Choices are made by capability, never by timing, so that the same settings on
the same machine always resolve to the same run.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import random
import resource
import shutil
import signal
import sysconfig
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy
import torch

from dmkd_fast import container

Device = Literal["auto", "cpu", "cuda"]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def resolve_device(name: Device) -> torch.device:
    """Turn `auto` into `cuda` where there is one, else `cpu`.

    A CUDA device has the index of the current one: libraries such as DALI take a device without
    index for the first, whatever the current one is.

    Raises:
        ValueError: `cuda` was asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not has_cuda):
        return torch.device("cpu")
    if not has_cuda:
        raise ValueError("device: got cuda, but no CUDA device is visible; set device=cpu or auto")
    return torch.device("cuda", torch.cuda.current_device())


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn `auto` into the compute dtype that the device multiplies fastest.

    CUDA: float16. CPU with AVX512-BF16 or AMX: bfloat16, else float32. float16 on a CPU is about
    25 times slower than bfloat16 and therefore refused.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if cpu_has_bf16() else torch.float32
    if name == "float16" and device.type == "cpu":
        raise ValueError("dtype: got float16 on a CPU, expected bfloat16 or float32; use auto")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this CPU has bfloat16 multiply instructions."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile can build kernels here.

    On CUDA that takes Triton; on a CPU a C++ compiler and the headers of Python.
    """
    if device_type == "cuda":
        from torch.utils._triton import has_triton

        return bool(has_triton())
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return compiler is not None and Path(sysconfig.get_path("include"), "Python.h").is_file()


def set_num_threads(num_threads: int, *, num_processes: int = 1) -> int:
    """Use this many CPU threads (0: all cores this process may run on); returns the number.

    Args:
        num_threads: How many.
        num_processes: That share all cores.
    """
    count = num_threads or max(1, container.num_cpus() // num_processes)
    torch.set_num_threads(count)
    return count


def keep_freed_memory() -> None:
    """Let this process reuse the memory of large tensors instead of giving it back each time.

    glibc maps every block above 32 MiB anew and returns the top of its heap; on a CPU the page
    faults of fresh outputs took a tenth (batches of 256) to a fifth (512) of a denoiser's forward.
    For programs that own the process, not for a library's import. Does nothing without glibc.
    """
    set_malloc_thresholds(mmap_bytes=1 << 30, trim_bytes=(1 << 31) - 1)


def make_repeatable() -> None:
    """Let CUDA libraries choose only kernels that give the same bits each time they run.

    Without it convolutions' weight gradients are summed in any order, and a resumed run ends with
    other bits. For programs that own the process, before their first product on a GPU. What it
    does not reach: overlapping max pooling of a channels_last student that is not compiled.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products on several streams
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if torch.cuda.is_available():
        import torch._inductor.config as inductor

        if hasattr(inductor, "deterministic"):  # else timing decides how reductions are split
            inductor.deterministic = True


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 products and convolutions on CUDA in float32, not in TF32.

    cuDNN's convolutions use TF32 by default, which rounds factors to 10 bits. The settings are
    restored afterwards.
    """
    cudnn: Any = torch.backends.cudnn
    parts = (torch.backends.cuda.matmul, cudnn.conv)
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "ieee"
    try:
        yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


def set_malloc_thresholds(*, mmap_bytes: int, trim_bytes: int) -> None:
    """Block size that glibc maps anew, and size of a free heap top that it gives back."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, mmap_bytes)
        mallopt(M_TRIM_THRESHOLD, trim_bytes)


def available_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device."""
    if device.type == "cuda":
        # What PyTorch holds and does not use can be had as well.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return container.available_bytes()


class NotFiniteError(RuntimeError):
    """Too much of what a run computes is not finite for it to go on."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the device or the host, is used up."""
    texts = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def peak_memory_mib() -> float:
    """Highest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cpu_seconds() -> float:
    """Processor time of this process and of the helpers it has waited for, in seconds."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Clock:
    """Wall and processor seconds since it was made, earlier parts of a resumed run included."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), cpu_seconds()

    def wall_s(self) -> float:
        """Seconds of wall time."""
        return time.perf_counter() - self._wall

    def cpu_s(self) -> float:
        """Seconds of processor time, all threads together."""
        return cpu_seconds() - self._cpu

    def state_dict(self) -> dict[str, float]:
        """Both readings."""
        return {"wall_s": self.wall_s(), "cpu_s": self.cpu_s()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on counting from these readings."""
        self._wall = time.perf_counter() - state["wall_s"]
        self._cpu = cpu_seconds() - state["cpu_s"]


class Generators:
    """The global random states that a student may draw from: torch's, NumPy's and Python's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def state_dict(self) -> dict[str, Any]:
        """All of them, as they are."""
        name, keys, *rest = numpy.random.get_state()
        is_cuda = self.device.type == "cuda"
        return {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if is_cuda else None,
            "numpy": [name, numpy.asarray(keys).tolist(), *rest],
            "python": random.getstate(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        torch.set_rng_state(state["cpu"])
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], self.device)
        numpy.random.set_state(tuple(state["numpy"]))
        version, keys, gauss = state["python"]
        random.setstate((version, tuple(keys), gauss))


class InFlight:
    """Keeps the host at most `most` pieces of work ahead of a CUDA device.

    Without a limit a signal that arrives during a long fill of the ring could not be served before
    the device has done all that is queued. Does nothing on a CPU.
    """

    def __init__(self, device: torch.device, *, most: int = 2) -> None:
        self._device, self._most = device, most
        self._ends: deque[torch.cuda.Event] = deque()

    @contextmanager
    def piece(self) -> Iterator[None]:
        """Queue one piece of work on the current stream, once fewer than `most` are unfinished."""
        if self._device.type != "cuda":
            yield
            return
        while len(self._ends) >= self._most:
            self._ends[0].synchronize()
            self._ends.popleft()
        yield
        end = torch.cuda.Event(blocking=True)  # Waiting for it leaves the core to others.
        end.record()
        self._ends.append(end)


class Interrupts:
    """Turns Ctrl-C, SIGTERM and SIGHUP into KeyboardInterrupt, but never inside `held`.

    Work that must not be torn (an optimizer step, a commit) is held: the signal waits until it is
    done. Everything else is interrupted at once. A second Ctrl-C or SIGTERM ends what the first one
    began, such as a last checkpoint: by KeyboardInterrupt, or where that may not be raised, by
    ending the process. A second SIGHUP is ignored, because a terminal that closes may send two.
    SIGHUP stays ignored in a process started by nohup. Use as a context manager in the main thread.

    Args:
        only_noted: Never raise, but set `is_pending`: one of several ranks must not leave the
            others waiting for it. torchrun repeats a signal to its ranks, so one that arrives less
            than a second after the first is not a second one.
    """

    def __init__(self, *, only_noted: bool = False) -> None:
        self._only_noted = only_noted
        self._is_held = False
        self._is_pending = False
        self._first_at: float | None = None
        self._previous: dict[int, object] = {}

    @property
    def is_pending(self) -> bool:
        """Whether a signal has come that nothing was raised for yet."""
        return self._is_pending

    def __enter__(self) -> Interrupts:
        self._first_at = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._only_noted and kind is not None:
            return  # Another rank's signal has ended this: the own one may be still to come.
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait until the block ends."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._is_pending and not self._only_noted:
            self._is_pending = False
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        now, first = time.monotonic(), self._first_at
        if first is None:
            self._first_at = now
        elif number == signal.SIGHUP or (self._only_noted and now - first < 1):
            return
        if self._only_noted or self._is_held:
            if self._is_pending:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self._is_pending = True
        else:
            raise KeyboardInterrupt
