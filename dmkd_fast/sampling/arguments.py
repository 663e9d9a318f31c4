"""Check the arguments of `DiffusionSampler`; each error is one line that names the argument."""

from __future__ import annotations

import math
from typing import Any

import torch

from dmkd_fast.runtime import checks
from dmkd_fast.runtime.errors import UserError


def check_settings(
    *,
    latent_shape: tuple[int, int, int],
    null_class: int | None,
    num_classes: int | None,
    class_map: tuple[int, ...] | None,
    guidance_interval: tuple[float, float],
    dtype: torch.dtype,
    seed: int,
    guidance_channels: int | None,
    micro_batch_images: int,
    scales: list[float],
    guided: list[int],
) -> None:
    """Reject arguments of a wrong type or range.

    Args are those of `DiffusionSampler`, and:
        scales: All guidance scales, those of `class_guidance` included.
        guided: Labels that have a guidance scale of their own.

    Raises:
        TypeError, UserError: An argument is of a wrong type or out of range.
    """
    if math.prod(checks.image_shape(latent_shape, name="latent_shape")) > 2**28:
        raise UserError(f"latent_shape: got {latent_shape}, expected at most 2**28 numbers")
    checks.whole("seed", seed, high=checks.MAX_SEED)
    checks.whole("micro_batch_images", micro_batch_images, low=1, high=2**20)
    for name, value in (
        ("null_class", null_class),
        ("num_classes", num_classes),
        ("guidance_channels", guidance_channels),
    ):
        if value is not None:
            checks.whole(name, value, low=int(name != "null_class"))
    for scale in scales:
        checks.number("guidance_scale", scale, low=0, high=1e6)
    for label in (*guided, *(class_map or ())):
        checks.whole("class_guidance, class_map", label, low=-(2**31))
    if class_map is not None and (
        min(class_map, default=-1) < 0 or num_classes not in (None, len(class_map))
    ):
        raise UserError(
            f"class_map: got {len(class_map)} entries from {min(class_map, default=None)}, "
            "expected one class of the model, 0 or higher, for each of num_classes"
        )
    if len(guidance_interval) != 2:
        raise UserError(f"guidance_interval: got {guidance_interval}, expected two numbers")
    first, last = (checks.number("guidance_interval", share) for share in guidance_interval)
    if not 0 <= first < last <= 1:
        raise UserError(
            f"guidance_interval: got ({first}, {last}), expected 0 <= start < stop <= 1; change it"
        )
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise UserError(f"dtype: got {dtype}, expected float32, float16 or bfloat16")


def check_guidance(
    scheduler: dict[str, Any], scale: float, null_class: int | None, takes_guidance: bool
) -> None:
    """Reject a guidance scale that the model does not support.

    Args:
        scheduler: Content of the model's scheduler_config.json.
        scale: Guidance scale; 1 means no guidance.
        null_class: Label that stands for "no class"; None if the model has none.
        takes_guidance: Whether the guidance scale is an input of the model.

    Raises:
        UserError: The model has guidance folded into its weights, or it has no null class.
    """
    if scale == 1.0:
        return
    if "distilled_guidance_scale" in scheduler:
        raise UserError(
            f"guidance_scale: got {scale} for a denoiser that has guidance "
            f"{scheduler['distilled_guidance_scale']} folded in, expected 1; set guidance_scale=1"
        )
    if null_class is None and not takes_guidance:
        raise UserError(
            f"guidance_scale: got {scale} for a model without a null class, "
            "expected 1; set guidance_scale=1, or, for a UNet trained with dropped labels, "
            "denoiser.null_class"
        )
