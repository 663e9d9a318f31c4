"""Save and restore the global random generators."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch


class Generators:
    """Save and restore the global random states of torch, NumPy and Python.

    A student may draw from any of them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def state_dict(self) -> dict[str, Any]:
        """Return the current states."""
        name, keys, *rest = numpy.random.get_state()
        is_cuda = self.device.type == "cuda"
        return {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if is_cuda else None,
            "numpy": [name, numpy.asarray(keys).tolist(), *rest],
            "python": random.getstate(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""
        torch.set_rng_state(state["cpu"])
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], self.device)
        numpy.random.set_state(tuple(state["numpy"]))
        version, keys, gauss = state["python"]
        random.setstate((version, tuple(keys), gauss))
