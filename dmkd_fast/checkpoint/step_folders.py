"""Save and restore any objects that have `state_dict` and `load_state_dict`.

A checkpoint is a folder `step-N` (`step-N.1` for a second one at that step) of three files:
`state.safetensors`, `state.json` with the name of the folder and everything that is not a tensor,
and `SHA256SUMS`, which `sha256sum -c` reads. The folder gets its name when all of it is on disk, so
a crash leaves the old state or the new one, never a mix. On loading, a checkpoint that is damaged
or was moved to another name is detected, and an older one is used.

With several ranks, rank 0 writes the state common to all ranks, and each rank writes its own state.
A checkpoint counts only if it is intact on all ranks.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load
from torch import Tensor

from dmkd_fast.checkpoint.state import call_functions, join_state, split_state
from dmkd_fast.runtime import files, model_files
from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.runtime.errors import UserError

TENSORS, REST, SUMS = FILES = ("state.safetensors", "state.json", "SHA256SUMS")


class Stateful(Protocol):
    """Interface of an object that can be saved."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the object needs to continue.

        A value may be a function without arguments, for what is known only when the file is
        written. The thread that writes the file calls it.
        """
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Load the result of `state_dict`."""
        ...


class Restored(NamedTuple):
    """Result of `restore`: the step of the loaded checkpoint, and notes on newer ones."""

    step: int
    notes: list[str]
    """One line for each newer checkpoint that was damaged or not on all ranks."""


def save(folder: Path, step: int, objects: Mapping[str, Stateful], *, keep: int = 2) -> Path:
    """Write a checkpoint into `folder`, and delete all but the newest `keep` checkpoints.

    Returns:
        Folder of the new checkpoint.

    Raises:
        SaveError: The disk is full or cannot be written to; nothing of the new checkpoint is left.
    """
    return _write(folder, step, _Snapshot(objects), keep)


def restore(folder: Path, objects: Mapping[str, Stateful]) -> Restored:
    """Load the newest intact checkpoint of `folder`, and set damaged newer ones aside.

    Raises:
        UserError: There is no intact checkpoint, or it belongs to objects of other names, kinds
            or shapes.
    """
    return _restore(folder, objects, ALONE, folder, {})


