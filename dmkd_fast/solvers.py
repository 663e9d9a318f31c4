"""Diffusion solvers as tables of coefficients, built once from a scheduler's config.

Stands on floor 1. No scheduler object exists at run time: one step of every solver is ::

    f = model(input_scale * x, timestep)          # what the model predicts
    m = skip * x + out * f                        # its estimate of the image
    x = a * x + b0 * clip(m) + b1 * m_before + u * m + n * z

with z new noise and m_before the clipped m of the step before. K steps.

Sources: Ho et al., DDPM (arXiv 2006.11239), eq. 7; Nichol & Dhariwal (arXiv 2102.09672), eq. 15,
for learned variances; Song et al., DDIM (arXiv 2010.02502), eq. 12 with eta = 0; Lu et al.,
DPM-Solver++ (arXiv 2211.01095), algorithm 2; Lipman et al., flow matching (arXiv 2210.02747); Song
et al., consistency models (arXiv 2303.01469), algorithm 1 and appendix C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Solver = Literal["auto", "ddpm", "ddim", "dpm++2m", "euler", "consistency"]
Scheduler = dict[str, Any]
"""Content of a diffusers `scheduler_config.json`."""

FLOW, CONSISTENCY = "FlowMatchEulerDiscreteScheduler", "CMStochasticIterativeScheduler"
# Schedulers that share DDPM's noise levels, and what each solves with when not told otherwise.
VARIANCE_PRESERVING = {
    "DDPMScheduler": "ddpm", "DDIMScheduler": "ddim", "DPMSolverMultistepScheduler": "dpm++2m",
    "PNDMScheduler": None, "EulerDiscreteScheduler": None, "EulerAncestralDiscreteScheduler": None,
    "UniPCMultistepScheduler": None, "LMSDiscreteScheduler": None,
}  # fmt: skip
# Settings that would change the result and are not built: they must have these values, if present.
UNSUPPORTED = {
    "thresholding": False, "rescale_betas_zero_snr": False, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False,
    "use_flow_sigmas": False, "use_dynamic_shifting": False, "stochastic_sampling": False,
    "invert_sigmas": False, "shift_terminal": None, "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint", "lambda_min_clipped": -math.inf,
}  # fmt: skip
OWN_KEYS = {"algorithm_type": "dpm++2m", "solver_type": "dpm++2m", "lambda_min_clipped": "dpm++2m"}


@dataclass(frozen=True, kw_only=True)
class SolverTable:
    """Coefficients of all steps."""

    COLUMNS = ("timestep", "input_scale", "skip", "out", "a", "b0", "b1", "u", "n",
               "log_variance_low", "log_variance_high")  # fmt: skip

    rows: Tensor
    """(K, len(COLUMNS)) float32."""
    initial_scale: float
    """Standard deviation of the first x."""
    clip: float | None
    """Image estimates are clamped to [-clip, clip]; None: not at all."""
    learned_variance: bool
    """n * z is replaced by exp(v / 2) * z, v between the two log variances as the model says."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def stochastic(self) -> tuple[bool, ...]:
        """Which steps draw noise."""
        return tuple((self.column("n") != 0).tolist())

    def column(self, name: str) -> Tensor:
        """(K,) float32."""
        return self.rows[:, self.COLUMNS.index(name)]


