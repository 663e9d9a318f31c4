"""Tables of coefficients for consistency models; see `sampling/solvers.py` for the columns.

K is the number of steps.
Sources: Song et al., consistency models (arXiv 2303.01469), algorithm 1 and appendix C; Chen et
al., SANA-Sprint (arXiv 2503.09641), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmkd_fast.denoisers.config_values import number
from dmkd_fast.sampling.noise_levels import Scheduler

Built = tuple[dict[str, Tensor], float, float | None]
"""Columns (K,) by name, standard deviation of the first x, clip."""


def consistency(scheduler: Scheduler, num_steps: int, trained: int) -> Built:
    """Build the table of a consistency model.

    Each step estimates the clean image; all but the last add noise to the estimate again.
    """
    low = number("scheduler", scheduler, "sigma_min", 0.002, low=1e-6, high=1e6)
    high = number("scheduler", scheduler, "sigma_max", 80.0, low=low, high=1e6)
    data = number("scheduler", scheduler, "sigma_data", 0.5, low=0, high=1e6)
    rho = number("scheduler", scheduler, "rho", 7.0, low=0.1, high=100.0)
    places = torch.arange(num_steps, dtype=torch.float64) * (trained // num_steps)
    ramp = places / max(1, trained - 1)
    sigma = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    after = torch.cat((sigma[1:], torch.full_like(sigma[:1], low))).clamp(low, high)
    noise = (
        number("scheduler", scheduler, "s_noise", 1.0, low=0)
        * (after.square() - low**2).clamp(min=0).sqrt()
    )
    columns = {
        "timestep": 250 * sigma.log(),
        "input_scale": (sigma.square() + data**2).rsqrt(),
        "skip": data**2 / ((sigma - low).square() + data**2),
        "out": (sigma - low) * data / (sigma.square() + data**2).sqrt(),
        "b0": torch.ones_like(sigma),
        "n": noise,
    }
    clip = 1.0 if scheduler.get("clip_denoised", True) else None
    return columns, high, clip


def trig_flow(scheduler: Scheduler, num_steps: int, trained: int) -> Built:
    """Build the table of a continuous-time consistency model (arXiv 2503.09641, section 3).

    x = cos(t) * image + sin(t) * noise. The network is that of a flow model at the noise level
    s = sin(t) / (sin(t) + cos(t)), whose state is x divided by the length r of (1 - s, s).
    """
    del scheduler, trained  # the standard deviation of the data, sigma_data, cancels out
    time = torch.linspace(1.5708, 0.0, num_steps + 1, dtype=torch.float64)
    if num_steps == 2:  # as diffusers' SanaSprintPipeline chooses them
        time = torch.tensor([1.5708, 1.3, 0.0], dtype=torch.float64)
    now, after = time[:-1], time[1:]
    level = now.sin() / (now.sin() + now.cos())
    length = (level.square() + (1 - level).square()).sqrt()
    columns = {
        "timestep": level,
        "input_scale": length,
        "skip": now.cos() - now.sin() * (1 - 2 * level),
        "out": -now.sin() * length,
        "b0": after.cos(),
        "n": after.sin(),
    }
    return columns, 1.0, None
