"""Choose device, dtype and threads by what this machine can do.

Choices depend on capability, never on timing, so that the same config on the same machine always
resolves to the same run.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import sysconfig
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from dmkd_fast.runtime import container
from dmkd_fast.runtime.errors import UserError, invalid

Device = Literal["auto", "cpu", "cuda"]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def resolve_device(name: Device) -> torch.device:
    """Turn `auto` into a CUDA device if there is one, else into the CPU.

    A CUDA device gets the index of the current one: libraries such as DALI treat a device without
    an index as the first device, even if another one is current.

    Raises:
        UserError: `name` is cuda, and there is no CUDA device.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not has_cuda):
        return torch.device("cpu")
    if not has_cuda:
        raise UserError("device: got cuda, but no CUDA device is visible; set device=cpu or auto")
    return torch.device("cuda", torch.cuda.current_device())


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn `auto` into the compute dtype that the device multiplies fastest.

    On CUDA this is float16. On a CPU with AVX512-BF16 or AMX it is bfloat16, on other CPUs float32.

    Raises:
        UserError: `name` is float16 on a CPU, where it is many times slower than bfloat16.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if cpu_has_bf16() else torch.float32
    if name == "float16" and device.type == "cpu":
        raise invalid("dtype", "float16 on a CPU", "bfloat16 or float32", "use auto")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


@functools.cache
def cpu_has_bf16() -> bool:
    """Return whether this CPU has bfloat16 multiply instructions."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def can_compile(device_type: str) -> bool:
    """Return whether torch.compile can build kernels on this machine.

    CUDA needs Triton and a C compiler, a CPU a C++ compiler; both need the header files of Python.
    """
    variable, usual = "CXX", ["g++"]
    if device_type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return False
        variable, usual = "CC", ["gcc", "clang"]  # Triton builds what launches its kernels
    names = [os.environ[variable]] if variable in os.environ else usual
    has_compiler = any(shutil.which(name) for name in names)
    return has_compiler and Path(sysconfig.get_path("include"), "Python.h").is_file()


def set_num_threads(num_threads: int, *, num_processes: int = 1) -> int:
    """Set the number of CPU threads that PyTorch uses, and return it.

    Args:
        num_threads: Number of threads; 0 means all cores that this process may use.
        num_processes: Number of processes that share all cores, for `num_threads` 0.
    """
    count = num_threads or max(1, container.num_cpus() // num_processes)
    torch.set_num_threads(count)
    return count


def keep_freed_memory() -> None:
    """Let this process reuse the memory of large tensors instead of returning it to the system.

    By default glibc maps each block above 32 MiB again and returns the free top of its heap. On a
    CPU, the page faults of fresh outputs slow down a denoiser's forward (see docs/notebook.md).
    Call it in programs that own the process, not on import of a library. Does nothing without
    glibc.
    """
    set_malloc_thresholds(mmap_bytes=1 << 30, trim_bytes=(1 << 31) - 1)


def set_repeatable(repeatable: bool = True) -> None:
    """Let CUDA libraries choose only kernels that give the same bits each time they run.

    Call it before the first matrix product on a GPU, for the whole process. It does not cover the
    overlapping max pooling of a channels_last student that is not compiled.

    Args:
        repeatable: False lets cuDNN and torch.compile choose the kernels that they measure to be
            the fastest. Weight gradients of convolutions are then summed in any order, and a
            resumed run ends with other bits.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for products on several streams
    torch.backends.cudnn.deterministic = repeatable
    torch.backends.cudnn.benchmark = not repeatable
    if torch.cuda.is_available():
        import torch._inductor.config as inductor

        # Otherwise timing decides how to split reductions. Not every version has these settings.
        for name, value in (
            ("deterministic", repeatable),
            ("max_autotune_pointwise", not repeatable),
        ):
            if hasattr(inductor, name):
                setattr(inductor, name, value)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 products and convolutions on CUDA in float32, not in TF32.

    cuDNN's convolutions use TF32 by default, which rounds factors to 10 bits. The settings are
    restored afterwards. `torch.set_float32_matmul_precision` has one for CUDA and CPU, so that
    where it was used, products on a CPU are computed in float32 as well.
    """
    backends: Any = torch.backends
    parts = [backends.cuda.matmul, backends.cudnn.conv]
    older = "highest"
    if backends.cuda.matmul.fp32_precision == "tf32":
        # torch refuses to read settings of which the older one says something else. Here it does
        # where a program has used the newer ones alone, and the older one is still "highest".
        with contextlib.suppress(RuntimeError):
            older = torch.get_float32_matmul_precision()
    if older != "highest":
        parts.append(backends.mkldnn.matmul)  # which the older setting changes as well
    before = [part.fp32_precision for part in parts]
    if older != "highest":
        torch.set_float32_matmul_precision("highest")
    for part in parts:
        part.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older != "highest":
            torch.set_float32_matmul_precision(older)
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


def set_malloc_thresholds(*, mmap_bytes: int, trim_bytes: int) -> None:
    """Set the block size from which glibc maps memory, and the free heap top that it returns.

    Args:
        mmap_bytes: Blocks of this size and more are mapped separately.
        trim_bytes: A free top of the heap above this size is returned to the system.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, mmap_bytes)
        mallopt(M_TRIM_THRESHOLD, trim_bytes)


def available_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are still available on a device."""
    if device.type == "cuda":
        # Memory that PyTorch holds and does not use is available as well.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return container.available_bytes()


def peak_memory_mib() -> float:
    """Return the highest resident memory of this process so far, in MiB."""
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class InFlight:
    """Keep the host at most `most` pieces of work ahead of a CUDA device.

    Without a limit, a signal during a long fill of the ring would be handled only after the device
    has done all queued work. Does nothing on a CPU.
    """

    def __init__(self, device: torch.device, *, most: int = 2) -> None:
        self._device, self._most = device, most
        self._ends: deque[torch.cuda.Event] = deque()

    @contextmanager
    def piece(self) -> Iterator[None]:
        """Queue work on the device's current stream, once fewer than `most` are unfinished."""
        if self._device.type != "cuda":
            yield
            return
        while len(self._ends) >= self._most:
            self._ends[0].synchronize()
            self._ends.popleft()
        yield
        cuda: Any = torch.cuda  # its events have no static types
        end = cuda.Event(blocking=True)  # leaves the core to others during the wait
        end.record(cuda.current_stream(self._device))
        self._ends.append(end)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device or the host is out of memory."""
    texts = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )
