"""Line and bar charts as inline SVG: no script, no font, no file beside the page.

Colours are CSS classes, so that one drawing serves light and dark pages. Hovering shows the
values at a step: each column of a line chart carries its own hidden label.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

WIDTH, HEIGHT = 640.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 16.0, 18.0, 30.0
_MAX_POINTS = 320
_HOVER_COLUMNS = 80
_LABEL_HEIGHT, _CHARACTER_WIDTH, _LABEL_CHARACTERS = 13.0, 7.0, 36

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line.

    Attributes:
      style: CSS class that colours it.
      markers: draws each point as well; for series with few points.
    """

    name: str
    points: Points
    style: str
    markers: bool = False


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One horizontal bar; `style` is the CSS class that colours it."""

    name: str
    value: float
    style: str


def line_chart(series: Sequence[Series], *, format_y: Callable[[float], str], log_y: bool = False) -> str:
    """Lines over a common x axis. Values that are not finite (or, on a log axis, not positive) leave a gap."""
    drawn = [(s, [(x, y) for x, y in s.points if math.isfinite(y) and (y > 0 or not log_y)]) for s in series]
    drawn = [(s, downsample(points, _MAX_POINTS)) for s, points in drawn if points]
    if not drawn:
        return '<p class="empty">nothing recorded</p>'
    axes = _Axes([point for _, points in drawn for point in points], log_y=log_y)
    parts = [axes.grid(format_y)]
    for s, points in drawn:
        path = "".join(f"{'L' if i else 'M'}{axes.x(x):.1f},{axes.y(y):.1f}" for i, (x, y) in enumerate(points))
        parts.append(f'<path class="line {s.style}" d="{path}"/>')
        if s.markers:
            parts += [axes.dot(point, s.style) for point in points]
    parts.append(_hover_columns(drawn, axes, format_y))
    label = html.escape(", ".join(s.name for s, _ in drawn))
    return f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One labelled point; `style` is the CSS class that colours it."""

    name: str
    x: float
    y: float
    style: str


def scatter_chart(dots: Sequence[Dot], *, caption: str, format_y: Callable[[float], str], log_y: bool = False) -> str:
    """Labelled points, with a line through those that no other is below and to the left of (the Pareto front).

    Values that are not finite (or, on a log axis, not positive) are left out.

    Args:
      caption: what is drawn by what.
    """
    dots = [dot for dot in dots if math.isfinite(dot.x + dot.y) and (dot.y > 0 or not log_y)]
    if not dots:
        return '<p class="empty">nothing measured</p>'
    axes = _Axes([(0.0, dots[0].y), *((dot.x, dot.y) for dot in dots)], log_y=log_y)
    path = "".join(
        f"{'L' if i else 'M'}{axes.x(x):.1f},{axes.y(y):.1f}"
        for i, (x, y) in enumerate(pareto_front([(dot.x, dot.y) for dot in dots]))
    )
    parts = [axes.grid(format_y, "{:,.4g}".format), f'<path class="line faint" d="{path}"/>']
    parts.append(_text("tick", _LEFT, _TOP - 4, html.escape(caption), anchor="start"))
    at = [(axes.x(dot.x), axes.y(dot.y)) for dot in dots]
    for dot, point, name, box in zip(dots, at, *_labels(dots, at), strict=True):
        side = "start" if box.left > point[0] else "end"
        x, y = (box.left if side == "start" else box.left + box.width), box.top + _LABEL_HEIGHT - 4
        if abs(y - 4 - point[1]) > _LABEL_HEIGHT / 2:  # which dot it is of
            parts.append(
                f'<line class="leader" x1="{point[0]:.1f}" y1="{point[1]:.1f}" x2="{x:.1f}" y2="{y - 4:.1f}"/>'
            )
        parts.append(axes.dot((dot.x, dot.y), dot.style))
        parts.append(_text("dot-name", x, y, html.escape(name), anchor=side))
    label = html.escape(", ".join(f"{dot.name} {format_y(dot.y)}" for dot in dots))
    return f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def standalone(svg: str, *, style: str) -> str:
    """A chart as a file of its own, on a ground of its own; `style` has what the classes look like."""
    head, _, rest = svg.partition(">")
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    own = "svg { margin: 0; font-family: system-ui, sans-serif; }"
    ground = '<rect width="100%" height="100%" rx="8" style="fill: var(--card)"/>'
    return f"{head}><style>{html.escape(style, quote=False)}{own}</style>{ground}{rest}\n"


