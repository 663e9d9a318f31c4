"""Draw small charts as inline SVG, which the style of the page colors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dmkd_fast.jobs.report.html import shorten, text

WIDTH, HEIGHT = 340, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 22, 36
_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Range, label and ticks of one axis."""

    low: float
    high: float
    label: str
    ticks: tuple[tuple[float, str], ...]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return the place of a value, 0 at the low end and 1 at the high end."""
        if self.is_log:
            low, high = math.log(self.low), math.log(self.high)
            return (math.log(max(value, self.low)) - low) / (high - low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points of one line, in the color of this number."""

    points: Sequence[Point]
    color: int = 0
    has_marks: bool = False


def axis(
    values: Sequence[float], label: str, *, start: float | None = None, log: bool = False
) -> Axis:
    """Return an axis for values, with about five ticks at round numbers.

    Args:
        values: Values to show.
        label: Meaning and unit.
        start: Value at the low end; None: the ticks around the lowest value.
        log: Whether to use a logarithmic scale, if values are positive and differ tenfold.
    """
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if log and low > 0 and high / low >= 10:
        return _log_axis(low, high, label)
    low = low if start is None else start
    if high <= low:
        high = low + (abs(low) or 1.0)
    step = _step((high - low) / 4)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    places = [low + i * step for i in range(round((high - low) / step) + 1)]
    ticks = tuple((place, _tick(place, step)) for place in places)
    return Axis(low=low, high=high, label=label, ticks=ticks)


def time_axis(seconds: Sequence[float]) -> Axis:
    """Return an axis from 0 for times, in seconds, minutes or hours."""
    longest = max(seconds, default=1.0)
    name, unit = "seconds", 1
    if longest > 300:
        name, unit = ("minutes", 60) if longest <= 7200 else ("hours", 3600)
    scaled = axis([s / unit for s in seconds], f"time ({name})", start=0.0)
    return Axis(
        low=0.0,
        high=scaled.high * unit,
        label=scaled.label,
        ticks=tuple((place * unit, name) for place, name in scaled.ticks),
    )


