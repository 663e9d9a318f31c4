"""Write files that survive a crash, and run writes in a background thread.

A file or folder becomes visible by a rename. Before the rename, all its bytes are flushed to disk;
after it, the folder around it is flushed. All changes to the disk go through `os` in this module,
so that tests can stop or fail each single call.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from dmkd_fast.runtime.errors import UserError, warn_once

T = TypeVar("T")
CHUNK_BYTES = 16 * 2**20


class DamagedError(UserError):
    """Error for a file that is missing or differs from what was written."""


class SaveError(UserError):
    """Error for a failed write; the files that existed before are unchanged."""


@contextlib.contextmanager
def locked(path: Path, *, wait_s: float = 0) -> Iterator[bool]:
    """Hold a lock file, and yield whether this process holds it; False if another one does.

    The kernel releases the lock when the process ends, however it ends.

    Args:
        path: Lock file; created if it is missing, and never deleted.
        wait_s: Seconds to wait for another process that is about to end.
    """
    end = time.monotonic() + wait_s
    with path.open("w") as file:
        while not (is_ours := _lock(file.fileno(), path)) and time.monotonic() < end:
            time.sleep(0.1)
        yield is_ours


def is_locked(path: Path) -> bool:
    """Return whether a process holds this lock file; it is held for a moment to find out."""
    import fcntl  # Unix only

    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # There is no such file, or the file system cannot lock.
        return False
    return False


def _lock(handle: int, path: Path) -> bool:
    import fcntl  # Unix only

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warn_once(
            f"{path}: this file system cannot lock files ({error.strerror}); start only one "
            f"process on {path.parent}"
        )
    return True


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the file name to an OSError raised inside."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write a file, wait until its bytes are on disk, and return its SHA-256."""
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
    """Write a file under a hidden name, rename it, and return its SHA-256.

    The folder is not flushed: call `sync` on it before you rely on the name.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        digest = write(partial, parts)
        os.rename(partial, path)
    except Exception:  # of the disk, or of whoever makes the parts
        discard(partial)
        raise
    return digest


def replace_unsynced(path: Path, data: bytes) -> None:
    """Write a file under a hidden name and rename it, without waiting for the disk.

    Readers see the old or the new content. A crash of the machine may lose the file.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        os.rename(partial, path)
    except OSError:
        discard(partial)
        raise


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Fill a folder under a hidden name, and rename it to `final` when it is complete.

    It replaces an older folder of that name. A crash leaves the old folder, the new one, or none.
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
    """Rename a finished folder durably; if this fails, the folder keeps its old name."""
    sync(partial)
    os.rename(partial, final)
    try:
        sync(final.parent)
    except OSError:
        os.rename(final, partial)
        raise


def read(path: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        DamagedError: The file is missing, or the disk cannot read it.
        PermissionError: The file exists, but this user may not read it.
    """
    try:
        return path.read_bytes()
    except PermissionError:
        raise
    except FileNotFoundError:
        raise DamagedError(f"{path.name} is missing") from None
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read: {error.strerror}") from None


def sha256(parts: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 of these bytes, which `write` returns for the same parts."""
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


def cache_folder() -> Path:
    """Return the folder of files that can be made again and may be deleted."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmkd_fast"


def make_folder(path: Path) -> None:
    """Create a folder and its parents, and wait until their names are on disk."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):  # another rank was faster
        os.mkdir(path)
    sync(path.parent)


def discard(path: Path) -> None:
    """Delete a file or a folder as far as possible; errors are ignored.

    Call `hide` on a visible folder first, or a crash might leave half of it.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            for item in path.iterdir():
                discard(item)
            os.rmdir(path)
        else:
            os.unlink(path)
    except OSError:
        return  # leftovers keep a hidden name and are ignored; the next writer deletes them


def hide(path: Path, why: str) -> Path:
    """Rename a folder or file to `.NAME.WHY`, so that no reader takes it for complete."""
    hidden = path.with_name(f".{path.name}.{why}")
    discard(hidden)
    os.rename(path, hidden)
    return hidden


class Writer:
    """Run jobs in a background thread, one after another in the order of submission.

    The thread starts with the first job. Jobs may only hash and write: tensor operations in this
    thread would start a second pool of threads beside the trainer's.

    Args:
        max_waiting: Number of waiting jobs at which `submit` waits too.
    """

    def __init__(self, *, max_waiting: int = 4) -> None:
        self._jobs: queue.Queue[tuple[Callable[[], object], Future[object]] | None]
        self._jobs = queue.Queue(max_waiting)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread if it is not running."""
        if self._thread is None:
            # A daemon, so that a second Ctrl-C does not wait for a disk that hangs. An unfinished
            # file still has its hidden name.
            self._thread = threading.Thread(target=self._run, name="dmkd-writer", daemon=True)
            self._thread.start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Queue a job, and return a future of its result or exception."""
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
        # Signals must go to the main thread; otherwise it would not wake while it waits here.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)
            del item, job, future  # frees the copies that they hold
