"""State dictionaries taken apart into tensors and JSON, and put together again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def split_state(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with each tensor copied to `tensors` and each dictionary turned into pairs."""
    if isinstance(value, Tensor):
        # Fused optimizers walk a parameter and its moments in memory order: a moment that came back
        # in another layout would be applied scrambled. Files do not hold strides.
        copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        tensors[path] = copy.copy_(value.detach(), non_blocking=True)
        stride = (value if _is_dense(value) else copy).stride()
        return {"tensor": path, "stride": list(stride)}
    if isinstance(value, Mapping):
        return {"pairs": [[k, split_state(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [split_state(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    return value


def call_functions(value: Any) -> Any:
    """`value` with each function replaced by what it returns."""
    if callable(value):
        return split_state(value(), "", {})
    if isinstance(value, dict) and "pairs" in value:
        return {"pairs": [[k, call_functions(v)] for k, v in value["pairs"]]}
    if isinstance(value, dict) and "list" in value:
        return {"list": [call_functions(v) for v in value["list"]]}
    return value


def join_state(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `split`; tuples come back as lists."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        # A copy of its own: what an optimizer takes over as it is must be aligned as before.
        return torch.empty_strided(tensor.shape, value["stride"], dtype=tensor.dtype).copy_(tensor)
    if "pairs" in value:
        return {k: join_state(v, tensors) for k, v in value["pairs"]}
    return [join_state(v, tensors) for v in value["list"]]


def _is_dense(value: Tensor) -> bool:
    """Whether the elements lie in memory without holes and without sharing, in any order."""
    count = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1:
            if stride != count:
                return False
            count *= size
    return True
