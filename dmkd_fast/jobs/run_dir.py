"""Create, find and lock run directories; each job has its own.

A run directory holds the resolved config, `config.yaml`, from the start. A run that was killed
before its first checkpoint can therefore be resumed too, from its beginning. `.launch` names the
torchrun that created the directory, so that processes restarted by that torchrun find it. Only one
process at a time uses a run directory; it holds a lock on `.lock`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shlex
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from dmkd_fast.config.jobs import DistillConfig, PretrainConfig, RunConfig, TeacherConfig
from dmkd_fast.config.loading import Section, dump_config, load_config
from dmkd_fast.config.overrides import Overrides
from dmkd_fast.config.reference import JOBS
from dmkd_fast.runtime import files
from dmkd_fast.runtime.device import is_out_of_memory
from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.runtime.errors import UserError, invalid, warn_once
from dmkd_fast.runtime.model_files import CONFIG as MODEL_CONFIG
from dmkd_fast.runtime.signals import Interrupts
from dmkd_fast.training.loop import TrainingLoop

LOG = logging.getLogger("dmkd_fast")
C = TypeVar("C", bound=RunConfig)
CONFIG, CHECKPOINTS, LAUNCH, LOCK = "config.yaml", "checkpoints", ".launch", ".lock"
SUMMARY = "summary.json"
# How to resume the jobs that make a classifier.
_CLASSIFIERS: dict[type[Section], str] = {
    DistillConfig: "distill {} --resume",
    TeacherConfig: "pretrain teacher {} --resume --data DIR",
}
# torchrun restarts ranks after it has asked their predecessors to end; on another machine a
# predecessor may still run and hold the lock.
RESTART_WAIT_S = 30
# `dmkd report` holds the lock for a moment to see whether a run goes on.
_LOOK_S = 0.3


def load(kind: type[C], source: str | Path | C, overrides: Overrides = (), *, resume: bool) -> C:
    """Load the config of a job; on resume, the config of a run stands for the folder it lies in.

    The saved config names the folder in which the run began, which may have been moved or copied.

    Args:
        kind: Class of the config.
        source: Path of a YAML file, or a config.
        overrides: Settings to change; on resume, at most `run_dir`.
        resume: Whether a run is to be resumed.

    Raises:
        UserError: A setting is wrong, or one other than run_dir is changed on resume.
    """
    config = load_config(kind, source, overrides)
    if not resume:
        return config
    _refuse_changes(overrides)
    if isinstance(source, str | Path) and not overrides and Path(source).name == CONFIG:
        folder = Path(source).parent
        if (folder / LOCK).is_file() or has_checkpoint(folder):
            config = config.model_copy(update={"run_dir": str(folder)})
    return config


def name_new(config: C) -> C:
    """Replace `run_dir: auto` by runs/NAME-DATE-TIME."""
    if config.run_dir == "auto":
        # Microseconds keep the names of runs that are started together apart.
        name = f"{config.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
        config = config.model_copy(update={"run_dir": f"runs/{name}"})
    return config


def check_new(config: RunConfig) -> None:
    """Refuse the directory of another run, before anything is loaded or written.

    Raises:
        UserError: The directory holds a run, or cannot be accessed.
    """
    folder = _folder(config)
    if _exists(folder / CONFIG):
        raise UserError(
            f"run_dir: {folder} holds a run already; choose another, or add --resume to go on"
        )


@contextlib.contextmanager
def locked(folder: Path, *, ranks: Ranks = ALONE) -> Iterator[None]:
    """Create a run directory if it does not exist, and lock it against other processes.

    Rank 0 holds the lock; all ranks must call this function.

    Raises:
        UserError: Another process uses the directory, or the directory cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        with ranks.agreed(), _writing(folder):
            if ranks.is_first:
                files.make_folder(folder)
                wait_s = RESTART_WAIT_S if ranks.restarts else _LOOK_S
                if not stack.enter_context(files.locked(folder / LOCK, wait_s=wait_s)):
                    raise UserError(
                        f"run_dir: another process uses {folder} now; wait until it has ended, or "
                        "choose another directory"
                    )
        yield


@contextlib.contextmanager
def opened(config: RunConfig, *, resume: bool) -> Iterator[Path]:
    """Lock the directory of a run of one process; create it unless the run is resumed.

    Raises:
        UserError: See `locked` and `claim`.
    """
    folder = Path(config.run_dir)
    with locked(folder):
        if not resume:
            claim(config)
        yield folder