class Saver:
    """Write checkpoints in the background; training waits only for a copy in memory.

    Args:
        folder: Folder of the checkpoints.
        writer: Thread that hashes and writes them.
        every_s: Seconds from one checkpoint to the next.
        keep: Number of checkpoints to keep.
        ranks: Ranks of the run, which start and finish checkpoints together. All but rank 0 use
            a folder of their own below `folder`.
    """

    def __init__(
        self,
        folder: Path,
        writer: files.Writer,
        *,
        every_s: float,
        keep: int = 2,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder = ranks.folder(folder)
        self.writer, self.every_s, self.keep = writer, every_s, keep
        self._ranks, self._first_folder = ranks, folder
        self._last = time.monotonic()
        self._saving: Future[Path] | None = None
        self._latest: Future[Path] | None = None
        self._is_ours = False

    def restore(
        self, objects: Mapping[str, Stateful], *, common: Mapping[str, Stateful] | None = None
    ) -> Restored:
        """Load the newest checkpoint that is intact on all ranks; see `restore`.

        A run that was killed while its very first checkpoint was written starts from the beginning.

        Args:
            objects: Objects that this rank saved.
            common: Objects that only rank 0 saves; the other ranks load them from its checkpoint.
        """
        restored = _restore(self.folder, objects, self._ranks, self._first_folder, common or {})
        self._is_ours = True
        return restored

    def check_folder(self) -> None:
        """Refuse a folder with the checkpoints of another run.

        Raises:
            UserError: The folder holds checkpoints that this object neither restored nor wrote.
        """
        if not self._is_ours and _found(self.folder):
            raise UserError(
                f"{self.folder}: got checkpoints of another run, expected none; restore them "
                "first, or choose another folder"
            )

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._saving is not None and not self._saving.done()

    def is_due(self) -> bool:
        """Return whether the next checkpoint is due and the last one has been written."""
        return not self.is_busy and time.monotonic() - self._last > self.every_s

    def start(self, step: int, objects: Mapping[str, Stateful], *, mark: int = 0) -> None:
        """Copy the state, and queue the copy to be written.

        Args:
            step: Step in the name of the checkpoint.
            objects: Objects to save.
            mark: Number that distinguishes moments at the same step; equal on all ranks.
        """
        snapshot, self._is_ours = _Snapshot(objects), True
        snapshot.mark, snapshot.world_size = mark, self._ranks.world_size
        self._saving = self.writer.submit(lambda: _write(self.folder, step, snapshot, self.keep))
        self._latest, self._last = self._saving, time.monotonic()

    def withdraw(self) -> None:
        """Delete the last checkpoint after it is written, because another rank's write failed."""
        if self._latest is not None:
            self.writer.submit(functools.partial(_withdraw, self._latest))

    def problem(self) -> str | None:
        """Return once why the last checkpoint could not be written; the run goes on without it."""
        if self._saving is None or not self._saving.done():
            return None
        error, self._saving = self._saving.exception(), None
        if error is not None and not isinstance(error, files.SaveError):
            raise error
        return None if error is None else f"{error}; the run goes on"

    def finish(self, step: int, objects: Mapping[str, Stateful], *, mark: int = 0) -> Path:
        """Write the current state, and wait until it is on disk.

        Raises:
            SaveError: The checkpoint could not be written.
        """
        self.start(step, objects, mark=mark)
        assert self._saving is not None
        return self._saving.result()

    def describe(self, name: str) -> list[dict[str, Any]]:
        """Return one object's state in each readable checkpoint, without tensors, dicts, lists."""
        states = []
        for path in _found(self.folder):
            with contextlib.suppress(files.Damaged):
                record = _record(path, _read(path, names=(REST,))[REST])
                pairs = record["objects"][name]["pairs"]
                states.append({k: v for k, v in pairs if not isinstance(v, dict)})
        return states


class _Snapshot:
    """A copy of the state on the CPU, which later changes in place do not affect."""

    mark, world_size = 0, 1

    def __init__(self, objects: Mapping[str, Stateful]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.rest = {
            name: split_state(item.state_dict(), name, self.tensors)
            for name, item in objects.items()
        }
        self._copied: torch.cuda.Event | None = None
        if torch.cuda.is_initialized():
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> None:
        """Wait until the copies from the device are complete."""
        if self._copied is not None:
            self._copied.synchronize()


def _write(folder: Path, step: int, snapshot: _Snapshot, keep: int) -> Path:
    # One above the existing serials, since lower ones may have been deleted as the oldest.
    name = f"step-{step:09d}"
    serials = [_order(path)[1] for path in _found(folder) if _order(path)[0] == step]
    serial = max(serials, default=-1) + 1
    final = folder / (f"{name}.{serial}" if serial else name)
    partial = folder / f".{final.name}.partial"
    snapshot.wait()
    try:
        for stale in folder.glob(".step-*.partial"):
            files.discard(stale)
        files.make_folder(partial)
        states = {name: call_functions(state) for name, state in snapshot.rest.items()}
        facts = {"step": step, "mark": snapshot.mark, "world_size": snapshot.world_size}
        record = {"name": final.name, **facts, "objects": states}
        digests = {
            TENSORS: files.write(partial / TENSORS, model_files.file_parts(snapshot.tensors)),
            REST: files.write(partial / REST, [json.dumps(record).encode()]),
        }
        files.write(partial / SUMS, _sums(digests))
        files.publish(partial, final)
    except OSError as error:
        files.discard(partial)
        raise files.SaveError(
            f"checkpoint {final}: not written ({error.strerror or error}); those before it are as "
            "they were; free space or mend the folder"
        ) from None
    for old in _found(folder)[:-keep]:
        with contextlib.suppress(OSError):  # the next save tries again
            files.discard(files.hide(old, "partial"))
    for damaged in folder.glob(".step-*.damaged"):
        files.discard(damaged)
    return final


def _withdraw(written: Future[Path]) -> None:
    with contextlib.suppress(OSError):
        if written.exception() is None:
            files.discard(files.hide(written.result(), "partial"))


def _restore(
    folder: Path,
    objects: Mapping[str, Stateful],
    ranks: Ranks,
    first_folder: Path,
    common: Mapping[str, Stateful],
) -> Restored:
    """Try the checkpoints present on all ranks, newest first, until all ranks can load one."""
    paths = _found(folder)[::-1]
    mine, problems = _moments(paths)
    lists = [json.loads(text) for text in ranks.gather(json.dumps(list(mine.items())))]
    theirs = [{tuple(moment): name for moment, name in pairs} for pairs in lists]
    strange = {moment[2] for names in theirs for moment in names} - {ranks.world_size}
    if strange:
        count = strange.pop()
        how = "without torchrun" if count == 1 else f"with --nproc-per-node {count}"
        raise UserError(
            f"{first_folder}: got checkpoints of {count} rank{'s' * (count > 1)}, expected "
            f"{ranks.world_size}, as many as there are now; resume {how}"
        )
    for moment in sorted(set.intersection(*(set(names) for names in theirs)), reverse=True):
        path, problem = folder / mine[moment], ""
        with ranks.agreed():
            try:
                _load(path, objects)
                if common:
                    _load(first_folder / theirs[0][moment], common, is_part=True)
            except files.Damaged as error:
                problem = problems[path] = str(error)
        others = ranks.gather(problem)
        if any(others):
            bad = next(rank for rank, text in enumerate(others) if text)
            problems.setdefault(path, f"on rank {bad}: {others[bad]}")
            continue
        newer = paths[: paths.index(path)]
        _set_aside(newer)
        notes = [_note(other, problems) + f"; {path.name} is used" for other in newer]
        return Restored(moment[0], notes)
    notes = [_note(path, problems) for path in paths if path in problems]
    everywhere = ranks.gather(json.dumps([len(paths), notes]))
    counts, all_notes = zip(*(json.loads(text) for text in everywhere), strict=True)
    if ranks.world_size > 1 and max(counts) == 1 and not any(all_notes):
        _set_aside(paths)
        return Restored(0, [f"checkpoint {p.name}: not on all ranks; started again" for p in paths])
    told = "; ".join(note for notes in all_notes for note in notes)
    if told:
        raise UserError(
            f"{first_folder}: got no whole checkpoint ({told}), expected one; start a new run"
        )
    raise UserError(f"{first_folder}: got no checkpoint, expected step-N folders; start a new run")


def _moments(paths: list[Path]) -> tuple[dict[tuple[int, ...], str], dict[Path, str]]:
    """Return the names of readable checkpoints by moment, and the problems of damaged ones.

    A moment is (step, mark, world size, number of earlier checkpoints with these three).
    """
    names: dict[tuple[int, ...], str] = {}
    problems = {}
    for path in reversed(paths):
        try:
            record = _record(path, _read(path, names=(REST,))[REST])
        except files.Damaged as error:
            problems[path] = str(error)
            continue
        moment = record["step"], record["mark"], record["world_size"]
        names[(*moment, sum(known[:3] == moment for known in names))] = path.name
    return names, problems


def _note(path: Path, problems: Mapping[Path, str]) -> str:
    if path in problems:
        return f"checkpoint {path.name}: damaged ({problems[path]})"
    return f"checkpoint {path.name}: not on all ranks"


def _set_aside(paths: list[Path]) -> None:
    """Hide checkpoints that are not used.

    Not called if all are damaged, so that they stay available for manual repair.
    """
    for path in paths:
        with contextlib.suppress(OSError):
            files.hide(path, "damaged")


def _load(path: Path, objects: Mapping[str, Stateful], *, is_part: bool = False) -> None:
    """Load objects from a checkpoint; with `is_part`, it may hold other objects too."""
    contents = _read(path)
    states = _record(path, contents[REST])["objects"]
    if is_part:
        states = {name: state for name, state in states.items() if name in objects}
    _fill(path, states, load(contents[TENSORS]), objects)


def _read(path: Path, *, names: tuple[str, ...] = (TENSORS, REST)) -> dict[str, bytes]:
    """Read files of a checkpoint, and compare them with its sums before any of them is used."""
    contents = {name: files.read(path / name) for name in names}
    sums = files.read(path / SUMS)
    expected = _sums({name: files.sha256([data]) for name, data in contents.items()})
    for name, line in zip(names, expected, strict=True):
        if line not in sums:
            raise files.Damaged(f"{name} has not the SHA-256 that {SUMS} says")
    if len(names) == 2 and sums != b"".join(expected):
        raise files.Damaged(f"{SUMS} is not as it was written")
    return contents


def _sums(digests: Mapping[str, str]) -> list[bytes]:
    return [f"{digest}  {name}\n".encode() for name, digest in digests.items()]


def _record(path: Path, text: bytes) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(text)
    if record["name"] != path.name:
        raise files.Damaged(f"it is {record['name']} in another place")
    return record


def _fill(
    path: Path,
    states: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    objects: Mapping[str, Stateful],
) -> None:
    if states.keys() != objects.keys():
        raise UserError(
            f"checkpoint {path}: got {sorted(states)}, expected {sorted(objects)}; resume what was "
            "saved"
        )
    for name, item in objects.items():
        try:
            item.load_state_dict(join_state(states[name], tensors))
        except files.Damaged:
            raise
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"checkpoint {path}: {name} does not fit ({reason}); resume with the settings of "
                "the run"
            ) from None


def _found(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    return sorted(filter(_order, folder.glob("step-*")), key=_order)


def _order(path: Path) -> tuple[int, ...]:
    """Return (step, serial number at that step), or () if the name is not a checkpoint's."""
    name = re.fullmatch(r"step-(\d+)(?:\.(\d+))?", path.name)
    return (int(name[1]), int(name[2] or 0)) if name else ()
