"""Split state dictionaries into tensors and JSON values, and join them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def split_state(
    value: Any, path: str, tensors: dict[str, Tensor], devices: set[torch.device]
) -> Any:
    """Copy each tensor in `value` to `tensors`, and return the rest as JSON values.

    A tensor becomes its name and strides, a dictionary becomes a list of pairs, and a function
    stays until `call_functions` replaces it.

    Args:
        value: State to split.
        path: Name of `value`; the names of its tensors begin with it.
        tensors: Receives the copies on the CPU, by name.
        devices: Receives the CUDA devices whose current streams the copies are queued on.
    """
    if isinstance(value, Tensor):
        # Fused optimizers walk a parameter and its moments in memory order, so a restored moment
        # needs the same layout. Files do not hold strides.
        copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        tensors[path] = copy.copy_(value.detach(), non_blocking=True)
        if value.is_cuda:
            devices.add(value.device)
        stride = (value if _is_dense(value) else copy).stride()
        return {"tensor": path, "stride": list(stride)}
    if isinstance(value, Mapping):
        pairs = [[k, split_state(v, f"{path}/{k}", tensors, devices)] for k, v in value.items()]
        return {"pairs": pairs}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        items = enumerate(value)
        return {kind: [split_state(v, f"{path}/{i}", tensors, devices) for i, v in items]}
    return value


def call_functions(value: Any) -> Any:
    """Replace each function in a split state by what it returns."""
    if callable(value):
        return split_state(value(), "", {}, set())
    if isinstance(value, dict) and "pairs" in value:
        return {"pairs": [[k, call_functions(v)] for k, v in value["pairs"]]}
    for kind in ("list", "tuple"):
        if isinstance(value, dict) and kind in value:
            return {kind: [call_functions(v) for v in value[kind]]}
    return value


def join_state(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Invert `split_state`; in checkpoints of earlier versions, tuples are lists."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        # Copied, since an optimizer may keep this tensor and needs it aligned as before.
        return torch.empty_strided(tensor.shape, value["stride"], dtype=tensor.dtype).copy_(tensor)
    if "pairs" in value:
        return {k: join_state(v, tensors) for k, v in value["pairs"]}
    if "tuple" in value:
        return tuple(join_state(v, tensors) for v in value["tuple"])
    return [join_state(v, tensors) for v in value["list"]]


def _is_dense(value: Tensor) -> bool:
    """Return whether the elements fill their memory without gaps or overlap, in any order."""
    count = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1:
            if stride != count:
                return False
            count *= size
    return True
