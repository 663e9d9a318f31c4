"""Errors that end a run in one line, and how they are recognized."""

from __future__ import annotations

import torch


class NotFiniteError(RuntimeError):
    """Too much of what a run computes is not finite for it to go on."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the device or the host, is used up."""
    texts = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )
