"""Files that survive a crash, and the thread that writes them.

A rename is the moment at which a file or folder becomes visible: before it, all
bytes have been flushed to disk; after it, the folder around is flushed. All changes to the disk go
through `os` here, so that tests can stop or fail each single call.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
CHUNK_BYTES = 16 * 2**20


class Damaged(ValueError):
    """A file is missing, or is not what was written."""


class SaveError(ValueError):
    """Something could not be written; what was there before is as it was."""


@contextlib.contextmanager
def locked(path: Path, *, wait_s: float = 0) -> Iterator[bool]:
    """Hold a lock file; yields False if another process holds it.

    The kernel releases the lock when the process ends, however it ends.

    Args:
        path: Lock file; it is made if it is missing, and never deleted.
        wait_s: Seconds to wait for another process that is about to end.
    """
    end = time.monotonic() + wait_s
    with path.open("w") as file:
        while not (is_ours := _lock(file.fileno(), path)) and time.monotonic() < end:
            time.sleep(0.1)
        yield is_ours


def _lock(handle: int, path: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logging.getLogger("dmkd_fast").warning(
            "%s: this file system cannot lock files (%s); start only one process on %s",
            path, error.strerror, path.parent,
        )  # fmt: skip
    return True


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Make an OSError inside say which file it is about."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write a file and wait until its bytes are on disk; returns its SHA-256."""
    digest = hashlib.sha256()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        with _named(path):
            for part in parts:
                for start in range(0, len(part), CHUNK_BYTES):
                    rest = part[start : start + CHUNK_BYTES]
                    digest.update(rest)
                    while len(rest):
                        rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
    finally:
        os.close(handle)
    return digest.hexdigest()


def replace(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write a file under another name and rename it; returns its SHA-256.

    The folder is not flushed: whoever relies on the name calls `sync` on it first.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        digest = write(partial, parts)
        os.rename(partial, path)
    except OSError:
        discard(partial)
        raise
    return digest


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Fill a folder under a hidden name; it gets its name, in place of an older one, when whole.

    A crash leaves the old folder, the new one, or none.
    """
    partial = final.with_name(f".{final.name}.partial")
    discard(partial)
    make_folder(partial)
    try:
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        if final.exists():
            discard(hide(final, "old"))
        publish(partial, final)
    except BaseException:
        discard(partial)
        raise


def publish(partial: Path, final: Path) -> None:
    """Give a finished folder its name, for good; if that fails, it has its old one again."""
    sync(partial)
    os.rename(partial, final)
    try:
        sync(final.parent)
    except OSError:
        os.rename(final, partial)
        raise


def read(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        Damaged: It is missing or the disk cannot read it.
        PermissionError: It is there, for others.
    """
    try:
        return path.read_bytes()
    except PermissionError:
        raise
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from None


def sha256(parts: Iterable[bytes | memoryview]) -> str:
    """What `write` returns for the same parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _named(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, and wait until their names are on disk."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):  # Another rank was first.
        os.mkdir(path)
    sync(path.parent)


def discard(path: Path) -> None:
    """Delete a file or a folder, if it is there and if that can be done.

    Visible folders go through `hide` first, or a crash might leave half of one.
    """
    try:
        if path.is_dir():
            for item in path.iterdir():
                discard(item)
            os.rmdir(path)
        else:
            os.unlink(path)
    except OSError:
        return  # Whatever is left has a name that nobody reads; the next one to write tries again.


def hide(path: Path, why: str) -> Path:
    """Rename a folder or file so that nobody takes it for whole: `.NAME.WHY`."""
    hidden = path.with_name(f".{path.name}.{why}")
    discard(hidden)
    os.rename(path, hidden)
    return hidden


class Writer:
    """A thread that runs jobs one after another, in the order they came.

    It starts with the first job. Jobs may only hash and write: tensor operations there would start
    a second pool of threads beside the trainer's.

    Args:
        max_waiting: With so many jobs waiting, `submit` waits too.
    """

    def __init__(self, *, max_waiting: int = 4) -> None:
        self._jobs: queue.Queue[tuple[Callable[[], object], Future[object]] | None]
        self._jobs = queue.Queue(max_waiting)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, unless it runs."""
        if self._thread is None:
            # A daemon: a second Ctrl-C must not wait for a disk that hangs. What it had begun has
            # not got its name yet.
            self._thread = threading.Thread(target=self._run, name="dmkd-writer", daemon=True)
            self._thread.start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Queue a job; its result or exception is in the future returned."""
        self.start()
        future: Future[T] = Future()
        self._jobs.put((job, future))  # type: ignore[arg-type]
        return future

    def close(self) -> None:
        """Wait for all jobs and end the thread; the next job starts another."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        # Signals go to the main thread, or it would not wake from waiting for this one.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)
            del item, job, future  # With the copies that they hold.
