"""Images of our solvers and of the schedulers of diffusers, by the same denoiser and noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.schedulers import (
    scheduling_consistency_models,
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
)
from small_jobs import sampler_from
from torch import Tensor, nn

SHAPE = (1, 6, 6)
CPU = torch.device("cpu")


class Wave(nn.Module):
    """A smooth function of state and timestep; with `width=2` it predicts variances too."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.width = width

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        del labels
        value = torch.tanh(0.7 * latents + timesteps[:, None, None, None] / 900 - 0.4)
        return torch.cat([value, value.flip(2)][: self.width], dim=1)


class SavedConfig:
    """A scheduler of which only its file is known."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config


def config_of(scheduler: Any) -> dict[str, Any]:
    if isinstance(scheduler, SavedConfig):
        return scheduler.config
    return dict(scheduler.config) | {"_class_name": type(scheduler).__name__}


def ours_and_theirs(
    monkeypatch: pytest.MonkeyPatch,
    scheduler: Any,
    num_steps: int,
    *,
    solver: str = "auto",
    like: Any = None,
    width: int = 1,
) -> tuple[Tensor, Tensor]:
    """Final states from the same noise; `like` is the scheduler whose config ours is built from."""
    model = Wave(width)
    sampler = sampler_from(
        module=model,
        scheduler=config_of(like or scheduler),
        latent_shape=SHAPE,
        num_classes=3,
        count=num_steps,
        solver=solver,
        micro_batch_images=3,
    )
    ids = torch.arange(3)
    mine = sampler.trajectory(ids, ids)[-1]

    drawn = iter(sampler._noise(ids, step) for step in range(1, num_steps + 1))
    for module in (
        scheduling_ddpm,
        scheduling_consistency_models,
        scheduling_dpmsolver_multistep,
        scheduling_euler_ancestral_discrete,
    ):
        monkeypatch.setattr(
            module, "randn_tensor", lambda shape, **_: next(drawn).expand(-1, shape[1], -1, -1)
        )
    scheduler.set_timesteps(num_steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # otherwise a step is left out where timesteps repeat
    x = sampler._noise(ids, 0) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        inputs = scheduler.scale_model_input(x, timestep)
        output = model(inputs, timestep.float().expand(3), ids)
        x = scheduler.step(output, timestep, x).prev_sample
    return mine, x
