"""Load the C++ extension, whose import registers the CPU kernels of all operators.

Without the extension, every operator runs its eager definition.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch as torch  # loads the shared libraries that the extension needs

INSTRUCTION_SET = "none"
WHY_MISSING = ""
# Operators of the loss past the dispatcher; None: torch is older than 2.14.
loss_and_gradient: Callable[[Any], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None
row_weights: Callable[..., torch.Tensor] | None = None
try:
    _module = importlib.import_module("dmkd_fast._C")
except ImportError as error:
    WHY_MISSING = str(error)
else:
    INSTRUCTION_SET = _module.instruction_set()
    if _module.is_direct:
        loss_and_gradient, row_weights = _module.loss_and_gradient, _module.row_weights
