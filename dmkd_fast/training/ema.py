"""Exponential moving average of a model's weights, and copies of a module's buffers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Buffers:
    """Copy and restore all buffers of a module, such as running statistics, one call per dtype.

    Buffers are looked up on every call, because a module may assign a new tensor to one.
    """

    def __init__(self, module: nn.Module) -> None:
        homes: dict[torch.dtype, list[tuple[dict[str, Tensor | None], str]]] = {}
        seen: set[int] = set()
        for child in module.modules():
            for name, buffer in child.named_buffers(recurse=False):
                if id(buffer) not in seen:
                    seen.add(id(buffer))
                    homes.setdefault(buffer.dtype, []).append((child._buffers, name))
        self._homes = list(homes.values())

    def groups(self) -> list[list[Tensor]]:
        """Return all buffers, as one list for each dtype."""
        return [[home[name] for home, name in group] for group in self._homes]  # type: ignore[misc]

    def copies(self) -> list[Tensor]:
        """Return a flat copy of all buffers, one vector for each dtype."""
        return [flat(group) for group in self.groups()]

    @torch.no_grad()
    def put_back(self, copies: Sequence[Tensor], where: Tensor) -> None:
        """Set the buffers to `copies` if `where`, () bool, is true, without a host read."""
        for before, group in zip(copies, self.groups(), strict=True):
            chosen = torch.where(where, before, flat(group)).split([b.numel() for b in group])
            shaped = [c.view(b.shape) for c, b in zip(chosen, group, strict=True)]
            torch._foreach_copy_(group, shaped)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


class WeightEMA:
    """Keep an exponential moving average of a model's weights, and a copy of its buffers.

    With `decay=0` the average equals the model. The decay of update n, counted from 0, is
    min(decay, (1 + n) / (10 + n)), so that random initial weights fade quickly.

    Args:
        model: Model whose weights are averaged; it is copied.
        decay: Largest decay per update, in [0, 1).
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._mine: list[Tensor] = list(self.module.parameters())
        self._theirs: list[Tensor] = list(model.parameters())
        self._my_buffers, self._their_buffers = Buffers(self.module), Buffers(model)
        device = self._mine[0].device if self._mine else torch.device("cpu")
        # On the device, because the host does not know which steps were skipped.
        self.num_updates = torch.zeros((), device=device)

    @torch.no_grad()
    def update(self, taken: Tensor | None = None) -> None:
        """Move the average towards the model.

        Args:
            taken: () float32 on the device, 1 if the model's step was taken, 0 if it was skipped;
                None means 1. With 0 nothing changes, provided that the skipped step left the
                model's weights and buffers unchanged.
        """
        if self.decay == 0:
            torch._foreach_copy_(self._mine, self._theirs)
        else:
            weight = (9 / (self.num_updates + 10)).clamp_(min=1 - self.decay)
            moves = torch._foreach_sub(self._theirs, self._mine)
            torch._foreach_mul_(moves, weight if taken is None else weight * taken)
            torch._foreach_add_(self._mine, list(moves))
        self.num_updates.add_(1 if taken is None else taken)
        groups = zip(self._my_buffers.groups(), self._their_buffers.groups(), strict=True)
        for mine, theirs in groups:
            torch._foreach_copy_(mine, theirs)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights, the buffers and the number of updates."""
        return {"module": self.module.state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict`."""
        self.module.load_state_dict(state["module"])
        self.num_updates.copy_(state["num_updates"])