def solver_table(
    scheduler: Scheduler, num_steps: int, device: torch.device, *, solver: Solver = "auto"
) -> SolverTable:
    """Coefficients for the scheduler that a model was published with.

    Args:
        scheduler: Fixes noise levels, prediction type, clipping and timesteps. Diffusers' scheduler
            of the solver's name, made `from_config` of it, gives the same numbers.
        num_steps: K.
        device: Of the table.
        solver: "auto" is the scheduler's own. Models trained with DDPM's noise levels take "ddpm",
            "ddim" and "dpm++2m", flow models "euler" and "dpm++2m" (second order at the same cost).

    Raises:
        ValueError: The scheduler, one of its settings or the solver is not supported for this
            model, or K is more than it has.
    """
    name = str(scheduler.get("_class_name"))
    trained = int(scheduler.get("num_train_timesteps", 40 if name == CONSISTENCY else 1000))
    if not 1 <= num_steps <= trained:
        raise ValueError(f"num_steps: got {num_steps}, expected 1 to {trained}; change it")
    chosen = choose_solver(scheduler, solver)
    for key, value in UNSUPPORTED.items():
        if OWN_KEYS.get(key, chosen) == chosen and scheduler.get(key, value) not in (value, "-inf"):
            raise ValueError(
                f"scheduler: got {key}={scheduler[key]!r}, expected {value!r}: not supported"
            )
    distilled = scheduler.get("distilled_steps")
    if distilled is not None and (num_steps, chosen) != (distilled, "euler"):
        raise ValueError(
            f"num_steps, solver: got {num_steps}, {chosen!r} for a denoiser distilled to "
            f"{distilled} steps, expected {distilled}, 'euler'; set them so"
        )
    if name == FLOW:
        build = _flow
    elif name == CONSISTENCY:
        build = _consistency
    else:
        build = {"ddpm": _ddpm, "ddim": _ddim, "dpm++2m": _dpm}[chosen]
    columns, initial_scale, clip = build(scheduler, num_steps, trained, chosen)
    rows = torch.zeros(num_steps, len(SolverTable.COLUMNS), dtype=torch.float64)
    rows[:, SolverTable.COLUMNS.index("input_scale")] = 1
    for column, values in columns.items():
        rows[:, SolverTable.COLUMNS.index(column)] = values
    return SolverTable(
        rows=rows.to(device=device, dtype=torch.float32),
        initial_scale=initial_scale,
        clip=clip,
        learned_variance="log_variance_low" in columns,
    )


def choose_solver(scheduler: Scheduler, solver: Solver) -> str:
    """Turn "auto" into the scheduler's own solver; check other names.

    Raises:
        ValueError: The scheduler is not known, or the solver is not for models like this.
    """
    name = str(scheduler.get("_class_name"))
    possible: tuple[str, ...]
    if name == FLOW:
        possible, own = ("euler", "dpm++2m"), "euler"
    elif name == CONSISTENCY:
        possible, own = ("consistency",), "consistency"
    elif name in VARIANCE_PRESERVING:
        possible, own = ("ddpm", "ddim", "dpm++2m"), VARIANCE_PRESERVING[name] or ""
    else:
        known = ", ".join([FLOW, CONSISTENCY, *VARIANCE_PRESERVING])
        raise ValueError(f"scheduler: got {name}, expected one of {known}; use another model")
    chosen = own if solver == "auto" else solver
    if chosen not in possible:
        raise ValueError(
            f"solver: got {solver!r} for a model with {name}, expected one of "
            f"{', '.join(possible)}; change the solver (all: {', '.join(get_args(Solver))})"
        )
    return chosen


def flow_sigmas(num_steps: int, shift: float) -> Tensor:
    """Noise levels 1 = s_0 > ... > s_K = 0, (K + 1,) float64: equal steps, then shifted."""
    sigmas = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


Built = tuple[dict[str, Tensor], float, float | None]


def _flow(scheduler: Scheduler, num_steps: int, trained: int, solver: str) -> Built:
    """x = (1 - s) image + s noise; the model predicts the velocity noise - image."""
    sigma = flow_sigmas(num_steps, float(scheduler.get("shift", 1.0)))
    columns = _exponential(1 - sigma, sigma, second_order=solver == "dpm++2m")
    columns |= {
        "timestep": sigma[:-1] * trained,
        "skip": torch.ones_like(sigma[:-1]),
        "out": -sigma[:-1],
    }
    return columns, 1.0, None