class _Box(NamedTuple):
    left: float
    top: float
    width: float

    def overlaps(self, other: _Box) -> bool:
        beside = self.left + self.width <= other.left or other.left + other.width <= self.left
        return not beside and abs(self.top - other.top) < _LABEL_HEIGHT


def _labels(dots: Sequence[Dot], at: Points) -> tuple[list[str], list[_Box]]:
    """Each dot's name, cut where it is long, and where it goes: beside its dot if that covers no other and no dot."""
    names = [
        dot.name if len(dot.name) <= _LABEL_CHARACTERS else dot.name[: _LABEL_CHARACTERS - 1] + "…" for dot in dots
    ]
    covered = [_Box(x - 4, y - _LABEL_HEIGHT / 2, 8) for x, y in at]
    boxes: dict[int, _Box] = {}
    for number in sorted(range(len(dots)), key=lambda i: at[i][::-1]):
        places = list(_places(at[number], len(names[number])))
        boxes[number] = next((box for box in places if _is_free(box, covered)), places[0])
        covered.append(boxes[number])
    return names, [boxes[number] for number in range(len(dots))]


def _places(point: tuple[float, float], num_characters: int) -> Iterator[_Box]:
    """Ever further up and down from a point, to the right and the left of it."""
    width, (x, y) = num_characters * _CHARACTER_WIDTH, point
    for step in range(100):
        for shift in (-step, step):
            for left in (x + 9, x - 9 - width):
                yield _Box(left, y - _LABEL_HEIGHT / 2 + 3 * shift, width)


def _is_free(box: _Box, covered: Sequence[_Box]) -> bool:
    inside = box.left >= 0 and box.left + box.width <= WIDTH and 0 <= box.top <= HEIGHT - _BOTTOM - _LABEL_HEIGHT
    return inside and not any(box.overlaps(other) for other in covered)


