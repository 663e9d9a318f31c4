"""Noise levels and timesteps against those of the schedulers of diffusers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep
from schedulers import CPU, config_of, ours_and_theirs

from dmkd_fast import Steps
from dmkd_fast.sampling.noise_levels import (
    _beta_quantiles,
    alpha_bar,
    spaced_sigmas,
    spaced_timesteps,
    trained_alike,
)
from dmkd_fast.sampling.solvers import solver_table


def ppf(p: float, a: float, b: float) -> Any:
    """Our quantiles by scipy's call, which diffusers makes; a test of their own judges them."""
    assert a == b == 0.6
    return _beta_quantiles(np.array([p]))[0]


SCIPY = SimpleNamespace(stats=SimpleNamespace(beta=SimpleNamespace(ppf=ppf)))
SPACED = [
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_lu_lambdas": True},
    {"use_beta_sigmas": True},
]
SCHEDULES = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"num_train_timesteps": 371, "solver_order": 1, "final_sigmas_type": "sigma_min"},
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(s) or "default")
@pytest.mark.parametrize("spacing", SPACED, ids=lambda s: next(iter(s)))
def test_spaced_noise_levels(
    monkeypatch: pytest.MonkeyPatch, spacing: dict[str, Any], schedule: dict[str, Any]
) -> None:
    """Timesteps, too, are those of diffusers, which cuts them to whole numbers."""
    monkeypatch.setattr(scheduling_dpmsolver_multistep, "scipy", SCIPY, raising=False)
    monkeypatch.setattr(scheduling_dpmsolver_multistep, "is_scipy_available", lambda: True)
    for num_steps in (1, 2, 7, 20, 33):
        scheduler = diffusers.DPMSolverMultistepScheduler(**spacing, **schedule)
        config = config_of(scheduler)
        scheduler.set_timesteps(num_steps)
        found = spaced_sigmas(config, num_steps, scheduler.config.num_train_timesteps)
        assert found is not None
        assert torch.equal(found[0], scheduler.timesteps)
        torch.testing.assert_close(found[1].float(), scheduler.sigmas[:-1], rtol=2e-6, atol=0)
    mine, theirs = ours_and_theirs(monkeypatch, scheduler, 20)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_quantiles_of_the_beta_distribution_halve_its_mass() -> None:
    """Against midpoint sums of the density, after x = sin(t)^2, which removes its poles."""
    p = np.linspace(0, 1, 41)
    got = _beta_quantiles(p)
    assert got[0] == 0 and got[-1] == 1 and (np.diff(got) > 0).all()
    edges = np.linspace(0, np.pi / 2, 400_001)
    density = np.sin(edges[:-1] + edges[1:]) ** 0.2  # of t, with both parameters 0.6
    mass = np.concatenate(([0], np.cumsum(density))) / density.sum()
    np.testing.assert_allclose(np.interp(np.arcsin(np.sqrt(got)), edges, mass), p, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("trained", [1000, 37])
def test_noise_levels_are_those_of_diffusers_to_the_last_one(kind: str, trained: int) -> None:
    own = diffusers.DDIMScheduler(beta_schedule=kind, num_train_timesteps=trained)
    got = alpha_bar(config_of(own), trained)
    torch.testing.assert_close(got, own.alphas_cumprod.double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("trained", [1000, 999, 500, 17])
def test_trailing_timesteps_are_as_many_as_steps_for_every_number(trained: int) -> None:
    """1000 / 61 in float64: `arange` gives 62 numbers, the last one next to 0."""
    for num_steps in range(1, trained + 1):
        timesteps = spaced_timesteps(
            {"timestep_spacing": "trailing"}, num_steps, trained, default="leading"
        )
        assert len(timesteps) == num_steps and timesteps[0] == trained - 1
        assert timesteps[-1] >= 0 and (timesteps.diff() < 0).all()


@pytest.mark.parametrize("num_steps", [1, 4, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_may_end_at_the_lowest_trained_one(num_steps: int, shift: float) -> None:
    """As diffusers' pipeline of Stable Diffusion 3 sets them."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    config = config_of(scheduler) | {"lowest_sigma": scheduler.sigma_min}
    scheduler.set_timesteps(num_steps)
    table = solver_table(config, Steps(count=num_steps), CPU)
    torch.testing.assert_close(table.column("timestep"), scheduler.timesteps, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(table.column("a") * -table.column("out"), scheduler.sigmas[1:])


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
CONSISTENCY = {"_class_name": "CMStochasticIterativeScheduler"}


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"_class_name": "DDIMScheduler"}, {"prediction_type": "epsilon"}, True),
        ({}, {"prediction_type": "v_prediction"}, False),
        ({"prediction_type": "v_prediction"}, {"prediction_type": "v_prediction"}, True),
        ({}, {"beta_end": 0.03}, False),
        ({}, {"num_train_timesteps": 500}, False),
        ({}, FLOW, False),
        (FLOW, FLOW | {"shift": 3.0}, True),
        (FLOW, FLOW | {"num_train_timesteps": 500}, False),
        (FLOW, FLOW | {"distilled_steps": 4}, False),
        (FLOW | {"distilled_steps": 2}, FLOW | {"distilled_steps": 4}, False),
        (FLOW | {"distilled_steps": 4}, FLOW | {"distilled_steps": 4}, True),
        (CONSISTENCY, CONSISTENCY | {"sigma_max": 40.0}, False),
        (CONSISTENCY, CONSISTENCY, True),
    ],
)
def test_models_are_trained_alike_if_they_predict_the_same_at_the_same_timesteps(
    one: dict[str, Any], other: dict[str, Any], expected: bool
) -> None:
    default = {"_class_name": "DDPMScheduler"}
    pair = default | one, default | other
    assert trained_alike(*pair) is trained_alike(*pair[::-1]) is expected
