"""Estimate the memory of activations by running a model on the meta device."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class _LiveBytes(TorchDispatchMode):
    """Follow the bytes of the tensors that operators make, and keep their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        for value in made if isinstance(made, list | tuple) else [made]:
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in given:
                storage = value.untyped_storage()
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: one for key, one in self._live.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(count for _, count in self._live.values()))
        return made


class _FusedAttention(TorchFunctionMode):
    """Let attention make its output only, as on a GPU; the meta device keeps all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return args[0].new_empty(*args[0].shape[:-1], args[2].shape[-1])
        return func(*args, **(kwargs or {}))


def peak_bytes(model: nn.Module, weights: dict[str, Tensor], *inputs: Tensor) -> int:
    """Estimate the largest number of bytes that a forward pass without gradients makes.

    Args:
        model: Frozen model.
        weights: Its parameters and buffers on the meta device.
        inputs: Inputs on the meta device; the dtype of the first one is the compute dtype.
    """
    cast = {
        name: value.to(inputs[0].dtype) if value.is_floating_point() else value
        for name, value in weights.items()
    }
    # A model whose control flow depends on values cannot run on the meta device; it counts as 0.
    live = _LiveBytes()
    with contextlib.suppress(Exception), torch.no_grad(), _FusedAttention(), live:
        torch.func.functional_call(model, cast, inputs)
        return live.peak
    return 0
