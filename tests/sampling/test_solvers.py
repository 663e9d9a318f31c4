"""Every solver table against the diffusers scheduler of that name, on the same noise."""

from __future__ import annotations

import json
import logging
from typing import Any

import diffusers
import pytest
import torch
from schedulers import CPU, SavedConfig, config_of, ours_and_theirs

from dmkd_fast import Steps
from dmkd_fast.runtime import errors
from dmkd_fast.sampling.noise_levels import VARIANCE_PRESERVING
from dmkd_fast.sampling.solvers import SolverTable, solver_table

DDIM = [
    {},
    {"clip_sample": False},
    {"clip_sample_range": 0.5},
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"set_alpha_to_one": False, "steps_offset": 1},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"trained_betas": torch.linspace(1e-4, 0.03, 500).tolist(), "num_train_timesteps": 500},
]


@pytest.mark.parametrize("settings", DDIM, ids=lambda s: "-".join(s) or "default")
@pytest.mark.parametrize("num_steps", [1, 4, 10, 50])
def test_ddim(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], num_steps: int) -> None:
    scheduler = diffusers.DDIMScheduler(**settings)
    mine, theirs = ours_and_theirs(monkeypatch, scheduler, num_steps)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"variance_type": "fixed_large"},
        {"clip_sample": False},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "v_prediction"},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "linspace"},
    ],
    ids=lambda s: "-".join(s) or "default",
)
@pytest.mark.parametrize("num_steps", [1, 10, 100])
def test_ddpm(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], num_steps: int) -> None:
    scheduler = diffusers.DDPMScheduler(**settings)
    mine, theirs = ours_and_theirs(monkeypatch, scheduler, num_steps)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("num_steps", [1, 10, 250])
def test_ddpm_with_learned_variance(monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
    """As DiT was published: all 2c channels, variances between the two bounds."""
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    mine, theirs = ours_and_theirs(monkeypatch, scheduler, num_steps, width=2)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"timestep_spacing": "leading"},
        {"timestep_spacing": "trailing"},
        {"solver_order": 1},
        {"euler_at_final": True},
        {"final_sigmas_type": "sigma_min"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    ],
    ids=lambda s: "-".join(s) or "default",
)
@pytest.mark.parametrize("num_steps", [1, 4, 10, 14, 15, 20])  # 15: the last step's order changes
def test_dpm_solver(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], num_steps: int
) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**settings)
    mine, theirs = ours_and_theirs(monkeypatch, scheduler, num_steps)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        ("ddpm", "DDPMScheduler"),
        ("ddim", "DDIMScheduler"),
        ("dpm++2m", "DPMSolverMultistepScheduler"),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
@pytest.mark.parametrize("num_steps", [1, 4, 20])
def test_v_prediction_with_zero_terminal_snr(
    monkeypatch: pytest.MonkeyPatch, solver: str, name: str, kind: str, num_steps: int
) -> None:
    """The first timestep is the last trained one, where nothing of the image is left."""
    scheduler = getattr(diffusers, name)(
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        beta_schedule=kind,
    )
    mine, theirs = ours_and_theirs(monkeypatch, scheduler, num_steps, solver=solver)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


EULER = [
    {},
    {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("settings", EULER, ids=lambda s: "-".join(s) or "default")
@pytest.mark.parametrize("num_steps", [1, 4, 30])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_euler(
    monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any], num_steps: int
) -> None:
    scheduler = getattr(diffusers, name)(**settings)
    mine, theirs = ours_and_theirs(monkeypatch, scheduler, num_steps)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_euler_ends_where_the_scheduler_says(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(final_sigmas_type="sigma_min")
    mine, theirs = ours_and_theirs(monkeypatch, scheduler, 3)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("solver", "other"),
    [
        ("ddpm", "DDPMScheduler"),
        ("ddim", "DDIMScheduler"),
        ("dpm++2m", "DPMSolverMultistepScheduler"),
    ],
)
def test_a_solver_equals_the_scheduler_made_from_the_models_config(
    monkeypatch: pytest.MonkeyPatch, solver: str, other: str
) -> None:
    """Stable Diffusion ships PNDM's config; any solver of that noise schedule can run on it."""
    own = diffusers.PNDMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        skip_prk_steps=True,
        set_alpha_to_one=False,
    )
    # As a saved model has it; the live object also knows which values were defaults.
    config = json.loads(own.to_json_string()) | {"clip_sample": False}
    scheduler = getattr(diffusers, other).from_config(config)
    mine, theirs = ours_and_theirs(monkeypatch, scheduler, 10, solver=solver, like=scheduler)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    named = solver_table(config, Steps(count=10, solver=solver), CPU)  # type: ignore[arg-type]
    direct = solver_table(config_of(scheduler), Steps(count=10), CPU)
    assert torch.equal(named.rows, direct.rows)