def claim(config: RunConfig, *, launch: str = "") -> Path:
    """Save the config of a new run in its directory, which is created if it does not exist.

    Args:
        config: Resolved config.
        launch: Identity of this torchrun (`Ranks.launch`), which `find_launched` compares; empty
            without torchrun.

    Raises:
        UserError: The directory holds a run already, or cannot be written to.
    """
    check_new(config)
    folder = _folder(config)
    with _writing(folder):
        files.make_folder(folder)
        mark(folder, launch)
        files.replace(folder / CONFIG, [dump_config(config).encode()])
        files.sync(folder)
    return folder


def find(config: C) -> C:
    """Load the saved config of the run to resume: in `run_dir`, or the newest of this name.

    Raises:
        UserError: There is no such run.
    """
    if config.run_dir != "auto":
        folder = _folder(config)
        if not _exists(folder / CONFIG):
            got = f"no run and no checkpoint in {folder}"
            raise invalid("--resume", got, CONFIG, "start a new run")
    else:
        found = _named(config, CONFIG)
        if not found:
            got = f"no run in runs/{config.name}-DATE-TIME"
            raise invalid("--resume", got, "one", "start without --resume or set run_dir=DIR")
        # Two runs may have equal times of writing; the later name is then the newer run.
        folder = max(found, key=lambda path: (_last_written(path), path.name))
    return load_config(type(config), folder / CONFIG).model_copy(update={"run_dir": str(folder)})


def restore(loop: TrainingLoop) -> None:
    """Continue a run from its newest checkpoint, if it has one, and say where it goes on."""
    if not has_checkpoint(loop.run_dir):
        loop.display.note(f"{loop.run_dir}: no checkpoint yet; going on at the beginning")
        return
    restored = loop.restore()
    for note in restored.notes:
        LOG.warning(note)
    loop.display.note(
        f"{loop.run_dir}: going on at step {restored.step:,} of {loop.num_steps:,}, "
        f"{loop.num_views:,} views"
    )


def finished(config: PretrainConfig | DistillConfig) -> dict[str, Any] | None:
    """Return the summary of a run that has ended; None for one with something left to do.

    That is a run that was stopped or made longer, or whose result is missing.
    """
    folder = _folder(config)
    path, results = folder / SUMMARY, (folder / "student", folder / "model")
    if not _exists(path) or not any(next(r.rglob("*.safetensors"), None) for r in results):
        return None
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        is_whole = summary["views"] >= config.train.num_views
    except (OSError, ValueError, LookupError, TypeError):  # damaged: the results are written again
        return None
    if is_whole:
        warn_once(f"{path.parent}: the run has ended; nothing was changed")
    return summary if is_whole else None


def check_classifier(folder: Path) -> None:
    """Refuse the directory of a run that has made no classifier; accept all other folders.

    Args:
        folder: Folder in which no classifier was found.

    Raises:
        UserError: The run is that of a denoiser, or not finished; the message says how to go on.
    """
    if not (folder / CONFIG).is_file() or (folder / MODEL_CONFIG).is_file():
        return
    kind = _kind(folder)
    if kind is None:
        return
    if kind not in _CLASSIFIERS:
        raise invalid(folder, "the run of a denoiser", "a classifier, or the run of one")
    config = shlex.quote(str(folder / CONFIG))
    ranks = "torchrun (as before) " if any((folder / CHECKPOINTS).glob("rank-*")) else ""
    fix = f"resume it with: {ranks}dmkd {_CLASSIFIERS[kind].format(config)}"
    if files.is_locked(folder / LOCK):
        fix = "wait until it has ended"
    raise UserError(f"{folder}: this run has no classifier, as it is not finished; {fix}")


def finish(folder: Path, summary: dict[str, Any]) -> None:
    """Write the summary of a run, which marks it as finished."""
    with _writing(folder):
        files.replace(folder / SUMMARY, [json.dumps(summary, indent=2).encode() + b"\n"])
        files.sync(folder)


def _refuse_changes(overrides: Overrides) -> None:
    """Refuse overrides of a run to resume, which uses its saved config.

    Raises:
        UserError: A setting other than run_dir is changed.
    """
    changed = [text for text in overrides if text.partition("=")[0] != "run_dir"]
    if changed:
        got, fix = changed[0], "remove it, or change config.yaml in the run directory"
        raise invalid("--resume", got, "no setting but run_dir, as the saved ones are used", fix)


