"""Schedulers of large flow models, as their pipelines set them for a number of tokens."""

from __future__ import annotations

import math
from typing import Any

from dmkd_fast.denoisers.config_values import number, whole
from dmkd_fast.denoisers.families.folder import ModelFolder
from dmkd_fast.runtime.errors import invalid

FLOW = "FlowMatchEulerDiscreteScheduler"
# Largest mu; exp of it is a shift that leaves no noise level below 0.999.
MOST_MU = 20.0


def flow_scheduler(model: ModelFolder, num_tokens: int) -> dict[str, Any]:
    """Return a flow scheduler's config with the shift for images of `num_tokens` tokens.

    A dynamic shift grows with the number of tokens: mu is linear in it, and the levels are shifted
    by exp(mu), or by mu itself.

    Args:
        model: Folder of the model.
        num_tokens: Number of tokens of an image in the transformer.

    Raises:
        UserError: The scheduler is another one, or one of its values is wrong.
    """
    config, path = model.scheduler, model.path / "scheduler" / "scheduler_config.json"
    if (name := config.get("_class_name")) != FLOW:
        got, fix = f"_class_name {name!r:.60}", "use the scheduler that belongs to the model"
        raise invalid(f"{path}", got, FLOW, fix)
    if not config.get("use_dynamic_shifting"):
        return config
    least = whole(path, config, "base_image_seq_len", 256)
    most = whole(path, config, "max_image_seq_len", 4096)
    low = number(path, config, "base_shift", 0.5, low=-MOST_MU, high=MOST_MU)
    high = number(path, config, "max_shift", 1.15, low=-MOST_MU, high=MOST_MU)
    if most <= least:
        expected = f"more than base_image_seq_len={least}"
        raise invalid(f"{path}: max_image_seq_len", most, expected, "fetch it again")
    mu = low + (high - low) * (num_tokens - least) / (most - least)
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear") or not mu <= MOST_MU or (kind == "linear" and mu <= 0):
        got = f"time_shift_type={kind!r:.60} with mu={mu:g} for {num_tokens} tokens"
        raise invalid(f"{path}", got, "a shift above 0", "fetch it again")
    shift = math.exp(mu) if kind == "exponential" else mu
    return config | {"use_dynamic_shifting": False, "shift": shift}