# These need scipy or torchsde.
NEED_OTHERS = {"LMSDiscreteScheduler", "DPMSolverSDEScheduler"}
# Keys of one scheduler that another ignores, and values that another reads as its own.
FILES: dict[str, dict[str, Any]] = {
    "EulerDiscreteScheduler": {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
    "DEISMultistepScheduler": {"algorithm_type": "deis", "solver_type": "logrho"},
    "UniPCMultistepScheduler": {"solver_type": "bh2", "timestep_spacing": "trailing"},
    "PNDMScheduler": {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
}


@pytest.mark.parametrize(
    ("solver", "other"),
    [
        ("ddpm", "DDPMScheduler"),
        ("ddim", "DDIMScheduler"),
        ("dpm++2m", "DPMSolverMultistepScheduler"),
        ("euler", "EulerDiscreteScheduler"),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler"),
    ],
)
@pytest.mark.parametrize("name", sorted({*VARIANCE_PRESERVING} - NEED_OTHERS))
def test_any_schedulers_file_is_read_as_from_config_reads_it(
    monkeypatch: pytest.MonkeyPatch, name: str, solver: str, other: str
) -> None:
    own = getattr(diffusers, name)(beta_end=0.015, **FILES.get(name, {}))
    config = json.loads(own.to_json_string())
    if name == "EulerDiscreteScheduler" and solver == "euler":
        with pytest.raises(ValueError, match="use_karras_sigmas=True"):
            solver_table(config, Steps(count=10, solver="euler"), CPU)
        return
    changes = {}
    if name == "DEISMultistepScheduler":  # diffusers refuses "deis", which it reads as dpmsolver++
        changes = {"algorithm_type": "dpmsolver++"}
    scheduler = getattr(diffusers, other).from_config(config | changes)
    mine, theirs = ours_and_theirs(
        monkeypatch, scheduler, 10, solver=solver, like=SavedConfig(config)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_ddim_steps_that_do_not_meet_are_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(errors, "_warned", set())
    with caplog.at_level(logging.WARNING, "dmkd_fast"):
        for spacing in ("leading", "linspace", "linspace"):
            config = {"_class_name": "DDIMScheduler", "timestep_spacing": spacing}
            solver_table(config, Steps(count=10), CPU)
    assert len(caplog.records) == 1
    assert "timestep_spacing=linspace and 10 steps" in caplog.records[0].getMessage()


@pytest.mark.parametrize("num_steps", [1, 2, 5, 40])
@pytest.mark.parametrize("clip", [True, False])
def test_consistency(monkeypatch: pytest.MonkeyPatch, num_steps: int, clip: bool) -> None:
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=clip)
    mine, theirs = ours_and_theirs(monkeypatch, scheduler, num_steps)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("num_steps", [1, 4, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_flow(monkeypatch: pytest.MonkeyPatch, num_steps: int, shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas = torch.linspace(1.0, 1 / num_steps, num_steps).tolist()
    own = scheduler.set_timesteps
    monkeypatch.setattr(scheduler, "set_timesteps", lambda _: own(sigmas=sigmas))
    scheduler.init_noise_sigma = 1.0  # type: ignore[misc]
    scheduler.scale_model_input = lambda x, _: x
    mine, theirs = ours_and_theirs(monkeypatch, scheduler, num_steps)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 4, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ancestral_flow(monkeypatch: pytest.MonkeyPatch, num_steps: int, shift: float) -> None:
    """DDPM's step on a flow model's noise levels is the stochastic DPM-Solver++ of first order."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++",
        solver_order=1,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
    )
    own = scheduler.set_timesteps

    def set_timesteps(count: int) -> None:
        own(count)
        even = torch.linspace(1.0, 1 / count, count)
        sigma = shift * even / (1 + (shift - 1) * even)
        scheduler.sigmas, scheduler.timesteps = torch.cat((sigma, torch.zeros(1))), sigma * 1000

    monkeypatch.setattr(scheduler, "set_timesteps", set_timesteps)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    mine, theirs = ours_and_theirs(monkeypatch, scheduler, num_steps, solver="ddpm", like=flow)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "changes", "words"),
    [
        ({"_class_name": "EDMEulerScheduler"}, {}, "EDMEulerScheduler"),
        ({"_class_name": "PNDMScheduler"}, {}, "expected one of ddpm, ddim"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, {}, "thresholding=True"),
        (
            {
                "_class_name": "DDIMScheduler",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            },
            {},
            "prediction_type=epsilon with rescale_betas_zero_snr",
        ),
        ({"_class_name": "DDIMScheduler"}, {"count": 1001}, "1 to 1000"),
        ({"_class_name": "DDIMScheduler"}, {"solver": "consistency"}, "ddpm, ddim, dpm"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "flow"}, {}, "prediction_type='flow'"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "sigmoid"}, {}, "beta_schedule"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "odd"}, {}, "timestep_spacing"),
        ({"_class_name": "DDIMScheduler", "steps_offset": 1}, {"count": 1000}, "lower it"),
        (
            {"_class_name": "DDPMScheduler", "variance_type": "learned"},
            {},
            "variance_type='learned'",
        ),
        (
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "use_karras_sigmas": True,
                "use_beta_sigmas": True,
            },
            {},
            "use_karras_sigmas and use_beta_sigmas",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            {},
            "algorithm_type",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3},
            {},
            "solver_order: got 3",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler"}, {"count": 1000}, "not finite"),
        ({"_class_name": "DDPMScheduler", "beta_end": 1.0}, {}, "not finite"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0.1, 0.2]}, {}, "got 2 numbers"),
        ({"_class_name": "DDIMScheduler", "beta_start": "a"}, {}, "beta_start: got 'a'"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 1e3}, {}, "got 1000.0"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0}, {}, "shift: got 0"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, {"solver": "ddim"}, "consistency"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "distilled_steps": 4}, {}, "to 4"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(
    scheduler: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    steps = Steps(**changes)
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as error:
        solver_table(scheduler, steps, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting", True),
        ("FlowMatchEulerDiscreteScheduler", "stochastic_sampling", True),
        ("FlowMatchEulerDiscreteScheduler", "invert_sigmas", True),
        ("FlowMatchEulerDiscreteScheduler", "shift_terminal", 0.1),
        ("FlowMatchEulerDiscreteScheduler", "use_karras_sigmas", True),
        ("FlowMatchEulerDiscreteScheduler", "use_exponential_sigmas", True),
        ("FlowMatchEulerDiscreteScheduler", "use_beta_sigmas", True),
        ("EulerDiscreteScheduler", "interpolation_type", "log_linear"),
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        ("EulerDiscreteScheduler", "use_karras_sigmas", True),
        ("EulerDiscreteScheduler", "use_exponential_sigmas", True),
        ("EulerDiscreteScheduler", "use_beta_sigmas", True),
        ("EulerDiscreteScheduler", "rescale_betas_zero_snr", True),
        ("EulerAncestralDiscreteScheduler", "rescale_betas_zero_snr", True),
        ("DDPMScheduler", "thresholding", True),
        ("DPMSolverMultistepScheduler", "thresholding", True),
        ("DPMSolverMultistepScheduler", "use_dynamic_shifting", True),
        ("DPMSolverMultistepScheduler", "solver_type", "heun"),
        ("DPMSolverMultistepScheduler", "lambda_min_clipped", -5.1),
        ("SCMScheduler", "prediction_type", "epsilon"),
    ],
)
def test_values_that_the_tables_do_not_follow_are_refused(name: str, key: str, value: Any) -> None:
    config = {"_class_name": name, "prediction_type": "v_prediction"} | {key: value}
    with pytest.raises(ValueError, match=f"scheduler: got {key}={value!r}, expected "):
        solver_table(config, Steps(count=2), CPU)


def test_tables_hold_one_row_per_step() -> None:
    table = solver_table({"_class_name": "DDPMScheduler"}, Steps(count=7), CPU)
    assert table.rows.shape == (7, len(SolverTable.COLUMNS)) and table.rows.dtype == torch.float32
    assert table.stochastic == (True,) * 6 + (False,)
