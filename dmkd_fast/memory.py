"""What a run keeps in memory, by part, and whether it fits: known before the ring is allocated.

Stands on floor 3, beside `job.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from dmkd_fast import config as cfg
from dmkd_fast import origin, runtime
from dmkd_fast.capacity import capacity_plan, largest_capacity
from dmkd_fast.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from dmkd_fast.job import Parts


def plan(config: cfg.DistillConfig, parts: Parts) -> dict[str, int]:
    """Bytes that a run keeps on its device, by part; activations come on top."""
    compute = getattr(torch, config.dtype).itemsize
    weights = sum(p.numel() for p in parts.student.parameters())
    moments = 2 if config.optim.name == "adamw" else 1
    ring = capacity_plan(config.ring.capacity_images, **_ring_shape(config, parts))
    return {f"ring {name}": count for name, count in ring.items()} | {
        "denoiser": compute * origin.num_weights(parts.origin),
        "teacher": 4 * sum(p.numel() for p in parts.teachers.together.parameters()),
        "student, gradients, optimizer, average": 4 * weights * (3 + moments),
        "test images": parts.test_set.num_bytes,
    }


def check(config: cfg.DistillConfig, parts: Parts, ranks: Ranks = ALONE) -> int:
    """The largest ring.capacity_images that fits beside the other parts of a run.

    Args:
        config: Of this rank; see `job.share`.
        parts: Loaded.
        ranks: Those of one machine share a CPU's memory; each has a GPU of its own.

    Raises:
        ConfigError: The one asked for does not.
    """
    parts_plan = plan(config, parts)
    have = runtime.available_bytes(runtime.resolve_device(config.device))
    if config.device == "cpu":
        have //= ranks.local_world_size
    # Models and test images are loaded by now; what is still to come has to fit.
    ring = sum(count for name, count in parts_plan.items() if name.startswith("ring "))
    rest = sum(parts_plan.values()) - ring - parts_plan["test images"]
    fits = ranks.world_size * largest_capacity(have - rest, **_ring_shape(config, parts))
    if ring + rest > have:
        raise cfg.ConfigError(
            f"ring.capacity_images: got {ranks.world_size * config.ring.capacity_images}, which "
            f"needs {ring / 2**30:.1f} GiB of {have / 2**30:.1f} GiB available"
            f"{' to each rank' * (ranks.world_size > 1)}; lower it to at most {fits}"
        )
    return fits


@contextmanager
def explained(config: cfg.DistillConfig, parts: Parts | None = None) -> Iterator[None]:
    """Running out of memory becomes one line: what a run keeps, what there was, what to lower.

    Args:
        config: Resolved.
        parts: None: while they are being loaded.

    Raises:
        ConfigError: The device's or the host's memory is used up.
    """
    have = runtime.available_bytes(runtime.resolve_device(config.device))
    try:
        yield
    except Exception as error:
        if not runtime.is_out_of_memory(error):
            raise
        keeps = "models and test images do not fit"
        if parts is not None:
            counts = plan(config, parts)
            ring = {"ring": sum(n for name, n in counts.items() if name.startswith("ring "))}
            rest = {name: n for name, n in counts.items() if not name.startswith("ring ")}
            each = ", ".join(f"{name} {_gib(n)}" for name, n in (ring | rest).items())
            keeps = f"it keeps {_gib(sum(counts.values()))} GiB ({each}) and activations on top"
        raise cfg.ConfigError(
            f"out of memory: the run had {_gib(have)} GiB of {config.device} memory left when "
            f"{'it began' if parts else 'it loaded its parts'}; {keeps}; lower train.batch_size="
            f"{config.train.batch_size}, ring.capacity_images={config.ring.capacity_images} or "
            f"{config.block_name}={config.block_images}, or raise train.accumulate="
            f"{config.train.accumulate}"
        ) from None


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"


def _ring_shape(config: cfg.DistillConfig, parts: Parts) -> dict[str, Any]:
    return {
        "image_shape": parts.origin.image_shape,
        "block_images": config.block_images,
    }
