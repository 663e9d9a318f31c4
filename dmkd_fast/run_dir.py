"""Run directories: a new one for each job, found again to resume.

Stands on floor 0. It holds `config.yaml`, the resolved settings, from its first moment; so a run
that was killed before its first checkpoint can be resumed too, from its beginning. `.launch` says
which torchrun made it, so that processes which that one starts anew find it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TypeVar

from dmkd_fast import durable
from dmkd_fast.config import ConfigError, RunConfig, dump, load

C = TypeVar("C", bound=RunConfig)
CONFIG, CHECKPOINTS, LAUNCH = "config.yaml", "checkpoints", ".launch"


def name_new(config: C) -> C:
    """Settings with `run_dir: auto` replaced by runs/NAME-DATE-TIME."""
    if config.run_dir != "auto":
        return config
    run_dir = f"runs/{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return config.model_copy(update={"run_dir": run_dir})


def claim(config: RunConfig, *, launch: str = "") -> Path:
    """Make `config.run_dir` and save the settings in it.

    Args:
        config: Resolved.
        launch: See `find_launched`.

    Raises:
        ConfigError: It holds a run already, or cannot be written to.
    """
    folder = Path(config.run_dir)
    if (folder / CONFIG).exists():
        raise ConfigError(
            f"run_dir: {folder} holds a run already; choose another, or add --resume to go on"
        )
    try:
        durable.make_folder(folder)
        mark(folder, launch)
        durable.replace(folder / CONFIG, [dump(config).encode()])
        durable.sync(folder)
    except OSError as error:
        raise ConfigError(
            f"run_dir: cannot write to {folder} ({error.strerror}); set run_dir=DIR to another"
        ) from None
    return folder


def find(config: C) -> C:
    """The saved settings of the run to resume: of `run_dir`, or of the newest run of this name.

    Raises:
        ConfigError: There is no such run.
    """
    if config.run_dir != "auto":
        folder = Path(config.run_dir)
        if not (folder / CONFIG).exists():
            raise ConfigError(
                f"--resume: got no run and no checkpoint in {folder}, expected {CONFIG}; start anew"
            )
    else:
        found = sorted(Path("runs").glob(f"{config.name}-*/{CONFIG}"))
        if not found:
            raise ConfigError(
                f"--resume: got no run in runs/{config.name}-*, expected one; start without "
                "--resume or set run_dir"
            )
        # Two may be written within one tick of the clock: then the later name.
        folder = max((path.parent for path in found), key=lambda p: (_last_written(p), p.name))
    return load(type(config), folder / CONFIG).model_copy(update={"run_dir": str(folder)})


def find_launched(config: C, launch: str) -> C | None:
    """The settings as they are to be found by `find`, if this launch has a run of this name."""
    folders = [Path(config.run_dir)]
    if config.run_dir == "auto":
        folders = [path.parent for path in Path("runs").glob(f"{config.name}-*/{LAUNCH}")]
    for folder in folders:
        there = all((folder / name).exists() for name in (CONFIG, LAUNCH))
        if there and (folder / LAUNCH).read_text(encoding="utf-8") == launch:
            return config.model_copy(update={"run_dir": str(folder)})
    return None


def mark(folder: Path, launch: str) -> None:
    """Say whose run this is; nothing is said of one without a launch."""
    if launch:
        durable.replace(folder / LAUNCH, [launch.encode()])


def has_checkpoint(folder: Path) -> bool:
    """Whether a run, or any of its ranks, has one, whole or not."""
    return any(any((folder / CHECKPOINTS).glob(names)) for names in ("step-*", "rank-*/step-*"))


def _last_written(folder: Path) -> float:
    places = [folder / CONFIG, *(folder / CHECKPOINTS).glob("step-*")]
    return max(path.stat().st_mtime for path in places)