def _ddim(scheduler: Scheduler, num_steps: int, trained: int, solver: str) -> Built:
    del solver
    alpha_bar = _alpha_bar(scheduler, trained)
    timesteps = _timesteps(scheduler, num_steps, trained, default="leading")
    final = 1.0 if scheduler.get("set_alpha_to_one", True) else float(alpha_bar[0])
    # Diffusers steps to t - trained // K whatever the spacing.
    before = timesteps - trained // num_steps
    after = torch.where(before >= 0, alpha_bar[before.clamp(min=0)], final)
    alpha, sigma = alpha_bar[timesteps].sqrt(), (1 - alpha_bar[timesteps]).sqrt()
    next_alpha, next_sigma = after.sqrt(), (1 - after).sqrt()
    # The direction to x keeps the noise that the unclipped estimate implies.
    columns = {
        "timestep": timesteps.double(),
        "a": next_sigma / sigma,
        "b0": next_alpha,
        "u": -next_sigma * alpha / sigma,
        **_estimate(scheduler, alpha, sigma),
    }
    return columns, 1.0, _clip(scheduler)


def _ddpm(scheduler: Scheduler, num_steps: int, trained: int, solver: str) -> Built:
    del solver
    alpha_bar = _alpha_bar(scheduler, trained)
    timesteps = _timesteps(scheduler, num_steps, trained, default="leading")
    now = alpha_bar[timesteps]
    after = torch.cat((now[1:], torch.ones_like(now[:1])))  # the last step ends without noise
    beta = 1 - now / after
    posterior = ((1 - after) / (1 - now) * beta).clamp(min=1e-20)
    kind = scheduler.get("variance_type", "fixed_small")
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
            "log_variance_low": posterior.log(),
            "log_variance_high": beta.log(),
        }
    else:
        raise ValueError(
            f"scheduler: got variance_type={kind!r}, expected fixed_small, fixed_large or "
            "learned_range: not supported"
        )
    return columns, 1.0, _clip(scheduler)


def _dpm(scheduler: Scheduler, num_steps: int, trained: int, solver: str) -> Built:
    del solver
    order = int(scheduler.get("solver_order", 2))
    if order not in (1, 2):
        raise ValueError(f"scheduler: got solver_order={order}, expected 1 or 2: not supported")
    alpha_bar = _alpha_bar(scheduler, trained)
    # Diffusers spaces K + 1 timesteps and leaves out the last one.
    timesteps = _timesteps(scheduler, num_steps, trained, default="linspace", extra=1)
    if len(timesteps) != num_steps:
        raise ValueError(
            f"num_steps: got {num_steps}, for which this scheduler makes {len(timesteps)} steps; "
            "use a divisor of num_train_timesteps"
        )
    final = scheduler.get("final_sigmas_type", "zero")
    end = torch.ones_like(alpha_bar[:1]) if final == "zero" else alpha_bar[:1]
    levels = torch.cat((alpha_bar[timesteps], end))
    alpha, sigma = levels.sqrt(), (1 - levels).sqrt()
    first_order_end = bool(scheduler.get("euler_at_final", False)) or (
        bool(scheduler.get("lower_order_final", True)) and num_steps < 15
    )
    columns = _exponential(
        alpha, sigma, second_order=order == 2, first_order_end=first_order_end
    ) | {"timestep": timesteps.double(), **_estimate(scheduler, alpha[:-1], sigma[:-1])}
    return columns, 1.0, None


