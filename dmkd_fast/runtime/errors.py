"""Errors and warnings that a person can act on; bugs keep their traceback instead."""

from __future__ import annotations

import logging
import os
import reprlib
from typing import Any, Self

MAX_MESSAGE = 1000
LOGGER = logging.getLogger("dmkd_fast")
_warned: set[str] = set()
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100
_REPR.maxlevel = 3


class UserError(ValueError):
    """Error that a person can act on, with a message of one line of at most 1,000 characters.

    The command line prints the message without a traceback and exits with code 2.
    """

    def __init__(self, message: str, *, name: str = "") -> None:
        super().__init__(shortened(" ".join(message.split()), MAX_MESSAGE))
        self.name = name
        """Setting, argument or file that the message begins with; empty if none is known."""

    @classmethod
    def invalid(cls, name: object, got: object, expected: str, fix: str = "") -> Self:
        """Return an error that reads `name: got X, expected Y; fix`.

        Args:
            name: Setting, argument or file that is wrong.
            got: Value that was found, or a phrase that describes it.
            expected: Noun phrase for the values that are accepted.
            fix: Imperative phrase; leave it out where the fix is obvious.
        """
        message = f"{name}: got {got}, expected {expected}{f'; {fix}' if fix else ''}"
        return cls(message, name=str(name))

    def within(self, section: str) -> Self:
        """Return the same error with its name put into a section: `size` becomes `ring.size`.

        Args:
            section: Name of the section, as the caller of the failed check calls it.
        """
        return type(self)(f"{section}.{self}", name=f"{section}.{self.name}")

    def renamed(self, name: str) -> Self:
        """Return the same error about `name`, as the caller of the failed check calls it."""
        return type(self)(name + str(self).removeprefix(self.name), name=name)


class NotFiniteError(UserError):
    """Error for a run that cannot continue, because too many of its values are not finite."""


invalid = UserError.invalid


def warn_once(text: str) -> None:
    """Log a warning on rank 0, unless this process has logged the same text before."""
    if text not in _warned and os.environ.get("RANK", "0") == "0":
        _warned.add(text)
        LOGGER.warning("%s", text)


def one_line(error: BaseException, *, most: int = 300) -> str:
    """Return the message of any error on one line of at most `most` characters, or its class."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def shown(value: Any) -> str:
    """Format a value for a message, cut to about 100 characters."""
    try:
        return shortened(_REPR.repr(list(value) if isinstance(value, tuple) else value), 200)
    except ValueError:  # an integer of more digits than Python prints
        return f"a very large {type(value).__name__}"


def shortened(text: str, length: int) -> str:
    """Cut out the middle of a text that is longer than `length`; the end holds the advice."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]} ... {text[-(length // 2 - 5) :]}"
