"""Read noise levels and timesteps from a diffusers `scheduler_config.json`.

Keys are read as diffusers' `from_config` reads them: a scheduler uses the keys that it knows and
ignores all others, which belong to the scheduler that wrote the file. K is the number of steps.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dmkd_fast.denoisers.config_values import number, whole
from dmkd_fast.runtime.errors import invalid

Solver = Literal["auto", "ddpm", "ddim", "dpm++2m", "euler", "euler_ancestral", "consistency"]
Scheduler = dict[str, Any]
"""Content of a diffusers `scheduler_config.json`."""
MOST_TRAINED = 1_000_000

FLOW, CONSISTENCY = "FlowMatchEulerDiscreteScheduler", "CMStochasticIterativeScheduler"
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
}
# Values for which the tables are correct, by solver or scheduler class. Keys that diffusers'
# scheduler of that name ignores are not listed.
OFF = (False, None)
ANCESTRAL = {"thresholding": OFF, "rescale_betas_zero_snr": OFF}
SPACINGS = dict.fromkeys(
    ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting"), OFF
)
SUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "ddpm": ANCESTRAL,
    "ddim": ANCESTRAL,
    "dpm++2m": ANCESTRAL
    | SPACINGS
    | {
        "use_lu_lambdas": OFF,
        "use_flow_sigmas": OFF,
        "algorithm_type": ("dpmsolver++",),
        # DPMSolverMultistepScheduler treats the values of UniPC and DEIS as "midpoint".
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
    FLOW: SPACINGS | {"stochastic_sampling": OFF, "invert_sigmas": OFF, "shift_terminal": OFF},
    CONSISTENCY: {},
}


def choose_solver(scheduler: Scheduler, solver: Solver) -> str:
    """Resolve "auto" to the scheduler's own solver, and check any other name.

    Raises:
        UserError: The scheduler is unknown, or the solver does not fit models with this scheduler.
    """
    name = str(scheduler.get("_class_name"))
    possible: tuple[str, ...]
    if name == FLOW:
        possible, own = ("euler", "dpm++2m"), "euler"
    elif name == CONSISTENCY:
        possible, own = ("consistency",), "consistency"
    elif name in VARIANCE_PRESERVING:
        possible = "ddpm", "ddim", "dpm++2m", "euler", "euler_ancestral"
        own = VARIANCE_PRESERVING[name] or ""
    else:
        known = ", ".join([FLOW, CONSISTENCY, *VARIANCE_PRESERVING])
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


def alpha_bar(scheduler: Scheduler, trained: int) -> Tensor:
    """Return the cumulative products of 1 - beta, (trained,) float64.

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
        betas = torch.tensor(entries, dtype=torch.float64)
    elif kind == "linear":
        betas = torch.linspace(start, end, trained, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, trained, dtype=torch.float64) ** 2
    elif kind == "squaredcos_cap_v2":
        places = torch.arange(trained + 1, dtype=torch.float64) / trained
        bar = ((places + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        expected = "linear, scaled_linear or squaredcos_cap_v2"
        raise invalid("scheduler", f"beta_schedule={kind!r:.60}", expected)
    return torch.cumprod(1 - betas, dim=0)


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
        (K,) int64; `trailing` may give fewer.

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
