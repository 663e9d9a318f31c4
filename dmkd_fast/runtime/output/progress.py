"""Show how far a job is: a live view on a terminal, plain lines elsewhere.

    display = Progress(show=True)
    with display.phase("filling", total=10_240, unit="images") as phase:
        phase.advance(512)

Phases may be nested, such as an evaluation in a training. rich draws the live view and is imported
only on a terminal. Color, and with it pictures, is off where the variable NO_COLOR is set.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console, Group, RenderableType
    from rich.text import Text
    from torch import Tensor

T = TypeVar("T")
LINE_EVERY_S, REFRESH_HZ = 5.0, 2.0
PICTURE_SIDE, MOST_PICTURES = 14, 10
_SPARKS = "▁▂▃▄▅▆▇█"


class Phase:
    """A part of a job with a known total, such as one evaluation.

    Args:
        report: Function that is called after each update, with whether a line is due now.
        name: What the job does, such as "training".
        total: Number of units at the end.
        unit: Plural of what is counted.
        done: Number of units at the start.
    """

    def __init__(
        self, report: Callable[[Phase, bool], None], name: str, total: int, unit: str, done: int
    ) -> None:
        self._report, self.name, self.total, self.unit = report, name, total, unit
        self.done, self.figures = done, ""
        self.printed_at = self.started_at = time.monotonic()
        self.start_clock()

    def start_clock(self) -> None:
        """Measure the rate from now on, after a part that says nothing about what is left."""
        self._first, self._first_at = self.done, time.monotonic()
        self._updated_at = self._first_at

    def advance(self, count: int) -> None:
        """Count more units as done."""
        self.update(self.done + count)

    def update(self, done: int, figures: str | None = None) -> None:
        """Set the number of units that are done.

        Args:
            done: Number of units.
            figures: Further figures of a row of statistics, which makes a line due.
        """
        self.done, self._updated_at = done, time.monotonic()
        if figures is not None:
            self.figures = figures
        self._report(self, figures is not None)

    def rate(self) -> float:
        """Return the units per second so far; 0 before the first one."""
        return (self.done - self._first) / max(self._updated_at - self._first_at, 1e-9)

    @property
    def percent(self) -> int:
        """Percentage that is done, 100 only at the end."""
        return 100 * self.done // max(self.total, 1)

    @property
    def eta(self) -> str:
        """Time left as text, counted down between updates; unknown before the first one."""
        if self.done >= self.total:
            return "0:00"
        if not self.rate():
            return "-:--"
        left = (self.total - self.done) / self.rate() - (time.monotonic() - self._updated_at)
        return clock_text(max(left, 0))

    @property
    def counts(self) -> str:
        """Number of units of the total, such as `512/10,240 images`."""
        return f"{self.done:,}/{self.total:,} {self.unit}"

    @property
    def details(self) -> str:
        """Further figures, by default the rate."""
        return self.figures or (f"{self.rate():,.0f} {self.unit}/s" if self.rate() else "")

    def line(self) -> str:
        """Return all of this in one line."""
        parts = [f"{self.name} [{self.percent:3}%] {self.counts}", self.details, f"ETA {self.eta}"]
        return "  ".join(filter(None, parts))

    def last_line(self) -> str:
        """Describe the finished phase in one line."""
        return f"{self.name}: {self.done:,} {self.unit} in {clock_text(self.seconds)}"

    @property
    def seconds(self) -> float:
        """Seconds since the start of the phase."""
        return time.monotonic() - self.started_at


class Progress:
    """Show the phases of a job on stderr, with notes, accuracies and pictures.

    Args:
        show: Whether to show anything.
    """

    def __init__(self, *, show: bool = True) -> None:
        self.show = show
        self._phases: list[Phase] = []
        self._accuracies: list[float] = []
        self._pictures: Text | None = None
        self._drawn_at = 0.0
        self._live: Any = None

    @contextlib.contextmanager
    def phase(self, name: str, total: int, unit: str, *, done: int = 0) -> Iterator[Phase]:
        """Show a phase until the end of the block; see `Phase`."""
        phase = Phase(self._report, name, total, unit, done)
        self._phases.append(phase)
        try:
            if self.show and self._live is None and len(self._phases) == 1 and _is_terminal():
                self._start_live()
            yield phase
            is_outer = len(self._phases) == 1
            # The last frame of an outer phase stays on a terminal.
            is_told = self._live is None if is_outer else phase.seconds >= LINE_EVERY_S
            if is_told and phase.seconds >= 1:
                self.note(phase.last_line())
        finally:
            if len(self._phases) == 1:
                self._stop_live()
            self._phases.remove(phase)

    def track(
        self, batches: Iterable[T], name: str, total: int, unit: str, *, size: Callable[[T], int]
    ) -> Iterator[T]:
        """Yield the batches, and show as a phase how many units they have had so far.

        Args:
            batches: Batches of units.
            name: What the job does, such as "evaluating".
            total: Number of units of all batches.
            unit: Plural of what is counted.
            size: Function that returns the number of units of a batch.
        """
        with self.phase(name, total, unit) as phase:
            for batch in batches:
                yield batch
                phase.advance(size(batch))

    def note(self, text: str) -> None:
        """Print one line, above the live view if there is one."""
        if not self.show:
            return
        with contextlib.suppress(OSError):  # The run continues when the terminal is closed.
            if self._live is not None:
                self._live.console.print(text, highlight=False, markup=False)
            else:
                print(text, file=sys.stderr, flush=True)

    def accuracy(self, value: float) -> None:
        """Add a point to the line of accuracies of the live view."""
        self._accuracies.append(value)

    def pictures(self, images: Tensor) -> None:
        """Show the first of some images in the live view, new ones at most every two seconds.

        Args:
            images: Images (n, c, H, W) uint8, which this waits for if they are shown.
        """
        if self._live is None or time.monotonic() - self._drawn_at < 2:
            return
        console: Console = self._live.console
        if console.color_system in ("256", "truecolor") and console.encoding.startswith("utf"):
            count = min(console.width // (PICTURE_SIDE + 1), MOST_PICTURES)
            self._pictures = half_blocks(images[:count])
            self._drawn_at = time.monotonic()

    def _report(self, phase: Phase, is_row: bool) -> None:
        if not self.show or self._live is not None:
            return
        now, wait_s = time.monotonic(), max(LINE_EVERY_S, phase.seconds / 50)
        # Where there are rows, they alone are printed.
        if is_row or (not phase.figures and now - phase.printed_at > wait_s):
            phase.printed_at = now
            self.note(phase.line())

    def _start_live(self) -> None:
        try:
            from rich.console import Console
            from rich.live import Live
        except ImportError:  # Plain lines without the extra [distill].
            return
        console = Console(stderr=True)
        live = Live(console=console, refresh_per_second=REFRESH_HZ, get_renderable=self._view)
        with contextlib.suppress(OSError):
            live.start()
            self._live = live

    def _stop_live(self) -> None:
        if self._live is not None:
            try:
                with contextlib.suppress(OSError):
                    self._live.stop()  # draws a last time, for the width of its console
            finally:
                self._live = None
        self._accuracies, self._pictures = [], None

    def _view(self) -> Group:
        """Return what the live view shows now."""
        from rich.console import Group
        from rich.text import Text

        console = self._live.console if self._live is not None else None
        width = console.width if console is not None else 80
        is_plain = console is not None and not console.encoding.startswith("utf")
        parts: list[RenderableType] = []
        for phase in list(self._phases):
            parts.append(_bar(phase, width, is_plain))
            if phase.details:
                parts.append(Text(phase.details, style="dim"))
        if self._accuracies and not is_plain:
            last = f" {self._accuracies[-1]:.4f}"
            points = self._accuracies[-(width - 16) :]
            line = Text("top-1 ").append(sparkline(points), style="green").append(last)
            parts.append(line)
        if self._pictures is not None:
            parts.append(self._pictures)
        return Group(*parts)


def clock_text(seconds: float) -> str:
    """Format a duration as minutes and seconds, or hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: list[float]) -> str:
    """Draw numbers as a line of blocks, from the lowest to the highest."""
    low, span = min(values), max(values) - min(values)
    places = [(value - low) / span if span else 1.0 for value in values]
    return "".join(_SPARKS[round(place * (len(_SPARKS) - 1))] for place in places)


