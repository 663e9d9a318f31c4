"""Errors that end a run with a one-line message, and a test for out-of-memory errors."""

from __future__ import annotations

import torch


class NotFiniteError(RuntimeError):
    """Error for a run that cannot continue, because too many of its values are not finite."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device or the host is out of memory."""
    texts = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )
