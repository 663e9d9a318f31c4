"""Write and read checkpoints: folders that hold the state of several objects.

A checkpoint is a folder `step-N` (`step-N.1` for a second one at that step) of three files:
`state.safetensors`, `state.json` with the name of the folder and everything that is not a tensor,
and `SHA256SUMS`, which `sha256sum -c` reads. The folder gets its name when all of it is on disk, so
a crash leaves the old state or the new one, never a mix. On loading, a checkpoint that is damaged
or was moved to another name is detected.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import torch as safetensors
from torch import Tensor

from dmkd_fast.checkpoint.state import call_functions, join_state, split_state
from dmkd_fast.runtime import files, model_files
from dmkd_fast.runtime.errors import UserError, invalid, one_line

TENSORS, REST, SUMS = FILES = ("state.safetensors", "state.json", "SHA256SUMS")


class Stateful(Protocol):
    """Interface of an object that can be saved."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the object needs to continue.

        A value may be a function without arguments, for what is known only when the file is
        written. The thread that writes the file calls it. Its result must not hold tensors.
        """
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Load the result of `state_dict`."""
        ...


class Snapshot:
    """Copy the state of objects to the CPU, so that later changes in place do not affect it.

    Args:
        step: Step in the name of the checkpoint.
        objects: Objects to save.
        mark: Number that distinguishes moments at the same step; equal on all ranks.
        world_size: Number of ranks that save together.
    """

    def __init__(
        self, step: int, objects: Mapping[str, Stateful], *, mark: int = 0, world_size: int = 1
    ) -> None:
        self.step, self.mark, self.world_size = step, mark, world_size
        self.tensors: dict[str, Tensor] = {}
        devices: set[torch.device] = set()
        self.rest = {
            name: split_state(item.state_dict(), name, self.tensors, devices)
            for name, item in objects.items()
        }
        self.num_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self.num_written = 0
        self._copied = [torch.cuda.Event() for _ in devices]
        for device, copied in zip(devices, self._copied, strict=True):
            copied.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Wait until the copies from all devices are complete."""
        for copied in self._copied:
            copied.synchronize()

    def counted(self, parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        """Yield the parts of a file, and count the bytes of those before in `num_written`."""
        for part in parts:
            yield part
            self.num_written += len(part)


def write(folder: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Write a checkpoint into `folder`, and delete all but the newest `keep` checkpoints.

    Returns:
        Folder of the new checkpoint.

    Raises:
        SaveError: The disk is full or cannot be written to; nothing of the new checkpoint is left.
    """
    # One above the existing serials, since lower ones may have been deleted as the oldest.
    step = snapshot.step
    name = f"step-{step:09d}"
    serials = [_order(path)[1] for path in found(folder) if _order(path)[0] == step]
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
            TENSORS: files.write(
                partial / TENSORS, snapshot.counted(model_files.file_parts(snapshot.tensors))
            ),
            REST: files.write(partial / REST, [json.dumps(record).encode()]),
        }
        files.write(partial / SUMS, _sums(digests))
        files.publish(partial, final)
    except OSError as error:
        files.discard(partial)
        raise files.SaveError(
            f"checkpoint {final}: not written ({error.strerror or error}); earlier checkpoints "
            "are unchanged; free space or fix the folder"
        ) from None
    for old in found(folder)[:-keep]:
        with contextlib.suppress(OSError):  # the next save tries again
            files.discard(files.hide(old, "partial"))
    for damaged in folder.glob(".step-*.damaged"):
        files.discard(damaged)
    return final


def found(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    return sorted(filter(_order, folder.glob("step-*")), key=_order)


def moments(paths: list[Path]) -> tuple[dict[tuple[int, ...], str], dict[Path, str]]:
    """Return the names of readable checkpoints by moment, and the problems of damaged ones.

    A moment is (step, mark, world size, number of earlier checkpoints with these three).
    """
    names: dict[tuple[int, ...], str] = {}
    problems = {}
    for path in reversed(paths):
        try:
            record = read_record(path)
        except files.DamagedError as error:
            problems[path] = str(error)
            continue
        moment = record["step"], record["mark"], record["world_size"]
        names[(*moment, sum(known[:3] == moment for known in names))] = path.name
    return names, problems


def load(path: Path, objects: Mapping[str, Stateful], *, is_subset: bool = False) -> None:
    """Load objects from a checkpoint; with `is_subset`, it may hold other objects too."""
    contents = _read(path)
    states = _record(path, contents[REST])["objects"]
    if is_subset:
        states = {name: state for name, state in states.items() if name in objects}
    _fill(path, states, safetensors.load(contents[TENSORS]), objects)


def read_record(path: Path) -> dict[str, Any]:
    """Read everything of a checkpoint but its tensors.

    Raises:
        DamagedError: The file is missing or damaged, or the checkpoint was moved to another name.
    """
    return _record(path, _read(path, names=(REST,))[REST])


def _read(path: Path, *, names: tuple[str, ...] = (TENSORS, REST)) -> dict[str, bytes]:
    """Read files of a checkpoint, and compare them with its sums before any of them is used."""
    contents = {name: files.read(path / name) for name in names}
    sums = files.read(path / SUMS)
    expected = _sums({name: files.sha256([data]) for name, data in contents.items()})
    for name, line in zip(names, expected, strict=True):
        if line not in sums:
            raise files.DamagedError(f"{name} does not have the SHA-256 in {SUMS}")
    if len(names) == 2 and sums != b"".join(expected):
        raise files.DamagedError(f"{SUMS} was changed")
    return contents


def _sums(digests: Mapping[str, str]) -> list[bytes]:
    return [f"{digest}  {name}\n".encode() for name, digest in digests.items()]


def _record(path: Path, text: bytes) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(text)
    if record["name"] != path.name:
        raise files.DamagedError(f"it is {record['name']} in another place")
    return record


def _fill(
    path: Path,
    states: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    objects: Mapping[str, Stateful],
) -> None:
    if states.keys() != objects.keys():
        raise invalid(
            f"checkpoint {path}", sorted(states), str(sorted(objects)), "resume what was saved"
        )
    for name, item in objects.items():
        try:
            item.load_state_dict(join_state(states[name], tensors))
        except files.DamagedError:
            raise
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = one_line(error, most=1000)
            raise UserError(
                f"checkpoint {path}: {name} does not fit ({reason}); resume with the settings of "
                "the run"
            ) from None


def _order(path: Path) -> tuple[int, ...]:
    """Return (step, serial number at that step), or () if the name is not a checkpoint's."""
    name = re.fullmatch(r"step-(\d+)(?:\.(\d+))?", path.name)
    return (int(name[1]), int(name[2] or 0)) if name else ()
