"""Read noise levels and timesteps from a diffusers `scheduler_config.json`.

Keys are read as diffusers' `from_config` reads them: a scheduler takes the keys
that it knows and ignores those of the scheduler that wrote the file. K steps.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dmkd_fast.runtime import checks

Solver = Literal["auto", "ddpm", "ddim", "dpm++2m", "euler", "consistency"]
Scheduler = dict[str, Any]
"""Content of a diffusers `scheduler_config.json`."""

FLOW, CONSISTENCY = "FlowMatchEulerDiscreteScheduler", "CMStochasticIterativeScheduler"
# Schedulers that share DDPM's noise levels, and the solver that "auto" chooses.
VARIANCE_PRESERVING = {
    "DDPMScheduler": "ddpm", "DDIMScheduler": "ddim", "DPMSolverMultistepScheduler": "dpm++2m",
    "PNDMScheduler": None, "EulerDiscreteScheduler": None, "EulerAncestralDiscreteScheduler": None,
    "UniPCMultistepScheduler": None, "LMSDiscreteScheduler": None, "DEISMultistepScheduler": None,
    "DPMSolverSinglestepScheduler": None, "HeunDiscreteScheduler": None,
}  # fmt: skip
# Values that the tables are built for, of each key that diffusers' scheduler of that name takes.
OFF = (False, None)
ANCESTRAL = {"thresholding": OFF, "rescale_betas_zero_snr": OFF}
SPACINGS = dict.fromkeys(
    ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting"), OFF
)
SUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "ddpm": ANCESTRAL,
    "ddim": ANCESTRAL,
    "dpm++2m": ANCESTRAL | SPACINGS | {
        "use_lu_lambdas": OFF, "use_flow_sigmas": OFF,
        "algorithm_type": ("dpmsolver++",),
        # DPMSolverMultistepScheduler takes the values of UniPC and DEIS as "midpoint".
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
        "lambda_min_clipped": (-math.inf, "-inf"),
    },
    FLOW: SPACINGS | {"stochastic_sampling": OFF, "invert_sigmas": OFF, "shift_terminal": OFF},
    CONSISTENCY: {},
}  # fmt: skip


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
        raise ValueError(f"scheduler: got {name:.60}, expected one of {known}; use another model")
    chosen = own if solver == "auto" else solver
    if chosen not in possible:
        raise ValueError(
            f"solver: got {solver!r} for a model with {name}, expected one of "
            f"{', '.join(possible)}; change the solver (all: {', '.join(get_args(Solver))})"
        )
    return chosen


def check_supported(scheduler: Scheduler, chosen: str) -> None:
    """Refuse values for which the tables of solver `chosen` would be wrong.

    Raises:
        ValueError: Names the key.
    """
    name = str(scheduler.get("_class_name"))
    for key, values in SUPPORTED[name if name in SUPPORTED else chosen].items():
        if key in scheduler and scheduler[key] not in values:
            raise ValueError(
                f"scheduler: got {key}={scheduler[key]!r:.60}, expected {values[0]!r}; only that "
                "is supported"
            )


def number_of(
    scheduler: Scheduler, key: str, default: float, *, low: float = 0.0, high: float = math.inf
) -> float:
    """A finite number in [low, high] from the file.

    Raises:
        ValueError: The file has another value or type there.
    """
    try:
        return checks.number(f"scheduler: {key}", scheduler.get(key, default), low=low, high=high)
    except TypeError as error:
        raise ValueError(str(error)) from None


def whole_of(scheduler: Scheduler, key: str, default: int, *, low: int, high: int) -> int:
    """A whole number in [low, high] from the file.

    Raises:
        ValueError: The file has another value or type there.
    """
    try:
        return checks.whole(f"scheduler: {key}", scheduler.get(key, default), low=low, high=high)
    except TypeError as error:
        raise ValueError(str(error)) from None


def trained_steps(scheduler: Scheduler) -> int:
    """Timesteps that the model was trained with."""
    default = 40 if scheduler.get("_class_name") == CONSISTENCY else 1000
    return whole_of(scheduler, "num_train_timesteps", default, low=1, high=1_000_000)


def clip_of(scheduler: Scheduler) -> float | None:
    """Bound of the image estimate; None if it is not clipped."""
    if not scheduler.get("clip_sample", True):
        return None
    return number_of(scheduler, "clip_sample_range", 1.0)


def flow_sigmas(num_steps: int, shift: float) -> Tensor:
    """Noise levels 1 = s_0 > ... > s_K = 0, (K + 1,) float64: equal steps, then shifted.

    Equal to diffusers' `set_timesteps(sigmas=linspace(1, 1 / K, K))`, as its pipelines of flow
    models call it. Its `set_timesteps(K)` ends at the lowest trained level instead, and where
    `shift` is not 1 it applies the shift twice.
    """
    sigmas = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def alpha_bar(scheduler: Scheduler, trained: int) -> Tensor:
    """Cumulative products of 1 - beta, (trained,) float64."""
    kind, given = scheduler.get("beta_schedule", "linear"), scheduler.get("trained_betas")
    start = number_of(scheduler, "beta_start", 0.0001, high=1.0)
    end = number_of(scheduler, "beta_end", 0.02, high=1.0)
    if given is not None:
        if not isinstance(given, list | tuple) or len(given) != trained:
            size = f"{len(given)} numbers" if isinstance(given, list | tuple) else f"{given!r:.60}"
            raise ValueError(
                f"scheduler: trained_betas: got {size}, expected a list of num_train_timesteps="
                f"{trained} numbers; fetch the file again"
            )
        entries = [
            number_of({"trained_betas": beta}, "trained_betas", 0.0, high=1.0) for beta in given
        ]
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
        raise ValueError(
            f"scheduler: got beta_schedule={kind!r:.60}, expected linear, scaled_linear or "
            "squaredcos_cap_v2"
        )
    return torch.cumprod(1 - betas, dim=0)


def spaced_timesteps(
    scheduler: Scheduler, num_steps: int, trained: int, *, default: str, extra: int = 0
) -> Tensor:
    """Descending (K,) int64, spaced as the scheduler's config says."""
    spacing = scheduler.get("timestep_spacing", default)
    count = num_steps + extra
    if spacing == "leading":
        offset = whole_of(scheduler, "steps_offset", 0, low=0, high=trained)
        ascending = torch.arange(count) * (trained // count) + offset
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
        # The step is rounded, so `arange` may end with one more value, next to 0.
        count_down = torch.arange(trained, 0, -trained / num_steps, dtype=torch.float64)
        return count_down.round().long()[:num_steps] - 1
    raise ValueError(
        f"scheduler: got timestep_spacing={spacing!r:.60}, expected leading, linspace or trailing"
    )
