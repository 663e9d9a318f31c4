"""Diffusion solvers as tables of coefficients, built once from a scheduler's config.

No scheduler object is needed while sampling. One step of every solver is ::

    f = model(input_scale * x, timestep)          # the model's prediction
    m = skip * x + out * f                        # the image estimate
    x = a * x + b0 * clip(m) + b1 * m_before + u * m + n * z

where z is fresh noise and m_before is the clipped m of the previous step. K is the number of steps.

Sources: Ho et al., DDPM (arXiv 2006.11239), eq. 7; Nichol & Dhariwal (arXiv 2102.09672), eq. 15,
for learned variances; Song et al., DDIM (arXiv 2010.02502), eq. 12 with eta = 0; Karras et al.,
Euler steps in the noise level (arXiv 2206.00364), algorithm 1; Lu et al., DPM-Solver++ (arXiv
2211.01095), algorithm 2; Lipman et al., flow matching (arXiv 2210.02747). Consistency models:
`sampling/consistency.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dmkd_fast.denoisers.config_values import number, whole
from dmkd_fast.runtime import checks
from dmkd_fast.runtime.errors import invalid, warn_once
from dmkd_fast.sampling.arguments import Steps
from dmkd_fast.sampling.consistency import Built, consistency, trig_flow
from dmkd_fast.sampling.noise_levels import (
    FLOW,
    SCM,
    SPACINGS,
    Scheduler,
    alpha_bar,
    check_supported,
    choose_solver,
    clip_of,
    dpm_alpha_bar,
    flow_sigmas,
    spaced_sigmas,
    spaced_timesteps,
    trained_steps,
)


@dataclass(frozen=True, kw_only=True)
class SolverTable:
    """The coefficients of all steps of a solver; see the top of this file."""

    COLUMNS = (
        "timestep",
        "input_scale",
        "skip",
        "out",
        "a",
        "b0",
        "b1",
        "u",
        "n",
        "log_variance_low",
        "log_variance_high",
    )

    rows: Tensor
    """Coefficients, one row per step: (K, len(COLUMNS)) float32."""
    initial_scale: float
    """Standard deviation of the first x."""
    clip: float | None
    """Image estimates are clamped to [-clip, clip]; None means no clamping."""
    learned_variance: bool
    """Whether the noise term is n * exp(v / 2) * z. The model predicts where the log variance v
    lies between `log_variance_low` and `log_variance_high`."""

    @property
    def stochastic(self) -> tuple[bool, ...]:
        """Whether each step adds noise."""
        return tuple((self.column("n") != 0).tolist())

    def column(self, name: str) -> Tensor:
        """Return one coefficient of all steps, (K,) float32."""
        return self.rows[:, self.COLUMNS.index(name)]


def solver_table(scheduler: Scheduler, steps: Steps, device: torch.device) -> SolverTable:
    """Build the coefficient table for the scheduler that a model was published with.

    Args:
        scheduler: Content of the model's scheduler_config.json. It fixes noise levels, prediction
            type, clipping and timesteps. The diffusers scheduler that belongs to the solver,
            created with `from_config`, gives the same numbers.
        steps: Number of steps, K, and solver.
        device: Device of the table.

    Raises:
        UserError: The scheduler, one of its settings or the solver is not supported for this
            model, or K is larger than the number of trained timesteps.
    """
    trained, count = trained_steps(scheduler), steps.count
    checks.whole("steps.count", count, low=1, high=trained)
    solver = choose_solver(scheduler, steps.solver)
    check_supported(scheduler, solver)
    distilled = scheduler.get("distilled_steps")
    if distilled is not None and (count, solver) != (distilled, choose_solver(scheduler, "auto")):
        got = f"{count}, {solver!r} for a denoiser distilled to {distilled!r:.60} steps"
        raise invalid("steps", got, f"{distilled!r:.60}, 'auto'", "set them so")
    if scheduler["_class_name"] == FLOW:
        columns, initial_scale, clip = _flow(scheduler, count, trained, solver)
    else:
        build: dict[str, Callable[[Scheduler, int, int], Built]] = {
            "ddpm": _ddpm,
            "ddim": _ddim,
            "dpm++2m": _dpm,
            "euler": partial(_euler, ancestral=False),
            "euler_ancestral": partial(_euler, ancestral=True),
            "consistency": trig_flow if scheduler["_class_name"] == SCM else consistency,
        }
        columns, initial_scale, clip = build[solver](scheduler, count, trained)
    rows = torch.zeros(count, len(SolverTable.COLUMNS), dtype=torch.float64)
    rows[:, SolverTable.COLUMNS.index("input_scale")] = 1
    for column, values in columns.items():
        rows[:, SolverTable.COLUMNS.index(column)] = values
    rows = rows.float()
    if not (rows.isfinite().all() and math.isfinite(initial_scale)):
        got = f"{count}, for which {solver} has coefficients that are not finite"
        fix = "lower it, or correct the betas in scheduler_config.json"
        raise invalid("steps.count", got, "fewer", fix)
    return SolverTable(
        rows=rows.to(device),
        initial_scale=initial_scale,
        clip=clip,
        learned_variance="log_variance_low" in columns,
    )


def _flow(scheduler: Scheduler, num_steps: int, trained: int, solver: str) -> Built:
    """Build the table of a flow model.

    x = (1 - s) * image + s * noise, and the model predicts the velocity noise - image.
    """
    shift = number("scheduler", scheduler, "shift", 1.0, low=1e-6, high=1e6)
    lowest = None
    if scheduler.get("lowest_sigma") is not None:
        lowest = number("scheduler", scheduler, "lowest_sigma", low=1e-6, high=1)
    sigma = flow_sigmas(num_steps, shift, lowest)
    if solver == "ddpm":
        columns = _ancestral(1 - sigma, sigma)
    else:
        columns = _exponential(1 - sigma, sigma, second_order=solver == "dpm++2m")
    columns |= {
        "timestep": sigma[:-1] * trained,
        "skip": torch.ones_like(sigma[:-1]),
        "out": -sigma[:-1],
    }
    return columns, 1.0, None


def _ddim(scheduler: Scheduler, num_steps: int, trained: int) -> Built:
    levels = alpha_bar(scheduler, trained)
    timesteps = spaced_timesteps(scheduler, num_steps, trained, default="leading")
    final = 1.0 if scheduler.get("set_alpha_to_one", True) else float(levels[0])
    # diffusers steps to t - trained // K, whatever the timestep spacing is.
    before = timesteps - trained // num_steps
    if not torch.equal(before[:-1], timesteps[1:]):
        spacing = scheduler.get("timestep_spacing")
        warn_once(
            f"ddim: with timestep_spacing={spacing} and {num_steps} steps a step ends at another "
            "noise level than the next one begins at, as in diffusers' DDIMScheduler; dpm++2m has "
            "no such gap"
        )
    after = torch.where(before >= 0, levels[before.clamp(min=0)], final)
    alpha, sigma = levels[timesteps].sqrt(), (1 - levels[timesteps]).sqrt()
    next_alpha, next_sigma = after.sqrt(), (1 - after).sqrt()
    # As in diffusers, the noise direction is computed from the unclipped estimate (column u).
    columns = {
        "timestep": timesteps.double(),
        "a": next_sigma / sigma,
        "b0": next_alpha,
        "u": -next_sigma * alpha / sigma,
        **_estimate(scheduler, alpha, sigma),
    }
    return columns, 1.0, clip_of(scheduler)


def _ddpm(scheduler: Scheduler, num_steps: int, trained: int) -> Built:
    levels = alpha_bar(scheduler, trained)
    timesteps = spaced_timesteps(scheduler, num_steps, trained, default="leading")
    now = levels[timesteps]
    after = torch.cat((now[1:], torch.ones_like(now[:1])))  # the last step ends at zero noise
    beta = 1 - now / after
    posterior = ((1 - after) / (1 - now) * beta).clamp(min=1e-20)
    kind = scheduler.get("variance_type") or "fixed_small"  # None in configs of DPM solvers
    drawn = (timesteps > 0).double()
    columns = {
        "timestep": timesteps.double(),
        "a": (now / after).sqrt() * (1 - after) / (1 - now),
        "b0": after.sqrt() * beta / (1 - now),
        **_estimate(scheduler, now.sqrt(), (1 - now).sqrt()),
    }
    if kind == "fixed_small":
        columns["n"] = posterior.sqrt() * drawn
    elif kind == "fixed_large":
        columns["n"] = beta.sqrt() * drawn
    elif kind == "learned_range":
        columns |= {
            "n": drawn,
            # A step without noise still computes 0 * exp of these, so exp must not overflow.
            "log_variance_low": posterior.log() * drawn,
            "log_variance_high": beta.log() * drawn,
        }
    else:
        expected = "fixed_small, fixed_large or learned_range"
        raise invalid("scheduler", f"variance_type={kind!r:.60}", expected)
    return columns, 1.0, clip_of(scheduler)


def _dpm(scheduler: Scheduler, num_steps: int, trained: int) -> Built:
    order = whole("scheduler", scheduler, "solver_order", 2, high=2)
    first_order_end = bool(scheduler.get("euler_at_final", False)) or (
        bool(scheduler.get("lower_order_final", True)) and num_steps < 15
    )
    if scheduler.get("use_flow_sigmas"):
        sigma, timesteps = _dpm_flow(scheduler, num_steps, trained)
        columns = _exponential(
            1 - sigma, sigma, second_order=order == 2, first_order_end=first_order_end
        )
        ones = torch.ones(num_steps, dtype=torch.float64)
        return columns | {"timestep": timesteps, "skip": ones, "out": -sigma[:-1]}, 1.0, None
    levels = dpm_alpha_bar(scheduler, trained)
    final = scheduler.get("final_sigmas_type", "zero")
    if final not in ("zero", "sigma_min"):
        raise invalid("scheduler", f"final_sigmas_type={final!r:.60}", "zero or sigma_min")
    end = torch.ones_like(levels[:1]) if final == "zero" else levels[:1]
    spaced = spaced_sigmas(scheduler, num_steps, trained)
    if spaced is not None:
        timesteps, levels = spaced[0], 1 / (1 + spaced[1].square())
    else:
        # diffusers spaces K + 1 timesteps and drops the last one.
        timesteps = spaced_timesteps(scheduler, num_steps, trained, default="linspace", extra=1)
        levels = levels[timesteps]
    levels = torch.cat((levels, end))
    alpha, sigma = levels.sqrt(), (1 - levels).sqrt()
    columns = _exponential(
        alpha, sigma, second_order=order == 2, first_order_end=first_order_end
    ) | {"timestep": timesteps.double(), **_estimate(scheduler, alpha[:-1], sigma[:-1])}
    return columns, 1.0, None


def _dpm_flow(scheduler: Scheduler, num_steps: int, trained: int) -> tuple[Tensor, Tensor]:
    """Return noise levels (K + 1,) and timesteps (K,) of a flow model with a DPM scheduler."""
    needed = {"prediction_type": "flow_prediction", "final_sigmas_type": "zero"}
    for key, wanted in (needed | dict.fromkeys(SPACINGS, False)).items():
        if (got := scheduler.get(key, wanted)) != wanted:
            what = f"{key}={got!r:.60} with use_flow_sigmas"
            raise invalid("scheduler", what, str(wanted), "use another model")
    shift = number("scheduler", scheduler, "flow_shift", 1.0, low=1e-6, high=1e6)
    # By NumPy as in diffusers, which cuts timesteps to whole numbers after its rounding errors.
    levels = 1 - np.linspace(1, 1 / trained, num_steps + 1)
    levels = np.flip(shift * levels / (1 + (shift - 1) * levels)).copy()
    return torch.from_numpy(levels), torch.from_numpy(levels[:-1] * trained).floor()


def _euler(scheduler: Scheduler, num_steps: int, trained: int, *, ancestral: bool) -> Built:
    """Build the table of Euler steps, with fresh noise if `ancestral`.

    The state is x / alpha = image + s * noise, whose noise level s falls to 0.
    """
    levels = alpha_bar(scheduler, trained)
    all_sigmas = ((1 - levels) / levels).sqrt()
    spacing = scheduler.get("timestep_spacing", "linspace")
    if spacing == "linspace":  # not rounded, unlike for other solvers
        timesteps = torch.linspace(0, trained - 1, num_steps, dtype=torch.float64).flip(0)
    else:
        timesteps = spaced_timesteps(scheduler, num_steps, trained, default="linspace").double()
    below = timesteps.long()
    sigma = torch.lerp(
        all_sigmas[below], all_sigmas[(below + 1).clamp(max=trained - 1)], timesteps - below
    )
    end = torch.zeros_like(sigma[:1])
    if not ancestral and scheduler.get("final_sigmas_type", "zero") != "zero":
        end = all_sigmas[:1]
    after = torch.cat((sigma[1:], end))
    fresh = (after / sigma).square() * (sigma.square() - after.square()) * ancestral
    a = (after.square() - fresh).clamp(min=0).sqrt() / sigma
    alpha = (sigma.square() + 1).rsqrt()
    columns = _estimate(scheduler, alpha, sigma * alpha)
    columns |= {
        "timestep": timesteps,
        "input_scale": alpha,
        "skip": columns["skip"] * alpha,
        "a": a,
        "b0": 1 - a,
        "n": fresh.clamp(min=0).sqrt(),
    }
    first = sigma[0] if spacing in ("linspace", "trailing") else (sigma[0].square() + 1).sqrt()
    return columns, float(first), None


def _exponential(
    alpha: Tensor, sigma: Tensor, *, second_order: bool, first_order_end: bool = False
) -> dict[str, Tensor]:
    """Return columns a, b0 and b1 of DPM-Solver++.

    The noise levels are those of x = alpha * image + sigma * noise. The first-order step is the
    exact solution for a constant image estimate. It equals the step of DDIM and of Euler.

    Args:
        alpha, sigma: (K + 1,) each, from the first noise level to the last.
        second_order: Whether to extrapolate from the previous image estimate.
        first_order_end: Whether the last step is of first order.
    """
    a = sigma[1:] / sigma[:-1]
    newest = alpha[1:] - a * alpha[:-1]
    lean = torch.zeros_like(newest)
    if second_order:
        h = (alpha / sigma).log().diff()  # steps in half of the log signal-to-noise ratio
        # A step stays first order if its h or the previous one is infinite (alpha or sigma is 0).
        inner = torch.isfinite(h[1:]) & torch.isfinite(h[:-1])
        lean[1:][inner] = (h[1:] / (2 * h[:-1]))[inner]
        if first_order_end:
            lean[-1] = 0
    return {"a": a, "b0": newest * (1 + lean), "b1": -newest * lean}


def _ancestral(alpha: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """Return columns a, b0 and n of DDPM's step, a draw from q(next x | x, image estimate).

    The noise levels are those of x = alpha * image + sigma * noise, as for `_exponential`.
    """
    kept = alpha[:-1] / alpha[1:]  # of x at the next noise level, in x at this one
    added = sigma[:-1].square() - (kept * sigma[1:]).square()  # noise between them, as a variance
    ratio = sigma[1:] / sigma[:-1]
    return {
        "a": kept * ratio.square(),
        "b0": alpha[1:] * added / sigma[:-1].square(),
        "n": added.sqrt() * ratio,
    }


def _estimate(scheduler: Scheduler, alpha: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """Return columns skip and out, so that skip * x + out * f is the image estimate."""
    kind = scheduler.get("prediction_type", "epsilon")
    if kind == "epsilon":
        if scheduler.get("rescale_betas_zero_snr") and not alpha.all():
            got = "prediction_type=epsilon with rescale_betas_zero_snr"
            fix = "use solver dpm++2m or a v-prediction model"
            raise invalid("scheduler", got, "v_prediction, as the first x is only noise", fix)
        return {"skip": 1 / alpha, "out": -sigma / alpha}
    if kind == "v_prediction":
        return {"skip": alpha, "out": -sigma}
    if kind == "sample":
        return {"skip": torch.zeros_like(alpha), "out": torch.ones_like(alpha)}
    got = f"prediction_type={kind!r:.60}"
    raise invalid("scheduler", got, "epsilon, v_prediction or sample")
