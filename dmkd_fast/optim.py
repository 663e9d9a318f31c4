"""Optimizer, learning rate as a pure function of the step, averaged weights.

Stands on floor 2. `lr_at(step)` needs no state, so a resumed run continues with the same rates.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Optimizer settings and the rhythm of a run; see `OptimConfig`, `TrainConfig`."""

    batch_size: int
    num_views: int
    lr: float
    name: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup: float = 0.05
    ema_decay: float = 0.0
    max_grad_norm: float = 0.0
    checkpoint_every_s: float = 600.0
    log_every_steps: int = 50
    num_evaluations: int = 8


def build_optimizer(
    model: nn.Module, *, name: Literal["sgd", "adamw"], lr: float, momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:  # fmt: skip
    """SGD with Nesterov momentum, or AdamW; no weight decay on vectors (biases, normalisation)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.99), fused=True)


def lr_at(step: int, *, num_steps: int, peak: float, warmup: float) -> float:
    """Learning rate of a step: linear warm-up over `warmup * num_steps`, then cosine to zero."""
    num_warmup = int(warmup * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class Average:
    """Exponential moving average of a model's weights; buffers are copied.

    `decay=0` follows the model exactly. Early averages are short: the decay of update n is
    min(decay, (1 + n) / (10 + n)), so that random initial weights fade quickly.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards `model`."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        pairs = list(zip(self.module.parameters(), model.parameters(), strict=True))
        torch._foreach_lerp_([a for a, _ in pairs], [p.detach() for _, p in pairs], 1 - decay)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        """Weights and the number of updates."""
        return {"module": self.module.state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.module.load_state_dict(state["module"])
        self.num_updates = state["num_updates"]