def half_blocks(images: Tensor) -> Text:
    """Draw a row of images (n, c, H, W) uint8 in colored half blocks, two pixels in a character."""
    import torch
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    small = torch.nn.functional.adaptive_avg_pool2d(images.float(), PICTURE_SIDE)
    row = small.round().byte().expand(-1, 3, -1, -1).permute(2, 0, 3, 1).tolist()  # (H, n, W, 3)
    text = Text(no_wrap=True, end="")
    for upper, lower in zip(row[::2], row[1::2], strict=True):
        for above, below in zip(upper, lower, strict=True):
            for top, bottom in zip(above, below, strict=True):
                style = Style(color=Color.from_rgb(*top), bgcolor=Color.from_rgb(*bottom))
                text.append("▀", style)
            text.append(" ")
        text.append("\n")
    return text


def _bar(phase: Phase, width: int, is_plain: bool) -> Text:
    """Draw one line: name, bar, percentage, counts where they fit, time left."""
    from rich.text import Text

    right = f" {phase.percent:3}%"
    if width >= 60:
        right += f"  {phase.counts}"
    right += f"  ETA {phase.eta}"
    length = max(4, min(40, width - 11 - len(right)))
    filled = min(length, length * phase.done // max(phase.total, 1))
    full, empty = ("#", ".") if is_plain else ("━", "━")
    line = Text(f"{phase.name:<11}", no_wrap=True)
    line.append(full * filled, style="green").append(
        empty * (length - filled), style="bright_black"
    )
    return line.append(right)


def _is_terminal() -> bool:
    """Return whether stderr is a terminal that can move its cursor."""
    with contextlib.suppress(ValueError):  # a closed stream
        return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return False