def curves(
    title: str,
    lines: Sequence[Curve],
    x: Axis,
    y: Axis,
    *,
    levels: Sequence[tuple[float, int]] = (),
) -> str:
    """Return a chart of lines, with a dashed horizontal line for each level (value, color)."""
    parts = [_frame(title, x, y)]
    for value, color in levels:
        at = _y(y, value)
        parts.append(f'<path class="level k{color}" d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}"/>')
    for line in lines:
        places = [(_x(x, a), _y(y, b)) for a, b in line.points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline class="curve k{line.color}" points="{path}"/>')
        if line.has_marks and len(places) <= 60:
            marks = zip(places, line.points, strict=True)
            parts += [
                f'<circle class="k{line.color}" cx="{a:.1f}" cy="{b:.1f}" r="2.4">'
                f"<title>{text(f'{px:.6g}: {py:.4g}')}</title></circle>"
                for (a, b), (px, py) in marks
            ]
    return _svg(title, parts)


def histogram(title: str, counts: Sequence[float], names: Sequence[str], x: str, y: str) -> str:
    """Return a chart of bars, one for each count, some of which are named below."""
    heights = axis(counts, y, start=0.0)
    every = -(-len(counts) // 8)
    ticks = tuple((i + 0.5, name) for i, name in enumerate(names) if i % every == 0)
    across = Axis(low=0, high=len(counts), label=x, ticks=ticks)
    width = (WIDTH - _LEFT - _RIGHT) / len(counts)
    parts = [_frame(title, across, heights)]
    for i, count in enumerate(counts):
        top = _y(heights, count)
        parts.append(
            f'<rect class="k0" x="{_x(across, i) + 0.06 * width:.1f}" y="{top:.1f}" '
            f'width="{0.88 * width:.1f}" height="{HEIGHT - _BOTTOM - top:.1f}">'
            f"<title>{text(names[i])}: {count:,.0f}</title></rect>"
        )
    return _svg(title, parts)


def reliability(title: str, bins: Sequence[tuple[int, float, float]], color: int) -> str:
    """Return a reliability diagram.

    Args:
        title: Title of the chart.
        bins: Number of images, mean confidence and accuracy of each bin of equal width.
        color: Color of the points.
    """
    ticks = tuple((v / 100, f"{v}") for v in (0, 20, 40, 60, 80, 100))
    x = Axis(low=0, high=1, label="confidence (%)", ticks=ticks)
    y = Axis(low=0, high=1, label="accuracy (%)", ticks=ticks)
    ideal = f"M{_x(x, 0):.1f} {_y(y, 0):.1f}L{_x(x, 1):.1f} {_y(y, 1):.1f}"
    most = max((count for count, _, _ in bins), default=0) or 1
    parts = [_frame(title, x, y), f'<path class="level axis" d="{ideal}"/>']
    seen = [(count, p, hits) for count, p, hits in bins if count]
    path = " ".join(f"{_x(x, p):.1f},{_y(y, hits):.1f}" for _, p, hits in seen)
    parts.append(f'<polyline class="curve k{color}" points="{path}"/>')
    for count, p, hits in seen:
        parts.append(
            f'<circle class="k{color}" cx="{_x(x, p):.1f}" cy="{_y(y, hits):.1f}" '
            f'r="{1.5 + 4 * math.sqrt(count / most):.1f}"><title>{count:,} images: confidence '
            f"{p:.1%}, accuracy {hits:.1%}</title></circle>"
        )
    return _svg(title, parts)


def heat_map(rows: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Return a confusion matrix as cells shaded by the fraction of their row."""
    size, left = len(rows), 120
    cell = min(40.0, 460 / size)
    above, whole = 104, cell * size
    parts = []
    for i, row in enumerate(rows):
        total, y = sum(row) or 1, above + i * cell
        parts.append(
            f'<text x="{left - 6}" y="{y + cell / 2 + 4:.1f}" text-anchor="end">'
            f"{shorten(names[i], 16)}</text>"
        )
        place = left + (i + 0.5) * cell
        parts.append(
            f'<text transform="translate({place + 4:.1f} {above - 6}) rotate(-60)">'
            f"{shorten(names[i], 16)}</text>"
        )
        for j, count in enumerate(row):
            share, x = count / total, left + j * cell
            shade = f'fill-opacity="{0.06 + 0.94 * share**0.7 if count else 0.03:.2f}"'
            parts.append(
                f'<rect class="cell" {shade} x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" '
                f'height="{cell - 1:.1f}"><title>{text(names[i])} taken for {text(names[j])}: '
                f"{count:,} of {total:,}</title></rect>"
            )
            if size <= 12 and share > 0.005:
                parts.append(
                    f'<text class="{"on" if share > 0.4 else "off"}" text-anchor="middle" '
                    f'x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}">{100 * share:.0f}</text>'
                )
    width, height = left + whole + 52, above + whole + 4
    return (
        f'<svg class="wide" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="Confusion matrix">{"".join(parts)}</svg>'
    )


def _svg(title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _frame(title: str, x: Axis, y: Axis) -> str:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = [f'<text class="title" x="{_LEFT}" y="12">{text(title)}</text>']
    for value, name in y.ticks:
        at = _y(y, value)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{name}</text>')
    for value, name in x.ticks:
        at = _x(x, value)
        parts.append(f'<path class="axis" d="M{at:.1f} {bottom}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{name}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{text(x.label)}</text>')
    parts.append(
        f'<text transform="translate(11 {(_TOP + bottom) / 2}) rotate(-90)" '
        f'text-anchor="middle">{text(y.label)}</text>'
    )
    return "".join(parts)


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.place(value) * (WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - axis.place(value) * (HEIGHT - _BOTTOM - _TOP)


def _step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= least * (1 - 1e-9))


def _tick(value: float, step: float) -> str:
    """Name a tick, as short as ticks of this distance need."""
    for size, unit in _UNITS:
        if abs(value) >= size and step >= size / 100:
            return f"{value / size:.4g}{unit}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    is_quarter = round(step * 10**decimals, 6) % 1 > 0
    return f"{value:.{decimals + is_quarter}f}"


def _log_axis(low: float, high: float, label: str) -> Axis:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    wanted = (1, 2, 5) if last - first <= 2 else (1,)
    places = [m * 10.0**p for p in range(first, last + 1) for m in wanted]
    bottom = max((p for p in places if p <= low), default=low)
    top = min((p for p in places if p >= high), default=high)
    ticks = tuple((p, f"{p:g}") for p in places if bottom <= p <= top)
    return Axis(low=bottom, high=top, label=label, ticks=ticks, is_log=True)
