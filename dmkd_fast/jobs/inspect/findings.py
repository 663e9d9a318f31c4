"""One line of the doctor: what something is, what it means, and what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check."""

    name: str
    """Subject of the check."""
    is_ok: bool
    what: str
    """What was found."""
    means: str = ""
    """What it means; empty if nothing is wrong."""
    do: str = ""
    """What to do; empty if nothing is wrong."""

    def __str__(self) -> str:
        text = f"{'ok   ' if self.is_ok else 'WRONG'} {self.name}: {self.what}"
        return " ".join("; ".join(part for part in (text, self.means, self.do) if part).split())


def ok(name: str, what: str) -> Finding:
    """Return a finding that nothing is wrong."""
    return Finding(name=name, is_ok=True, what=what)


def wrong(name: str, what: str, means: str, do: str) -> Finding:
    """Return a finding that something is wrong.

    Args:
        name: Subject of the check.
        what: What was found.
        means: What it means.
        do: What to do.
    """
    return Finding(name=name, is_ok=False, what=what, means=means, do=do)
