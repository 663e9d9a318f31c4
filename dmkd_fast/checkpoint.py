"""Saves and restores any objects that have `state_dict` and `load_state_dict`.

Stands on floor 2. A checkpoint is a folder `step-N` (`step-N.1` for a second one at that step) of
three files: `state.safetensors`, `state.json` with the folder's own name and everything that is not
a tensor, and `SHA256SUMS`, which `sha256sum -c` reads. It gets its name when all of it is on disk,
so a crash leaves the old state or the new one, never a mix. What is damaged, or lies where
something else was written, is noticed on loading, and the checkpoint before it is used.
"""

from __future__ import annotations

import contextlib
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

from dmkd_fast import durable, weights

TENSORS, REST, SUMS = FILES = ("state.safetensors", "state.json", "SHA256SUMS")


class Stateful(Protocol):
    """What can be saved."""

    def state_dict(self) -> dict[str, Any]:
        """Everything the object needs to go on.

        A value may be a function without arguments: it is called by whoever writes the file, for
        what is known only then.
        """
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Inverse of `state_dict`."""
        ...


class Restored(NamedTuple):
    """What `restore` found."""

    step: int
    notes: list[str]
    """One line for each newer checkpoint that was damaged."""


def save(folder: Path, step: int, objects: Mapping[str, Stateful], *, keep: int = 2) -> Path:
    """Write a checkpoint of `folder` and delete all but the newest `keep`.

    Returns:
        The checkpoint's folder.

    Raises:
        SaveError: The disk is full or cannot be written to; nothing of the new checkpoint is left.
    """
    return _write(folder, step, _Snapshot(objects), keep)


def restore(folder: Path, objects: Mapping[str, Stateful]) -> Restored:
    """Load the newest checkpoint of `folder` that is whole; damaged newer ones are set aside.

    Raises:
        ValueError: There is none, or it belongs to objects of other names, kinds or shapes.
    """
    notes, damaged = [], []
    for path in reversed(_found(folder)):
        try:
            files = _read(path)
            record = _record(path, files[REST])
            _fill(path, record["objects"], load(files[TENSORS]), objects)
        except durable.Damaged as error:
            notes.append(f"checkpoint {path.name}: damaged ({error})")
            damaged.append(path)
            continue
        for other in damaged:  # Only now: were all of them damaged, somebody might mend one.
            with contextlib.suppress(OSError):
                durable.hide(other, "damaged")
        return Restored(record["step"], [f"{note}; {path.name} is used" for note in notes])
    if notes:
        raise ValueError(
            f"{folder}: got no whole checkpoint ({'; '.join(notes)}), expected one; start a new run"
        )
    raise ValueError(f"{folder}: got no checkpoint, expected step-N folders; start a new run")


class Saver:
    """Checkpoints while training goes on: it waits for a copy in memory only.

    Args:
        folder: Of the checkpoints.
        writer: Hashes and writes them.
        every_s: Seconds from one to the next.
        keep: How many are kept.
    """

    def __init__(
        self, folder: Path, writer: durable.Writer, *, every_s: float, keep: int = 2
    ) -> None:
        self.folder, self.writer, self.every_s, self.keep = folder, writer, every_s, keep
        self._last = time.monotonic()
        self._saving: Future[Path] | None = None
        self._is_ours = False

    def restore(self, objects: Mapping[str, Stateful]) -> Restored:
        """See `restore`."""
        restored = restore(self.folder, objects)
        self._is_ours = True
        return restored

    def check_folder(self) -> None:
        """Refuse to mix with another run.

        Raises:
            ValueError: The folder holds checkpoints that were neither restored nor written here.
        """
        if not self._is_ours and _found(self.folder):
            raise ValueError(
                f"{self.folder}: got checkpoints of another run, expected none; restore them "
                "first, or choose another folder"
            )

    def is_due(self) -> bool:
        """Whether it is time for the next one, and the last one is written."""
        busy = self._saving is not None and not self._saving.done()
        return not busy and time.monotonic() - self._last > self.every_s

    def start(self, step: int, objects: Mapping[str, Stateful]) -> None:
        """Copy the state and have the copy written."""
        snapshot, self._is_ours = _Snapshot(objects), True
        self._saving = self.writer.submit(lambda: _write(self.folder, step, snapshot, self.keep))
        self._last = time.monotonic()

    def problem(self) -> str | None:
        """Why the last one could not be written, told once: the run goes on without it."""
        if self._saving is None or not self._saving.done():
            return None
        error, self._saving = self._saving.exception(), None
        if error is not None and not isinstance(error, durable.SaveError):
            raise error
        return None if error is None else f"{error}; the run goes on"

    def finish(self, step: int, objects: Mapping[str, Stateful]) -> Path:
        """Write the state as it is now, and wait for it.

        Raises:
            SaveError: It could not be written.
        """
        self.start(step, objects)
        assert self._saving is not None
        return self._saving.result()

    def describe(self, name: str) -> list[dict[str, Any]]:
        """The state of one object in each readable checkpoint, tensors and lists left out."""
        states = []
        for path in _found(self.folder):
            with contextlib.suppress(durable.Damaged):
                record = _record(path, _read(path, names=(REST,))[REST])
                pairs = record["objects"][name]["pairs"]
                states.append({k: v for k, v in pairs if not isinstance(v, dict)})
        return states


class _Snapshot:
    """Copies on the CPU that later changes in place do not reach."""

    def __init__(self, objects: Mapping[str, Stateful]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.rest = {n: _split(item.state_dict(), n, self.tensors) for n, item in objects.items()}
        self._copied: torch.cuda.Event | None = None
        if torch.cuda.is_initialized():
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> None:
        """Until the copies from the device are there."""
        if self._copied is not None:
            self._copied.synchronize()


def _write(folder: Path, step: int, snapshot: _Snapshot, keep: int) -> Path:
    final, serial = folder / f"step-{step:09d}", 0
    while final.exists():
        serial += 1
        final = folder / f"step-{step:09d}.{serial}"
    partial = folder / f".{final.name}.partial"
    snapshot.wait()
    try:
        for stale in folder.glob(".step-*.partial"):
            durable.discard(stale)
        durable.make_folder(partial)
        states = {name: _call(state) for name, state in snapshot.rest.items()}
        record = {"name": final.name, "step": step, "objects": states}
        digests = {
            TENSORS: durable.write(partial / TENSORS, weights.file_parts(snapshot.tensors)),
            REST: durable.write(partial / REST, [json.dumps(record).encode()]),
        }
        durable.write(partial / SUMS, _sums(digests))
        durable.publish(partial, final)
    except OSError as error:
        durable.discard(partial)
        raise durable.SaveError(
            f"checkpoint {final}: not written ({error.strerror or error}); those before it are as "
            "they were; free space or mend the folder"
        ) from None
    for old in _found(folder)[:-keep]:
        with contextlib.suppress(OSError):  # It is found again next time.
            durable.discard(durable.hide(old, "partial"))
    for damaged in folder.glob(".step-*.damaged"):
        durable.discard(damaged)
    return final


def _read(path: Path, *, names: tuple[str, ...] = (TENSORS, REST)) -> dict[str, bytes]:
    """The files of a checkpoint, compared with its sums before anything of them is used."""
    files = {name: durable.read(path / name) for name in names}
    sums = durable.read(path / SUMS)
    expected = _sums({name: durable.sha256([data]) for name, data in files.items()})
    for name, line in zip(names, expected, strict=True):
        if line not in sums:
            raise durable.Damaged(f"{name} has not the SHA-256 that {SUMS} says")
    if len(names) == 2 and sums != b"".join(expected):
        raise durable.Damaged(f"{SUMS} is not as it was written")
    return files


def _sums(digests: Mapping[str, str]) -> list[bytes]:
    return [f"{digest}  {name}\n".encode() for name, digest in digests.items()]


def _record(path: Path, text: bytes) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(text)
    if record["name"] != path.name:
        raise durable.Damaged(f"it is {record['name']} in another place")
    return record


def _fill(
    path: Path, states: Mapping[str, Any], tensors: Mapping[str, Tensor],
    objects: Mapping[str, Stateful],
) -> None:  # fmt: skip
    if states.keys() != objects.keys():
        raise ValueError(
            f"checkpoint {path}: got {sorted(states)}, expected {sorted(objects)}; resume what was "
            "saved"
        )
    for name, item in objects.items():
        try:
            item.load_state_dict(_join(states[name], tensors))
        except durable.Damaged:
            raise
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"checkpoint {path}: {name} does not fit ({reason}); resume with the settings of "
                "the run"
            ) from None


def _found(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    found = []
    for path in folder.glob("step-*"):
        if name := re.fullmatch(r"step-(\d+)(?:\.(\d+))?", path.name):
            found.append((int(name[1]), int(name[2] or 0), path))
    return [path for *_, path in sorted(found)]


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with each tensor copied to `tensors` and each dictionary turned into pairs."""
    if isinstance(value, Tensor):
        # Fused optimizers walk a parameter and its moments in memory order: a moment that came back
        # in another layout would be applied scrambled. Files do not hold strides.
        copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        tensors[path] = copy.copy_(value.detach(), non_blocking=True)
        stride = (value if _is_dense(value) else copy).stride()
        return {"tensor": path, "stride": list(stride)}
    if isinstance(value, Mapping):
        return {"pairs": [[k, _split(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_split(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    return value


def _is_dense(value: Tensor) -> bool:
    """Whether the elements lie in memory without holes and without sharing, in any order."""
    count = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1:
            if stride != count:
                return False
            count *= size
    return True


def _call(value: Any) -> Any:
    """`value` with each function replaced by what it returns."""
    if callable(value):
        return _split(value(), "", {})
    if isinstance(value, dict) and "pairs" in value:
        return {"pairs": [[k, _call(v)] for k, v in value["pairs"]]}
    if isinstance(value, dict) and "list" in value:
        return {"list": [_call(v) for v in value["list"]]}
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `_split`; tuples come back as lists."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        # A copy of its own: what an optimizer takes over as it is must be aligned as before.
        return torch.empty_strided(tensor.shape, value["stride"], dtype=tensor.dtype).copy_(tensor)
    if "pairs" in value:
        return {k: _join(v, tensors) for k, v in value["pairs"]}
    return [_join(v, tensors) for v in value["list"]]
