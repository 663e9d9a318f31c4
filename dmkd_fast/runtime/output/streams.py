"""Handle a closed or full stdout and stderr without losing a finished run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from dmkd_fast.runtime.files import SaveError


class GuardedStream:
    """Wrap stdout or stderr, whose reader may be gone or whose disk may be full.

    After the first error, all further output is dropped. For stdout the error is raised as one
    line. For stderr it is not raised, since its messages matter less than the run.

    Args:
        stream: Stream to write to.
        name: Name of the stream, for the error; None means that errors are not raised.
    """

    def __init__(self, stream: TextIO, name: str | None = None) -> None:
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or drop it after the first error."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream; an error is handled as in `write`."""
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            # Text that is still buffered would fail again when Python ends.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            if self._name is not None:
                raise SaveError(
                    f"{self._name}: cannot write ({error.strerror}); all files are complete, only "
                    "this output is lost; redirect it elsewhere"
                ) from None


def open_closed_streams() -> None:
    """Open stdin, stdout and stderr on /dev/null where the caller has closed them.

    Otherwise files of the run would get their descriptors, and messages would be written into them.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
