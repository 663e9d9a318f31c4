"""Makes class-conditional images with a diffusion model, straight into the slots it is given.

Stands on floor 2. The noise of an image is keyed by (seed, image id), so an image does not depend
on the others made with it; its bits are fixed for a fixed micro-batch, device and build.
B micro-batch, c channels, h w latent cells (pixels, for a pixel model), K steps.

Source of guidance: Ho & Salimans, classifier-free guidance (arXiv 2207.12598), eq. 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast.ops import noise
from dmkd_fast.solvers import Solver, solver_table


class DiffusionSampler:
    """Fixed-shape sampling loop over a coefficient table.

    Args:
        module: `module(latents (B, c, h, w), timesteps (B,), labels (B,))` -> (B, c, h, w).
        scheduler: Content of the model's scheduler_config.json; fixes objective and solver.
        image_shape: (c, h, w).
        null_class: Label that stands for "no class"; None if the model has none.
        num_steps: K.
        solver: "euler" or "dpm++2m", see `solvers.py`.
        guidance_scale: 1 means no guidance.
        micro_batch_images: B; smaller requests are filled up, so shapes never change.
        dtype: Compute dtype of the module; latents stay float32 between steps.
        device: Where everything lives.
        seed: Of the noise.
        compile: torch.compile the module.

    Raises:
        ValueError: Guidance without a null class, or an unsupported scheduler.
    """

    def __init__(
        self, module: nn.Module, *, scheduler: dict[str, Any], image_shape: tuple[int, int, int],
        null_class: int | None = None, num_steps: int = 8, solver: Solver = "euler",
        guidance_scale: float = 1.0,
        micro_batch_images: int = 64, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu", seed: int = 0, compile: bool = False,
    ) -> None:  # fmt: skip
        if guidance_scale != 1.0 and null_class is None:
            raise ValueError(
                f"guidance_scale: got {guidance_scale} for a model without a null class, "
                "expected 1; set guidance_scale=1"
            )
        self.device = torch.device(device)
        self.image_shape, self.null_class = image_shape, null_class
        self.guidance_scale, self.micro_batch_images = guidance_scale, micro_batch_images
        self.dtype, self.seed = dtype, seed
        self._module = module.to(device=self.device, dtype=dtype)
        self._predict = torch.compile(self._module, dynamic=False) if compile else self._module
        self.table = solver_table(scheduler, num_steps, self.device, solver=solver)

    @torch.inference_mode()
    def sample(self, ids: Tensor, labels: Tensor, *, out: Tensor) -> Tensor:
        """Make one image per id.

        Args:
            ids: (n,) int64 image ids; each fixes its image's noise.
            labels: (n,) int64 classes.
            out: (n, c, H, W) uint8, written in place.

        Returns:
            `out`.
        """
        size = self.micro_batch_images
        for start in range(0, len(ids), size):
            batch = slice(start, start + size)
            count = len(ids[batch])
            latents = self._run(_fill(ids[batch], size), _fill(labels[batch], size))
            out[batch].copy_(_to_uint8(latents[:count]))
        return out

    @torch.inference_mode()
    def trajectory(self, ids: Tensor, labels: Tensor) -> Tensor:
        """All states of one micro-batch, noise first: (B,), (B,) -> (K + 1, B, c, h, w) float32."""
        return torch.stack(list(self._states(ids, labels)))

    def _run(self, ids: Tensor, labels: Tensor) -> Tensor:
        """All K steps of one micro-batch: (B,), (B,) -> latents (B, c, h, w) float32."""
        *_, latents = self._states(ids, labels)
        return latents

    def _states(self, ids: Tensor, labels: Tensor) -> Iterator[Tensor]:
        count = self.image_shape[0] * self.image_shape[1] * self.image_shape[2]
        latents = noise.normal(self.seed, ids, step=0, count=count).view(-1, *self.image_shape)
        if self.guidance_scale != 1.0:
            assert self.null_class is not None
            labels = torch.cat((labels, torch.full_like(labels, self.null_class)))  # (2B,)
        yield latents
        table, before = self.table, torch.zeros_like(latents)
        for k in range(len(table.timesteps)):
            prediction = self._denoise(latents, table.timesteps[k], labels)
            newest = table.c[k] * latents + table.d[k] * prediction
            latents = table.a[k] * latents + table.b[k, 0] * newest + table.b[k, 1] * before
            before = newest
            yield latents

    def _denoise(self, latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """Guided prediction (B, c, h, w) float32 from one call of the module."""
        guided = self.guidance_scale != 1.0
        inputs = torch.cat((latents, latents)) if guided else latents
        timesteps = timestep.expand(len(inputs))
        prediction = self._predict(inputs.to(self.dtype), timesteps, labels).float()
        if not guided:
            return prediction
        conditional, unconditional = prediction.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)


def _fill(values: Tensor, size: int) -> Tensor:
    """Repeat the last entry until there are `size`."""
    return torch.cat((values, values[-1:].expand(size - len(values))))


def _to_uint8(latents: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, rounded to the nearest level."""
    return (latents * 127.5 + 127.5).round().clamp_(0, 255).to(torch.uint8)