def pareto_front(points: Points) -> list[tuple[float, float]]:
    """The points that no other is at most as large as in both, by x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def bar_chart(bars: Sequence[Bar], *, format_value: Callable[[float], str]) -> str:
    """Horizontal bars from zero, in the order given."""
    if not bars:
        return '<p class="empty">nothing measured</p>'
    row, left, right = 58.0, 150.0, 70.0
    height = row * len(bars)
    scale = (WIDTH - left - right) / max(max(bar.value for bar in bars), 1e-12)
    parts = []
    for i, bar in enumerate(bars):
        middle, length = row * (i + 0.5), max(bar.value * scale, 1.0)
        parts.append(
            f"{_text('bar-name', left - 12, middle + 5, html.escape(bar.name), anchor='end')}"
            f'<rect class="bar {bar.style}" x="{left}" y="{middle - 14:.1f}" width="{length:.1f}" height="28" rx="5"/>'
            f"{_text('bar-value', left + length + 9, middle + 5, format_value(bar.value), anchor='start')}"
        )
    label = html.escape(", ".join(f"{bar.name} {format_value(bar.value)}" for bar in bars))
    return f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def smooth(points: Points, *, half_life: float) -> list[tuple[float, float]]:
    """Exponential moving average over points with the given half-life (in points), bias-corrected
    as Adam's moments are: the first value is the first point.
    """
    decay, total, weight, out = 0.5 ** (1 / max(half_life, 1e-9)), 0.0, 0.0, []
    for x, y in points:
        if not math.isfinite(y):
            continue
        total, weight = decay * total + (1 - decay) * y, decay * weight + (1 - decay)
        out.append((x, total / weight))
    return out


def downsample(points: Points, max_points: int) -> list[tuple[float, float]]:
    """At most `max_points` points: the means of equal runs; first and last stay."""
    if len(points) <= max_points:
        return list(points)
    size = len(points) / (max_points - 2)
    inner = []
    for i in range(max_points - 2):
        run = points[int(i * size) : max(int((i + 1) * size), int(i * size) + 1)]
        inner.append((sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)))
    return [points[0], *inner, points[-1]]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values (1, 2, 2.5 or 5 times a power of ten) inside `[low, high]`."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values inside `[low, high]`, at most about seven, for a logarithmic axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 6, 8), range(1, 10)):
        values = [m * 10.0**p for p in powers for m in mantissas if low <= m * 10.0**p <= high]
        if len(values) >= 4:
            return values[:: max(1, math.ceil(len(values) / 8))]
    return ticks(low, high, 5)


class _Axes:
    """Maps data to pixels and draws what surrounds the data."""

    def __init__(self, points: Points, *, log_y: bool):
        self._map = math.log if log_y else float
        self._log_y = log_y
        xs, ys = [x for x, _ in points], [y for _, y in points]
        self.x_low, self.x_high = min(xs), max(max(xs), min(xs) + 1e-9)
        low, high = min(ys), max(ys)
        if log_y:
            self.y_low, self.y_high = low / 1.04, high * 1.04
        else:
            # Rates and throughputs are amounts: their axis starts at zero.
            self.y_low, self.y_high = min(low, 0.0), (high * 1.06 if high > 0 else 1.0)

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self._map(self.y_low), self._map(self.y_high)
        return HEIGHT - _BOTTOM - (self._map(value) - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    def dot(self, point: tuple[float, float], style: str) -> str:
        return f'<circle class="dot {style}" cx="{self.x(point[0]):.1f}" cy="{self.y(point[1]):.1f}" r="3.4"/>'

    def grid(self, format_y: Callable[[float], str], format_x: Callable[[float], str] = "{:,.0f}".format) -> str:
        y_ticks = log_ticks(self.y_low, self.y_high) if self._log_y else ticks(self.y_low, self.y_high, 5)
        parts = []
        for value in y_ticks:
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(_text("tick", _LEFT - 9, y + 4, format_y(value), anchor="end"))
        for value in ticks(self.x_low, self.x_high, 6):
            parts.append(_text("tick", self.x(value), HEIGHT - 8, format_x(value), anchor="middle"))
        base = HEIGHT - _BOTTOM
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
        return "".join(parts)


def _hover_columns(drawn: Sequence[tuple[Series, Points]], axes: _Axes, format_y: Callable[[float], str]) -> str:
    width = (WIDTH - _LEFT - _RIGHT) / _HOVER_COLUMNS
    parts = []
    for column in range(_HOVER_COLUMNS):
        middle = _LEFT + width * (column + 0.5)
        near = [(s, min(points, key=lambda point: abs(axes.x(point[0]) - middle))) for s, points in drawn]
        near = [(s, point) for s, point in near if abs(axes.x(point[0]) - middle) <= width * (8 if s.markers else 1.5)]
        if not near:
            continue
        x = axes.x(near[0][1][0])
        dots = "".join(axes.dot(point, s.style) for s, point in near)
        text = f"{near[0][1][0]:,.0f}  ·  " + "  ·  ".join(f"{s.name} {format_y(py)}" for s, (_, py) in near)
        anchor = "start" if x < WIDTH / 3 else "end" if x > WIDTH * 2 / 3 else "middle"
        top, base = _TOP, HEIGHT - _BOTTOM
        parts.append(
            f'<g class="hover"><rect x="{middle - width / 2:.1f}" y="{top}" width="{width:.1f}" height="{base - top}"/>'
            f'<g><line class="cursor" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{base}"/>{dots}'
            f"{_text('callout', x, top - 3, html.escape(text), anchor=anchor)}</g></g>"
        )
    return "".join(parts)


def _text(style: str, x: float, y: float, escaped: str, *, anchor: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped}</text>'