def _consistency(scheduler: Scheduler, num_steps: int, trained: int, solver: str) -> Built:
    """Noise is added to a clean estimate and taken away again, K times."""
    del solver
    low, high = float(scheduler.get("sigma_min", 0.002)), float(scheduler.get("sigma_max", 80.0))
    data, rho = float(scheduler.get("sigma_data", 0.5)), float(scheduler.get("rho", 7.0))
    places = torch.arange(num_steps, dtype=torch.float64) * (trained // num_steps)
    ramp = places / max(1, trained - 1)
    sigma = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    after = torch.cat((sigma[1:], torch.full_like(sigma[:1], low))).clamp(low, high)
    noise = float(scheduler.get("s_noise", 1.0)) * (after.square() - low**2).clamp(min=0).sqrt()
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


def _exponential(
    alpha: Tensor, sigma: Tensor, *, second_order: bool, first_order_end: bool = False
) -> dict[str, Tensor]:
    """DPM-Solver++ over the levels x = alpha * image + sigma * noise, (K + 1,) each.

    First order is the exact solution for a constant image estimate: DDIM's and Euler's step alike.
    """
    a = sigma[1:] / sigma[:-1]
    newest = alpha[1:] - a * alpha[:-1]
    lean = torch.zeros_like(newest)
    if second_order:
        h = (alpha / sigma).log().diff()  # steps in half the log signal-to-noise ratio
        # Infinite intervals (pure noise before, no noise after) stay first order.
        inner = torch.isfinite(h[1:]) & torch.isfinite(h[:-1])
        lean[1:][inner] = (h[1:] / (2 * h[:-1]))[inner]
        if first_order_end:
            lean[-1] = 0
    return {"a": a, "b0": newest * (1 + lean), "b1": -newest * lean}


def _estimate(scheduler: Scheduler, alpha: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """skip and out, so that skip * x + out * f is the image estimate."""
    kind = scheduler.get("prediction_type", "epsilon")
    if kind == "epsilon":
        return {"skip": 1 / alpha, "out": -sigma / alpha}
    if kind == "v_prediction":
        return {"skip": alpha, "out": -sigma}
    if kind == "sample":
        return {"skip": torch.zeros_like(alpha), "out": torch.ones_like(alpha)}
    raise ValueError(
        f"scheduler: got prediction_type={kind!r}, expected epsilon, v_prediction or sample"
    )


def _clip(scheduler: Scheduler) -> float | None:
    clips = scheduler.get("clip_sample", True)
    return float(scheduler.get("clip_sample_range", 1.0)) if clips else None


def _alpha_bar(scheduler: Scheduler, trained: int) -> Tensor:
    """Cumulative products of 1 - beta, (trained,) float64."""
    kind, given = scheduler.get("beta_schedule", "linear"), scheduler.get("trained_betas")
    start = float(scheduler.get("beta_start", 0.0001))
    end = float(scheduler.get("beta_end", 0.02))
    if given is not None:
        betas = torch.tensor(given, dtype=torch.float64)
    elif kind == "linear":
        betas = torch.linspace(start, end, trained, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, trained, dtype=torch.float64) ** 2
    elif kind == "squaredcos_cap_v2":
        places = torch.arange(trained + 1, dtype=torch.float64) / trained
        bar = ((places + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        raise ValueError(
            f"scheduler: got beta_schedule={kind!r}, expected linear, scaled_linear or "
            "squaredcos_cap_v2"
        )
    return torch.cumprod(1 - betas, dim=0)


def _timesteps(
    scheduler: Scheduler, num_steps: int, trained: int, *, default: str, extra: int = 0
) -> Tensor:
    """Descending (K,) int64, spaced as the scheduler's config says."""
    spacing = scheduler.get("timestep_spacing", default)
    count = num_steps + extra
    if spacing == "leading":
        ascending = torch.arange(count) * (trained // count)
        ascending = ascending + int(scheduler.get("steps_offset", 0))
        if int(ascending[-1]) >= trained:
            raise ValueError(
                f"num_steps: got {num_steps}, which with steps_offset reaches timestep "
                f"{int(ascending[-1])} of {trained}; lower it"
            )
        return ascending.flip(0)[:num_steps]
    if spacing == "linspace":
        ascending = torch.linspace(0, trained - 1, count, dtype=torch.float64).round().long()
        return ascending.flip(0)[:num_steps]
    if spacing == "trailing":
        count_down = torch.arange(trained, 0, -trained / num_steps, dtype=torch.float64)
        return count_down.round().long() - 1
    raise ValueError(
        f"scheduler: got timestep_spacing={spacing!r}, expected leading, linspace or trailing"
    )
