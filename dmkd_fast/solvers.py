"""Diffusion solvers as tables of coefficients, built once from a scheduler's config.

Stands on floor 1. One step is x_{k+1} = a_k * x_k + b_k * m_k, where m_k is what the model predicts
at x_k and timestep t_k. No scheduler object exists at run time. K steps.

Sources: Song et al., DDIM (arXiv 2010.02502), eq. 12 with eta = 0; Lipman et al., flow matching
(arXiv 2210.02747), integrated by Euler's method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SolverTable:
    """Coefficients of all steps, (K,) float32 each."""

    timesteps: Tensor
    """What the model is given, in [0, 1000)."""
    a: Tensor
    b: Tensor


def solver_table(scheduler: dict[str, Any], num_steps: int, device: torch.device) -> SolverTable:
    """Coefficients for the scheduler that a model was published with.

    Args:
        scheduler: Content of `scheduler_config.json`.
        num_steps: K.
        device: Of the table.

    Raises:
        ValueError: The scheduler is not supported, or K is more than it has.
    """
    name = scheduler.get("_class_name")
    trained = int(scheduler.get("num_train_timesteps", 1000))
    if num_steps > trained:
        raise ValueError(f"num_steps: got {num_steps}, expected at most {trained}; lower it")
    if name == "FlowMatchEulerDiscreteScheduler":
        timesteps, a, b = _euler_flow(num_steps, trained, float(scheduler.get("shift", 1.0)))
    elif name == "DDIMScheduler" and scheduler.get("prediction_type", "epsilon") == "epsilon":
        timesteps, a, b = _ddim(num_steps, trained, scheduler)
    else:
        raise ValueError(
            f"scheduler: got {name!r} predicting {scheduler.get('prediction_type')!r}, expected "
            "FlowMatchEulerDiscreteScheduler or a DDIMScheduler that predicts epsilon"
        )
    table = (values.to(device=device, dtype=torch.float32) for values in (timesteps, a, b))
    return SolverTable(**dict(zip(("timesteps", "a", "b"), table, strict=True)))


def flow_sigmas(num_steps: int, shift: float) -> Tensor:
    """Noise levels 1 = s_0 > ... > s_K = 0, (K + 1,) float64: equal steps, then shifted."""
    sigmas = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _euler_flow(num_steps: int, trained: int, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """The model predicts the velocity noise - image on x = (1 - s) * image + s * noise."""
    sigmas = flow_sigmas(num_steps, shift)
    return sigmas[:-1] * trained, torch.ones(num_steps), sigmas[1:] - sigmas[:-1]


def _ddim(num_steps: int, trained: int, scheduler: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The model predicts epsilon on x = sqrt(alpha_bar) * image + sqrt(1 - alpha_bar) * eps."""
    start, end = float(scheduler["beta_start"]), float(scheduler["beta_end"])
    kind = scheduler.get("beta_schedule", "linear")
    if kind == "linear":
        betas = torch.linspace(start, end, trained, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, trained, dtype=torch.float64) ** 2
    else:
        raise ValueError(f"beta_schedule: got {kind!r}, expected linear or scaled_linear")
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    stride = trained // num_steps
    timesteps = torch.arange(num_steps - 1, -1, -1) * stride + int(scheduler.get("steps_offset", 0))
    now = alpha_bar[timesteps]
    last = torch.ones(()) if scheduler.get("set_alpha_to_one", True) else alpha_bar[0]
    previous = timesteps - stride
    then = torch.where(previous >= 0, alpha_bar[previous.clamp_min(0)], last)
    a = (then / now).sqrt()
    return timesteps, a, (1 - then).sqrt() - a * (1 - now).sqrt()
