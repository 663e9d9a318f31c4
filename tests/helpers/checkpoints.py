"""Save and restore objects at once, without a run around them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dmkd_fast.checkpoint.manager import CheckpointManager, Restored
from dmkd_fast.checkpoint.step_folders import Stateful


def save(folder: Path, step: int, objects: Mapping[str, Stateful], *, keep: int = 2) -> Path:
    """Write a checkpoint into `folder` and return its path."""
    manager = CheckpointManager(folder, keep=keep)
    try:
        return manager.finish(step, objects)
    finally:
        manager.writer.close()


def restore(folder: Path, objects: Mapping[str, Stateful]) -> Restored:
    """Load the newest intact checkpoint of `folder`."""
    return CheckpointManager(folder).restore(objects)
