"""One step of any solver, and the way from latents to pixels; both are compiled.

Shapes: B micro-batch, c channels, h x w latent cells, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmkd_fast.sampling.solvers import SolverTable


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What all steps of a sampler have in common."""

    takes_guidance: bool
    """Whether the guidance scale is an input of the module."""
    channels: int | None
    """Number of leading channels that are guided; None means all."""
    clip: float | None
    """Bound of the image estimate, or None."""
    learned_variance: bool
    """Whether the second half of the module's output sets the noise variance."""
    dtype: torch.dtype
    """Compute dtype of the module."""


def advance(
    module: nn.Module,
    x: Tensor,
    before: Tensor,
    row: Tensor,
    labels: Tensor,
    fresh: Tensor | None,
    scale: Tensor,
    config: StepConfig,
) -> tuple[Tensor, Tensor]:
    """Take one step of any solver.

    Args:
        module: Denoiser.
        x: State, (B, c, h, w) float32.
        before: Clipped image estimate of the previous step, (B, c, h, w) float32.
        row: Coefficients of this step, (len(SolverTable.COLUMNS),) float32.
        labels: Labels (B,); for a guided step (2B,), with the null class in the second half.
        fresh: Fresh noise, (B, c, h, w), or None.
        scale: Guidance scale, () or (B, 1, 1, 1) float32.
        config: Values of all steps.

    Returns:
        The next x and `before`.
    """
    values = coefficients(row)
    image, variance = estimate(module, x, values, labels, scale, config)
    return update(x, before, values, image, variance, fresh, config)


def coefficients(row: Tensor) -> dict[str, Tensor]:
    """Return the coefficients of a step by name, () float32 each."""
    return dict(zip(SolverTable.COLUMNS, row.unbind(), strict=True))


def estimate(
    module: nn.Module,
    x: Tensor,
    values: dict[str, Tensor],
    labels: Tensor,
    scale: Tensor,
    config: StepConfig,
) -> tuple[Tensor, Tensor]:
    """Compute the first half of `advance`.

    Returns:
        Image estimate (B, c, h, w) float32, and the remaining output channels (B, c' - c, h, w)
        float32, which are empty without learned variances.
    """
    is_guided = len(labels) > len(x)
    inputs = (values["input_scale"] * x).to(config.dtype)
    if is_guided:
        inputs = torch.cat((inputs, inputs))
    timesteps = values["timestep"].expand(len(inputs))
    if config.takes_guidance:
        output = module(inputs, timesteps, labels, scale.flatten().expand(len(inputs)))
    else:
        output = module(inputs, timesteps, labels)
    width = x.shape[1]
    prediction, variance = output[:, :width].float(), output[: len(x), width:].float()
    if is_guided:
        conditional, unconditional = prediction.chunk(2)
        prediction = unconditional + scale * (conditional - unconditional)
        if scale.ndim:  # scale 1 of a class must give exactly the conditional prediction
            prediction = torch.where(scale == 1, conditional, prediction)
        if config.channels is not None:
            guided, rest = prediction[:, : config.channels], conditional[:, config.channels :]
            prediction = torch.cat((guided, rest), dim=1)
    return values["skip"] * x + values["out"] * prediction, variance


def update(
    x: Tensor,
    before: Tensor,
    values: dict[str, Tensor],
    image: Tensor,
    variance: Tensor,
    fresh: Tensor | None,
    config: StepConfig,
) -> tuple[Tensor, Tensor]:
    """Compute the second half of `advance`, from the image estimate.

    Returns:
        The next x and `before`, (B, c, h, w) float32 each.
    """
    clip = config.clip
    newest = image if clip is None else image.clamp(-clip, clip)
    x = values["a"] * x + values["b0"] * newest + values["b1"] * before + values["u"] * image
    if fresh is not None:
        deviation = values["n"]
        if config.learned_variance:
            place = (variance + 1) / 2
            low, high = values["log_variance_low"], values["log_variance_high"]
            deviation = deviation * torch.exp((place * high + (1 - place) * low) / 2)
        x = x + deviation * fresh
    return x, newest


def decode(decoder: nn.Module | None, latents: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Decode latents (B, c, h, w) float32 and find broken images.

    Values are rounded to the nearest level. One that is not finite would look black or white.

    Returns:
        Images (B, 1 or 3, H, W) uint8, and whether each has a value that is not finite, (B,) bool.
    """
    images = latents
    if decoder is not None:
        latents = latents.to(dtype).contiguous(memory_format=torch.channels_last)
        images = decoder(latents).float()
    is_broken = ~images.flatten(1).sum(1).isfinite()
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8), is_broken
