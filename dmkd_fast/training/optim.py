"""Construction of optimizers that can skip a step, and their learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dmkd_fast.training.schedule import Schedule


def build_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """Build a fused SGD or AdamW without weight decay on vectors (biases, normalization).

    The optimizer's state is allocated here, as zeros: if the first step were skipped (`found_inf`),
    SGD would otherwise keep uninitialized momentum, and a lack of memory would show only during
    training.
    """
    momentum = schedule.momentum
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if schedule.name == "adamw":
        adamw = torch.optim.AdamW(groups, lr=schedule.lr, betas=(momentum, 0.99), fused=True)
        for p in parameters:
            adamw.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        return adamw
    nesterov = schedule.nesterov and momentum > 0
    sgd = torch.optim.SGD(groups, lr=schedule.lr, momentum=momentum, nesterov=nesterov, fused=True)
    if momentum > 0:
        for p in parameters:
            sgd.state[p] = {"momentum_buffer": torch.zeros_like(p)}
    return sgd


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
