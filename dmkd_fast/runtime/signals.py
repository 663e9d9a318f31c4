"""Turn Ctrl-C, SIGTERM and SIGHUP into KeyboardInterrupt outside of critical sections."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Turn Ctrl-C, SIGTERM and SIGHUP into KeyboardInterrupt, but never inside `held`.

    Use it as a context manager in the main thread. Work that must not stop half done (an optimizer
    step, a commit) runs inside `held`: the signal waits until that work is done. Everything else is
    interrupted at once.

    A second Ctrl-C or SIGTERM ends what the first one started, such as a final checkpoint. It
    raises KeyboardInterrupt, or, where nothing may be raised, ends the process. A second SIGHUP is
    ignored, since a terminal that closes may send two. SIGHUP stays ignored in a process started by
    nohup.

    Args:
        only_noted: Whether to set `is_pending` and never raise. With several ranks, one rank must
            not leave the others waiting for it. torchrun repeats a signal to its ranks, so in this
            mode a signal less than a second after the first one is not a second signal.
    """

    def __init__(self, *, only_noted: bool = False) -> None:
        self._only_noted = only_noted
        self._is_held = False
        self._is_pending = False
        self._first_at: float | None = None
        self._previous: dict[int, object] = {}

    @property
    def is_pending(self) -> bool:
        """Whether a signal has arrived for which nothing has been raised yet."""
        return self._is_pending

    def __enter__(self) -> Interrupts:
        self._first_at = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._only_noted and kind is not None:
            return  # another rank's signal ended this block; our own may still arrive
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Delay signals until the end of the block."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._is_pending and not self._only_noted:
            self._is_pending = False
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        now, first = time.monotonic(), self._first_at
        if first is None:
            self._first_at = now
        elif number == signal.SIGHUP or (self._only_noted and now - first < 1):
            return
        if self._only_noted or self._is_held:
            if self._is_pending:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self._is_pending = True
        else:
            raise KeyboardInterrupt
