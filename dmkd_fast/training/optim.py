"""Construction of optimizers that can skip a step, and their learning rate."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn


def build_optimizer(
    model: nn.Module,
    *,
    name: Literal["sgd", "adamw"],
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = True,
) -> torch.optim.Optimizer:
    """Build a fused SGD or AdamW without weight decay on vectors (biases, normalization).

    `momentum` is beta1 of AdamW. The optimizer's state is allocated here, as zeros: if the first
    step were skipped (`found_inf`), SGD would otherwise keep uninitialized momentum, and a lack of
    memory would show only during training.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "adamw":
        adamw = torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.99), fused=True)
        for p in parameters:
            adamw.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        return adamw
    sgd = torch.optim.SGD(
        groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, fused=True
    )
    if momentum > 0:
        for p in parameters:
            sgd.state[p] = {"momentum_buffer": torch.zeros_like(p)}
    return sgd


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
