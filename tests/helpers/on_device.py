"""A dispatch mode that refuses operators whose result the host has to read."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OnDevice(TorchDispatchMode):
    """Raises an error for every operator whose result the host has to read from the device."""

    NAMES = (
        "_local_scalar_dense",
        "nonzero",
        "is_nonzero",
        "equal",
        "unique",
        "masked_select",
        "bincount",
        "item",
    )

    def __init__(self) -> None:
        super().__init__()
        self.is_allowed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_allowed:
            name = func.__name__.split(".")[0]
            assert torch.Tag.data_dependent_output not in func.tags, name
            assert not any(name == b or name.startswith(f"{b}_") for b in self.NAMES), name
            if name.startswith("index"):  # by indices, never by a mask
                places = args[1] if name in ("index", "index_put", "index_put_") else []
                assert all(i is None or i.dtype != torch.bool for i in places), f"{name} by a mask"
            else:
                assert torch.Tag.dynamic_output_shape not in func.tags, name
        return func(*args, **(kwargs or {}))
