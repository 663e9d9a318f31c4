"""State dictionaries taken apart into tensors and JSON, and put together again.

Stands on floor 1, below `checkpoint.py`, which writes both to files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with each tensor copied to `tensors` and each dictionary turned into pairs."""
    if isinstance(value, Tensor):
        # Fused optimizers walk a parameter and its moments in memory order: a moment that came back
        # in another layout would be applied scrambled. Files do not hold strides.
        copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        tensors[path] = copy.copy_(value.detach(), non_blocking=True)
        stride = (value if _is_dense(value) else copy).stride()
        return {"tensor": path, "stride": list(stride)}
    if isinstance(value, Mapping):
        return {"pairs": [[k, split(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [split(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    return value


def call(value: Any) -> Any:
    """`value` with each function replaced by what it returns."""
    if callable(value):
        return split(value(), "", {})
    if isinstance(value, dict) and "pairs" in value:
        return {"pairs": [[k, call(v)] for k, v in value["pairs"]]}
    if isinstance(value, dict) and "list" in value:
        return {"list": [call(v) for v in value["list"]]}
    return value


def join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `split`; tuples come back as lists."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        # A copy of its own: what an optimizer takes over as it is must be aligned as before.
        return torch.empty_strided(tensor.shape, value["stride"], dtype=tensor.dtype).copy_(tensor)
    if "pairs" in value:
        return {k: join(v, tensors) for k, v in value["pairs"]}
    return [join(v, tensors) for v in value["list"]]


def _is_dense(value: Tensor) -> bool:
    """Whether the elements lie in memory without holes and without sharing, in any order."""
    count = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1:
            if stride != count:
                return False
            count *= size
    return True
