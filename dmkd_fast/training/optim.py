"""Construction of optimizers that can skip a step, and their learning rate."""

from __future__ import annotations

import ctypes
import difflib
import inspect
from typing import Any

import torch
from torch import nn

from dmkd_fast.runtime.errors import invalid
from dmkd_fast.training.muon import Muon
from dmkd_fast.training.schedule import TIMM, Schedule


def build_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """Build a fused SGD or AdamW, Muon, or an optimizer of timm, without weight decay on vectors.

    The state of the fused ones is allocated here, as zeros: if the first step were skipped
    (`found_inf`), SGD would otherwise keep uninitialized momentum, and a lack of memory would show
    only during training.

    Raises:
        UserError: timm does not have the optimizer, or it needs second derivatives.
    """
    if schedule.name.startswith(TIMM):
        return _of_timm(model, schedule)
    momentum = schedule.momentum
    parameters = [p for p in model.parameters() if p.requires_grad]
    if schedule.name == "muon":
        decay = schedule.weight_decay
        return Muon(parameters, schedule.lr, momentum=momentum, weight_decay=decay)
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


def _of_timm(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    import timm.optim

    optim: Any = timm.optim
    name, known = schedule.name.removeprefix(TIMM), optim.list_optimizers()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        fix = f"did you mean {TIMM}{close[0]}?" if close else ""
        raise invalid("optim.name", schedule.name, "an optimizer of timm.optim", fix)
    info = optim.get_optimizer_info(name)
    options: dict[str, Any] = {}
    if info.second_order:
        expected = "an optimizer that needs no second derivatives"
        raise invalid("optim.name", schedule.name, expected, "choose another")
    if info.has_betas:
        kind = optim.get_optimizer_class(name, bind_defaults=False)
        betas = inspect.signature(kind).parameters.get("betas")
        if betas is not None and isinstance(betas.default, tuple):
            options["betas"] = (schedule.momentum, *betas.default[1:])
    options |= {"weight_decay": schedule.weight_decay, "momentum": schedule.momentum}
    made: torch.optim.Optimizer = optim.create_optimizer_v2(model, name, lr=schedule.lr, **options)
    return made


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, times its `lr_scale` if it has one.

    On CUDA it is rounded to float32, since captured steps read it from the device as such.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if any(p.is_cuda for p in group["params"][:1]):
            group["lr"] = ctypes.c_float(group["lr"]).value
