"""Diffusion solvers as tables of coefficients, built once from a scheduler's config.

Stands on floor 1. One step is m_k = c_k * x_k + d_k * f_k, x_{k+1} = a_k * x_k + b_k0 * m_k +
b_k1 * m_{k-1}, where f_k is what the model predicts at x_k and timestep t_k and m_k is the quantity
that the solver extrapolates. No scheduler object exists at run time. K steps.

Sources: Song et al., DDIM (arXiv 2010.02502), eq. 12 with eta = 0; Lipman et al., flow matching
(arXiv 2210.02747), integrated by Euler's method; Lu et al., DPM-Solver++ (arXiv 2211.01095),
algorithm 2 (multistep, second order).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Solver = Literal["euler", "dpm++2m"]


@dataclass(frozen=True, kw_only=True)
class SolverTable:
    """Coefficients of all steps, (K,) float32 each, but b."""

    timesteps: Tensor
    """What the model is given, in [0, 1000)."""
    c: Tensor
    d: Tensor
    a: Tensor
    b: Tensor
    """(K, 2): weights of the newest m and of the one before; b[0, 1] is 0."""


def solver_table(
    scheduler: dict[str, Any], num_steps: int, device: torch.device, *, solver: Solver = "euler"
) -> SolverTable:
    """Coefficients for the scheduler that a model was published with.

    Args:
        scheduler: Content of `scheduler_config.json`; fixes noise levels and prediction type.
        num_steps: K.
        device: Of the table.
        solver: "euler" is first order (DDIM for models that predict epsilon), "dpm++2m" second.

    Raises:
        ValueError: The scheduler is not supported, or K is more than it has.
    """
    name = scheduler.get("_class_name")
    trained = int(scheduler.get("num_train_timesteps", 1000))
    if num_steps > trained:
        raise ValueError(f"num_steps: got {num_steps}, expected at most {trained}; lower it")
    # x = alpha * image + sigma * noise; alpha, sigma (K + 1,) and the model's image estimate
    # image = c * x + d * f, (K,) each.
    if name == "FlowMatchEulerDiscreteScheduler":
        sigma = flow_sigmas(num_steps, float(scheduler.get("shift", 1.0)))
        alpha = 1 - sigma
        timesteps = sigma[:-1] * trained
        c, d = torch.ones_like(timesteps), -sigma[:-1]  # f is the velocity noise - image
    elif name == "DDIMScheduler" and scheduler.get("prediction_type", "epsilon") == "epsilon":
        timesteps, alpha, sigma = _ddim_levels(num_steps, trained, scheduler)
        c, d = 1 / alpha[:-1], -sigma[:-1] / alpha[:-1]
    else:
        raise ValueError(
            f"scheduler: got {name!r} predicting {scheduler.get('prediction_type')!r}, expected "
            "FlowMatchEulerDiscreteScheduler or a DDIMScheduler that predicts epsilon"
        )
    # The exact solution for a constant image estimate; Euler's step and DDIM's alike.
    a = sigma[1:] / sigma[:-1]
    newest = alpha[1:] - a * alpha[:-1]
    before = torch.zeros_like(newest)
    if solver == "dpm++2m":
        half_lambda = (alpha / sigma).log()  # half the log signal-to-noise ratio, (K + 1,)
        h = half_lambda.diff()
        # Infinite intervals (pure noise before, no noise after) stay first order.
        lean = torch.zeros_like(h)
        inner = torch.isfinite(h[1:]) & torch.isfinite(h[:-1])
        lean[1:][inner] = (h[1:] / (2 * h[:-1]))[inner]
        newest, before = newest * (1 + lean), -newest * lean
    values = (timesteps, c, d, a, torch.stack((newest, before), dim=1))
    table = (value.to(device=device, dtype=torch.float32) for value in values)
    return SolverTable(**dict(zip(("timesteps", "c", "d", "a", "b"), table, strict=True)))


def flow_sigmas(num_steps: int, shift: float) -> Tensor:
    """Noise levels 1 = s_0 > ... > s_K = 0, (K + 1,) float64: equal steps, then shifted."""
    sigmas = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _ddim_levels(
    num_steps: int, trained: int, scheduler: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps (K,) and alpha, sigma (K + 1,) float64 of a DDIMScheduler."""
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
    last = (
        torch.ones_like(alpha_bar[:1]) if scheduler.get("set_alpha_to_one", True) else alpha_bar[:1]
    )
    levels = torch.cat((alpha_bar[timesteps], last))
    return timesteps, levels.sqrt(), (1 - levels).sqrt()
