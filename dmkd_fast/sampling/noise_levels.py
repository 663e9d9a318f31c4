"""Read noise levels and timesteps from a diffusers `scheduler_config.json`.

Keys are read as diffusers' `from_config` reads them: a scheduler uses the keys that it knows and
ignores all others, which belong to the scheduler that wrote the file. K is the number of steps.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dmkd_fast.denoisers.config_values import number, whole
from dmkd_fast.runtime.errors import invalid

Solver = Literal["auto", "ddpm", "ddim", "dpm++2m", "euler", "euler_ancestral", "consistency"]
Scheduler = dict[str, Any]
"""Content of a diffusers `scheduler_config.json`."""
MOST_TRAINED = 1_000_000

FLOW, CONSISTENCY = "FlowMatchEulerDiscreteScheduler", "CMStochasticIterativeScheduler"
SCM = "SCMScheduler"  # of continuous-time consistency models
# Schedulers that share DDPM's noise levels, and the solver that "auto" chooses. With None, a solver
# must be named.
VARIANCE_PRESERVING = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "PNDMScheduler": None,
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "UniPCMultistepScheduler": None,
    "LMSDiscreteScheduler": None,
    "DEISMultistepScheduler": None,
    "DPMSolverSinglestepScheduler": None,
    "HeunDiscreteScheduler": None,
    "KDPM2DiscreteScheduler": None,
    "KDPM2AncestralDiscreteScheduler": None,
    "DPMSolverSDEScheduler": None,
}
# Values for which the tables are correct, by solver or scheduler class. Keys that diffusers'
# scheduler of that name ignores are not listed.
OFF = (False, None)
SPACINGS = dict.fromkeys(
    ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas"), OFF
)
SUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "ddpm": {"thresholding": OFF},
    "ddim": {"thresholding": OFF},
    "dpm++2m": {
        "thresholding": OFF,
        "use_dynamic_shifting": OFF,
        # DPMSolverMultistepScheduler treats DEIS's value as "dpmsolver++", and the solver types of
        # UniPC and DEIS as "midpoint".
        "algorithm_type": ("dpmsolver++", "deis"),
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
        "lambda_min_clipped": (-math.inf, "-inf"),
    },
    "euler": SPACINGS
    | {
        "rescale_betas_zero_snr": OFF,
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
    },
    "euler_ancestral": {"rescale_betas_zero_snr": OFF},
    FLOW: SPACINGS
    | {
        "use_dynamic_shifting": OFF,
        "stochastic_sampling": OFF,
        "invert_sigmas": OFF,
        "shift_terminal": OFF,
    },
    CONSISTENCY: {},
    SCM: {"prediction_type": ("trigflow",)},
}


def choose_solver(scheduler: Scheduler, solver: Solver) -> str:
    """Resolve "auto" to the scheduler's own solver, and check any other name.

    Raises:
        UserError: The scheduler is unknown, or the solver does not fit models with this scheduler.
    """
    name = str(scheduler.get("_class_name"))
    possible: tuple[str, ...]
    if name == FLOW:
        possible, own = ("euler", "dpm++2m", "ddpm"), "euler"
    elif name in (CONSISTENCY, SCM):
        possible, own = ("consistency",), "consistency"
    elif name in VARIANCE_PRESERVING:
        possible = "ddpm", "ddim", "dpm++2m", "euler", "euler_ancestral"
        own = VARIANCE_PRESERVING[name] or ""
    else:
        known = ", ".join([FLOW, CONSISTENCY, SCM, *VARIANCE_PRESERVING])
        raise invalid("scheduler", f"{name:.60}", f"one of {known}", "use another model")
    chosen = own if solver == "auto" else solver
    if chosen not in possible:
        got, expected = f"{solver!r} for a model with {name}", f"one of {', '.join(possible)}"
        fix = f"change the solver (all: {', '.join(get_args(Solver))})"
        raise invalid("steps.solver", got, expected, fix)
    return chosen


def check_supported(scheduler: Scheduler, chosen: str) -> None:
    """Reject scheduler values for which the table of solver `chosen` would be wrong.

    Raises:
        UserError: A value is not supported; the message names its key.
    """
    name = str(scheduler.get("_class_name"))
    for key, values in SUPPORTED[name if name in SUPPORTED else chosen].items():
        if key in scheduler and scheduler[key] not in values:
            got = f"{key}={scheduler[key]!r:.60}"
            raise invalid("scheduler", got, f"{values[0]!r}", "use another solver or model")


def trained_steps(scheduler: Scheduler) -> int:
    """Return the number of timesteps that the model was trained with."""
    default = 40 if scheduler.get("_class_name") == CONSISTENCY else 1000
    return whole("scheduler", scheduler, "num_train_timesteps", default, high=MOST_TRAINED)


def trained_alike(one: Scheduler, other: Scheduler) -> bool:
    """Return whether models of two schedulers predict the same at the same timesteps."""
    if one.get("_class_name") == other.get("_class_name") == CONSISTENCY:
        return one == other
    if FLOW in (one.get("_class_name"), other.get("_class_name")):
        trained = [
            (s.get("_class_name"), trained_steps(s), s.get("distilled_steps")) for s in (one, other)
        ]
        return trained[0] == trained[1]
    levels = [alpha_bar(scheduler, trained_steps(scheduler)) for scheduler in (one, other)]
    predicted = [scheduler.get("prediction_type", "epsilon") for scheduler in (one, other)]
    return torch.equal(*levels) and predicted[0] == predicted[1]


def clip_of(scheduler: Scheduler) -> float | None:
    """Return the bound to which image estimates are clipped; None means no clipping."""
    if not scheduler.get("clip_sample", True):
        return None
    return number("scheduler", scheduler, "clip_sample_range", 1.0, low=0)


def flow_sigmas(num_steps: int, shift: float, lowest: float | None = None) -> Tensor:
    """Return noise levels 1 = s_0 > ... > s_K = 0 of a flow model, (K + 1,) float64.

    The levels are equally spaced and then shifted. They equal those of diffusers'
    `set_timesteps(sigmas=linspace(1, 1 / K, K))`, which most of its pipelines for flow models call.

    Args:
        num_steps: Number of steps, K.
        shift: Shift of the levels towards 1.
        lowest: Level s_(K-1) before it is shifted; None: 1 / K. `set_timesteps(K)` of diffusers
            has the lowest trained level there.
    """
    sigmas = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    if lowest is not None:
        sigmas[:-1] = torch.linspace(1.0, lowest, num_steps, dtype=torch.float64)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def alpha_bar(scheduler: Scheduler, trained: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the cumulative products of 1 - beta, (trained,), computed in `dtype`.

    Raises:
        UserError: The beta schedule is not supported, or its values are wrong.
    """
    key = "trained_betas"
    kind, given = scheduler.get("beta_schedule", "linear"), scheduler.get(key)
    start = number("scheduler", scheduler, "beta_start", 0.0001, low=0, high=1)
    end = number("scheduler", scheduler, "beta_end", 0.02, low=0, high=1)
    if given is not None:
        if not isinstance(given, list | tuple) or len(given) != trained:
            size = f"{len(given)} numbers" if isinstance(given, list | tuple) else f"{given!r:.60}"
            expected = f"a list of num_train_timesteps={trained} numbers"
            raise invalid(f"scheduler: {key}", size, expected, "fetch the file again")
        entries = [number("scheduler", {key: beta}, key, low=0, high=1) for beta in given]
        betas = torch.tensor(entries, dtype=dtype)
    elif kind == "linear":
        betas = torch.linspace(start, end, trained, dtype=dtype)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, trained, dtype=dtype) ** 2
    elif kind == "squaredcos_cap_v2":
        places = torch.arange(trained + 1, dtype=torch.float64) / trained
        bar = ((places + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999).to(dtype)
    else:
        expected = "linear, scaled_linear or squaredcos_cap_v2"
        raise invalid("scheduler", f"beta_schedule={kind!r:.60}", expected)
    levels = torch.cumprod(1 - betas, dim=0)
    if scheduler.get("rescale_betas_zero_snr"):
        root = levels.sqrt()
        levels = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        betas = 1 - torch.cat((levels[:1], levels[1:] / levels[:-1]))
        levels = torch.cumprod(1 - betas, dim=0)  # rounded as diffusers rounds them in float32
    return levels


def spaced_sigmas(
    scheduler: Scheduler, num_steps: int, trained: int
) -> tuple[Tensor, Tensor] | None:
    """Return timesteps and noise levels of a config that spaces noise levels, not timesteps.

    The spacings are those of Karras et al. (arXiv 2206.00364, eq. 5), of equal steps in the
    logarithm (exponential, and the lambdas of Lu et al., arXiv 2206.00927) and of quantiles of a
    beta distribution (arXiv 2407.12173).

    Args:
        scheduler: Content of a scheduler_config.json.
        num_steps: Number of noise levels, K.
        trained: Number of timesteps that the model was trained with.

    Returns:
        Timesteps, (K,) int64, and ratios sigma / alpha, (K,) float64; None for other configs.

    Raises:
        UserError: The config has more than one such spacing.
    """
    used = [key for key in SPACINGS if scheduler.get(key)]
    if not used:
        return None
    if len(used) > 1:
        raise invalid("scheduler", " and ".join(used), "one of them", "remove the others")
    # In float32 as diffusers computes them: timesteps are cut to whole numbers, so the rounding of
    # the highest level decides between the last timestep and the one before.
    levels = dpm_alpha_bar(scheduler, trained, torch.float32)
    ratios = (((1 - levels) / levels) ** 0.5).numpy()
    logs = np.log(ratios)
    low, high, ramp = ratios[0].item(), ratios[-1].item(), np.linspace(0, 1, num_steps)
    if used[0] == "use_karras_sigmas":
        sigmas = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    elif used[0] == "use_beta_sigmas":
        sigmas = low + _beta_quantiles(1 - ramp) * (high - low)
    elif used[0] == "use_lu_lambdas":
        sigmas = np.exp(logs[-1].item() + ramp * (logs[0].item() - logs[-1].item()))
    else:
        sigmas = np.exp(np.linspace(math.log(high), math.log(low), num_steps))
    wanted = np.log(sigmas)
    # The last level that is not above; with zero terminal SNR, the levels do not rise at the end.
    left = np.clip((wanted[:, None] >= logs).cumsum(axis=1).argmax(axis=1), 0, trained - 2)
    place = np.clip((logs[left] - wanted) / (logs[left] - logs[left + 1]), 0, 1)
    timesteps = (1 - place) * left + place * (left + 1)
    is_rounded = used[0] in ("use_karras_sigmas", "use_lu_lambdas")
    if is_rounded and scheduler.get("beta_schedule") != "squaredcos_cap_v2":
        timesteps = timesteps.round()
    return torch.from_numpy(timesteps).long(), torch.from_numpy(sigmas)


def dpm_alpha_bar(scheduler: Scheduler, trained: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return `alpha_bar` with a last level above 0, as DPM solvers need it."""
    levels = alpha_bar(scheduler, trained, dtype)
    if scheduler.get("rescale_betas_zero_snr"):
        levels[-1] = 2.0**-24
    return levels


def _beta_quantiles(p: np.ndarray) -> np.ndarray:
    """Return the quantiles of the beta distribution with both parameters 0.6, by bisection."""
    a, orders = 0.6, np.arange(64)
    factors = np.cumprod(np.concatenate(([1.0], (orders + 1 - a) / (orders + 1))))[:-1]

    def mass(x: np.ndarray) -> np.ndarray:  # not normalized; the series converges up to 1 / 2
        terms: np.ndarray = factors / (a + orders) * x[:, None] ** orders
        return np.asarray(x**a * terms.sum(1))

    target = np.minimum(p, 1 - p) * 2 * mass(np.array([0.5]))
    low, high = np.zeros_like(p), np.full_like(p, 0.5)
    for _ in range(100):
        middle = (low + high) / 2
        is_below = mass(middle) < target
        low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
    return np.where(p <= 0.5, low, 1 - low)


def spaced_timesteps(
    scheduler: Scheduler, num_steps: int, trained: int, *, default: str, extra: int = 0
) -> Tensor:
    """Return descending timesteps, spaced as the scheduler's config says.

    Args:
        scheduler: Content of a scheduler_config.json.
        num_steps: Number of timesteps to return, K.
        trained: Number of timesteps that the model was trained with.
        default: Spacing if the config states none.
        extra: Number of further timesteps that are spaced and then dropped at the low end; not
            used by the spacing `trailing`.

    Returns:
        (K,) int64.

    Raises:
        UserError: The spacing is unknown, or a timestep lies beyond the trained ones.
    """
    spacing = scheduler.get("timestep_spacing", default)
    count = num_steps + extra
    if spacing == "leading":
        offset = whole("scheduler", scheduler, "steps_offset", 0, low=0, high=trained)
        ascending = torch.arange(count) * (trained // count) + offset
        if int(ascending[-1]) >= trained:
            got = f"{num_steps}, which with steps_offset reaches timestep {int(ascending[-1])}"
            raise invalid("steps.count", got, f"timesteps up to {trained - 1}", "lower it")
        return ascending.flip(0)[:num_steps]
    if spacing == "linspace":
        ascending = torch.linspace(0, trained - 1, count, dtype=torch.float64).round().long()
        return ascending.flip(0)[:num_steps]
    if spacing == "trailing":
        # The step size is rounded, so `arange` may end with one value too many, close to 0.
        count_down = torch.arange(trained, 0, -trained / num_steps, dtype=torch.float64)
        return count_down.round().long()[:num_steps] - 1
    got = f"timestep_spacing={spacing!r:.60}"
    raise invalid("scheduler", got, "leading, linspace or trailing")
