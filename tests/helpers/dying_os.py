"""Replacements of `os` for `runtime/files.py` that die, fail or lose power at the i-th call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

CHANGES = {"open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir"}


class CountingOs:
    """Forwards every call to `os` and records the calls that change the disk."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in CHANGES:
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            self.before(name, *args)
            return function(*args, **kwargs)

        return call

    def before(self, name: str, *args: Any) -> None:
        self.calls.append(name)


class FailingOs(CountingOs):
    """Simulates a full disk: from the i-th call on, writing fails and deleting works."""

    def __init__(self, at: int, error: int) -> None:
        super().__init__()
        self.at, self.error = at, error

    def before(self, name: str, *args: Any) -> None:
        super().before(name, *args)
        if len(self.calls) > self.at and name in ("open", "write", "mkdir", "fsync"):
            raise OSError(self.error, os.strerror(self.error))


class DyingOs(CountingOs):
    """Ends the process before its i-th call; all earlier calls have taken effect."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def before(self, name: str, *args: Any) -> None:
        super().before(name, *args)
        if len(self.calls) > self.at:
            self.die()

    def die(self) -> None:
        os._exit(9)


class PowerlessOs(DyingOs):
    """Simulates a power loss: bytes and names that were not flushed are lost.

    Args:
        at: Number of calls before the power loss.
        attic: Empty folder on the same disk, for files that may have to be restored.
    """

    def __init__(self, at: int, attic: Path) -> None:
        super().__init__(at)
        self.attic = attic
        self.unsynced: set[str] = set()
        self.names: list[tuple[str, str, Any]] = []
        """(folder, operation, arguments) of changes to folders that are not flushed yet."""

    def before(self, name: str, *args: Any) -> None:
        super().before(name, *args)
        path = os.fspath(args[0]) if name not in ("write", "fsync") else ""
        if name == "open" and args[1] & os.O_CREAT:
            if not os.path.exists(path):
                self.names.append((os.path.dirname(path), "create", (path,)))
            self.unsynced.add(path)
        elif name == "fsync":
            synced = os.readlink(f"/proc/self/fd/{args[0]}")
            self.unsynced.discard(synced)
            self.names = [entry for entry in self.names if entry[0] != synced]
        elif name == "rename":
            target = os.fspath(args[1])
            kept = self._keep(target) if os.path.isfile(target) else None
            self.names.append((os.path.dirname(path), "rename", (path, target, kept)))
            self.unsynced = {
                target + p.removeprefix(path) if p.startswith(path) else p for p in self.unsynced
            }
        elif name == "mkdir":
            self.names.append((os.path.dirname(path), "mkdir", (path,)))
        elif name == "unlink":
            self.names.append((os.path.dirname(path), "unlink", (path, self._keep(path))))
        elif name == "rmdir":
            self.names.append((os.path.dirname(path), "rmdir", (path,)))

    def _keep(self, path: str) -> str:
        kept = str(self.attic / str(len(self.calls)))
        os.link(path, kept)
        return kept

    def die(self) -> None:
        for path in self.unsynced:
            if os.path.exists(path):
                os.truncate(path, 0)
        for _, operation, args in reversed(self.names):
            if operation == "create":
                _gone(args[0])
            elif operation == "rename":
                if os.path.exists(args[1]):
                    os.rename(args[1], args[0])
                if args[2]:
                    os.link(args[2], args[1])
            elif operation == "mkdir":
                _gone(args[0])
            elif operation == "unlink":
                os.link(args[1], args[0])
            elif operation == "rmdir":
                os.mkdir(args[0])
        os._exit(9)


def _gone(path: str) -> None:
    """Delete a file or folder whose name never reached the disk."""
    import shutil

    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.unlink(path)
