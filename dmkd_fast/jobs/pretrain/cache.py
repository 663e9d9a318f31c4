"""Keep decoded images and encoded latents on disk, so that later runs need not make them again.

A file holds one tensor in the layout of safetensors. It is named by a digest of all that its
content depends on, and it is mapped into memory, so its pages are read when they are used. The
files lie in `$XDG_CACHE_HOME/dmkd_fast` (by default `~/.cache/dmkd_fast`) and may be deleted.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dmkd_fast.runtime import files
from dmkd_fast.runtime.errors import warn_once
from dmkd_fast.runtime.model_files import file_parts

# Largest fraction of the free disk space that one file may take.
MOST_OF_DISK = 0.5


def cached(
    key: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Iterator[Tensor]]
) -> Tensor:
    """Return a tensor on the CPU from its file, made and written first if there is none.

    Without room on disk, the tensor is made in memory.

    Args:
        key: Digest of all that the content depends on.
        shape: Shape of the tensor.
        dtype: Dtype of the tensor.
        make: Function that yields the rows of the tensor in order, some at a time.
    """
    path = files.cache_folder() / f"{key}.safetensors"
    header = bytes(next(file_parts({"rows": torch.empty(shape, dtype=dtype, device="meta")})))
    num_bytes = math.prod(shape) * dtype.itemsize

    def parts() -> Iterator[bytes | memoryview]:
        yield header
        for rows in make():
            flat = rows.to("cpu", dtype).contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data

    try:
        if not _is_whole(path, header, num_bytes):
            files.make_folder(path.parent)
            with files.locked(path.parent / "lock") as is_ours:
                has_room = num_bytes <= MOST_OF_DISK * shutil.disk_usage(path.parent).free
                if not (is_ours and has_room):
                    return _in_memory(shape, dtype, make)
                files.replace(path, parts())
        whole = torch.from_file(
            str(path), shared=False, size=len(header) + num_bytes, dtype=torch.uint8
        )
        return whole[len(header) :].view(dtype).view(shape)
    except OSError as error:
        warn_once(f"{path.parent}: cannot keep images there ({error.strerror}); nothing is cached")
        return _in_memory(shape, dtype, make)


def _is_whole(path: Path, header: bytes, num_bytes: int) -> bool:
    """Return whether the file is there, of the right size and with the right header."""
    if not path.is_file() or path.stat().st_size != len(header) + num_bytes:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _in_memory(
    shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Iterator[Tensor]]
) -> Tensor:
    whole, place = torch.empty(shape, dtype=dtype), 0
    for rows in make():
        whole[place : place + len(rows)] = rows
        place += len(rows)
    return whole
