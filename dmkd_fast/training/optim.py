"""Optimizer, averaged weights, and buffers taken together."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn


def build_optimizer(
    model: nn.Module, *, name: Literal["sgd", "adamw"], lr: float, momentum: float,
    weight_decay: float, nesterov: bool = True,
) -> torch.optim.Optimizer:  # fmt: skip
    """SGD or AdamW, fused; no weight decay on vectors (biases, normalisation).

    Its state is there from the start: a first step that is skipped (`found_inf`) leaves zeros,
    where SGD would leave uninitialised momentum; and if memory lacks, it does before training.
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
                "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p),
            }  # fmt: skip
        return adamw
    sgd = torch.optim.SGD(
        groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, fused=True
    )
    if momentum > 0:
        for p in parameters:
            sgd.state[p] = {"momentum_buffer": torch.zeros_like(p)}
    return sgd


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