def find_launched(config: C, launch: str) -> C | None:
    """Return the config with the run directory that belongs to this launch; None without one."""
    folders = [Path(config.run_dir)]
    if config.run_dir == "auto":
        folders = _named(config, LAUNCH)
    for folder in folders:
        there = all(_exists(folder / name) for name in (CONFIG, LAUNCH))
        if there and (folder / LAUNCH).read_text(encoding="utf-8") == launch:
            return config.model_copy(update={"run_dir": str(folder)})
    return None


def mark(folder: Path, launch: str) -> None:
    """Record the launch that a run belongs to; does nothing if `launch` is empty.

    Raises:
        UserError: The directory cannot be written to.
    """
    if launch:
        with _writing(folder):
            files.replace(folder / LAUNCH, [launch.encode()])


def resume_command(folder: Path, ranks: Ranks = ALONE) -> str:
    """Return the command that resumes a distillation."""
    before = "torchrun (as before) " if ranks.world_size > 1 else ""
    return f"{before}dmkd distill {shlex.quote(str(folder / CONFIG))} --resume"


@contextlib.contextmanager
def resume_hint(folder: Path, hint: str, ranks: Ranks = ALONE) -> Iterator[None]:
    """Print how to resume a run if an error that a person can act on ends it early.

    Args:
        folder: Run directory.
        hint: Command or arguments that resume the run.
        ranks: Ranks of the run, of which the first one prints.
    """
    try:
        yield
    except BaseException as stop:
        is_known = isinstance(stop, KeyboardInterrupt | UserError) or is_out_of_memory(stop)
        if is_known and ranks.is_first and has_checkpoint(folder):
            print(f"to go on: {hint}", file=sys.stderr)
        raise


@contextlib.contextmanager
def writing_results(folder: Path, resume: str) -> Iterator[None]:
    """Turn an error of writing results into one line, and say how to go on after a signal.

    Args:
        folder: Folder of the results, named if the error names no file.
        resume: How to write the results again.

    Raises:
        UserError: A file cannot be written. The last checkpoint holds the trained network.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP has arrived.
    """
    try:
        with Interrupts():
            yield
    except KeyboardInterrupt:
        print(f"training is finished and saved; to write its results, {resume}", file=sys.stderr)
        raise
    except (OSError, SafetensorError) as error:
        path = getattr(error, "filename", None) or folder
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: cannot write ({reason}); training is finished and saved; free space or fix "
            f"the folder, then {resume}"
        ) from None


def has_checkpoint(folder: Path) -> bool:
    """Return whether the run, or any of its ranks, has a checkpoint, complete or not."""
    return any(any((folder / CHECKPOINTS).glob(names)) for names in ("step-*", "rank-*/step-*"))


def _kind(folder: Path) -> type[Section] | None:
    """Return the class of a run's saved config; None if the file is of no known job."""
    for kind in JOBS.values():
        with contextlib.suppress(UserError):
            load_config(kind, folder / CONFIG)
            return kind
    return None


def _named(config: RunConfig, file: str) -> list[Path]:
    """Return the directories of runs of this name, as `name_new` makes them, that hold a file."""
    form = re.compile(rf"{re.escape(config.name)}-\d{{8}}-\d{{6}}(-\d{{6}})?")
    found = [path.parent for path in Path("runs").glob(f"{config.name}-*/{file}")]
    return [folder for folder in found if form.fullmatch(folder.name)]


def _last_written(folder: Path) -> float:
    places = [folder / CONFIG, *(folder / CHECKPOINTS).glob("step-*")]
    return max(path.stat().st_mtime for path in places)


def _folder(config: RunConfig) -> Path:
    """Return the run directory that a config names."""
    if not config.run_dir.strip() or "\0" in config.run_dir:
        got = repr(config.run_dir)
        raise invalid("run_dir", got, "the path of a directory", "set run_dir=DIR, or run_dir=auto")
    return Path(config.run_dir)


def _exists(path: Path) -> bool:
    with _writing(path.parent):
        return path.exists()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn an OSError into a one-line UserError about the run directory."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run_dir: cannot write to {folder} ({error.strerror}); set run_dir=DIR to another"
        ) from None
