"""Small charts as SVG text, styled by the page's CSS (so that they follow light and dark mode).

Colours are classes `s0`..`s7`; series also differ in dashes and points in shape, so colour is never alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

Point = tuple[float, float]
N_STYLES = 8
MAX_POINTS = 200
MANY = 1e9  # from here on a number is written with an exponent
CORNERS: tuple[list[Point], ...] = (
    [],  # a circle
    [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    [(0, -1.3), (1.2, 0.9), (-1.2, 0.9)],
    [(0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)],
    [(0, 1.3), (1.2, -0.9), (-1.2, -0.9)],
)
"""Of the marks' shapes."""


class Series(NamedTuple):
    """A line: its name, points (sorted by x) and style number; `dashed` for held-out values."""

    name: str
    points: Sequence[Point]
    style: int = 0
    dashed: bool = False


class Mark(NamedTuple):
    """A labelled point with half a 95 % interval in x and y (0 or None: not drawn)."""

    name: str
    x: float
    y: float
    x_error: float | None = None
    y_error: float | None = None
    style: int = 0


def number(value: float | None, digits: int = 3) -> str:
    """`value` for people: at most `digits` significant digits and decimals, a real minus sign, "–" for nothing."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if abs(value) < 10 ** -(digits + 1) or abs(value) >= MANY:
        text = f"{value:.1e}"
    else:
        place = math.floor(math.log10(abs(value)))  # of the first digit, which is always shown
        text = f"{value:,.{max(min(digits - 1 - place, digits), -place, 0)}f}"
    return text.replace("-", "−")


def signed(value: float) -> str:
    """`value` with its sign, two digits: "+0.42", "−1.3", "0"."""
    text = number(value, 2)
    return f"+{text}" if value > 0 else text


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass
class Frame:
    """A plot area: data ranges, size in pixels, and what is drawn so far."""

    width: int
    height: int
    x_range: Point
    y_range: Point
    left: int = 46
    right: int = 12
    top: int = 12
    bottom: int = 36
    parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)

    def axes(self, x_label: str, y_label: str = "") -> None:
        bottom, right = self.height - self.bottom, self.width - self.right
        for value in nice_ticks(*self.y_range, max(4, self.height // 50)):
            y = self.y(value)
            self.parts.append(f'<line class="grid" x1="{self.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self.text(self.left - 6, y + 4, tick(value), "end")
        for value in nice_ticks(*self.x_range, max(3, self.width // 90)):
            self.text(self.x(value), bottom + 15, tick(value), "middle")
        self.parts.append(f'<line class="axis" x1="{self.left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        self.text((self.left + right) / 2, self.height - 4, x_label, "middle", "label")
        if y_label:
            middle = (self.top + bottom) / 2
            self.parts.append(
                f'<text class="label" transform="translate(12 {middle:.0f}) rotate(-90)" '
                f'text-anchor="middle">{escape(y_label)}</text>'
            )

    def text(self, x: float, y: float, text: str, anchor: str = "start", css: str = "tick") -> None:
        self.parts.append(f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, points: Sequence[Point], css: str) -> None:
        path = "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)
        self.parts.append(f'<path class="line {css}" d="{path}"/>')

    def hit(self, x: float, y: float, tip: str, radius: float = 7) -> None:
        """An invisible disc that shows `tip` on hover."""
        self.parts.append(
            f'<circle class="hit" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius}" '
            f'data-tip="{escape(tip, quote=True)}"/>'
        )

    def svg(self, title: str, css: str = "") -> str:
        return (
            f'<svg class="chart {css}" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(title, quote=True)}">{"".join(self.parts)}</svg>'
        )


def tick(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= MANY):
        return f"{value:.3g}".replace("-", "−")
    return f"{value:,.4g}".replace("-", "−") if abs(value) < 1e4 else f"{value / 1000:,.0f}k".replace("-", "−")


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most `most` points: means of consecutive runs, the last point kept as it is."""
    if len(points) <= most:
        return list(points)
    size = math.ceil((len(points) - 1) / (most - 1))
    runs = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    means = [(sum(x for x, _ in r) / len(r), sum(y for _, y in r) / len(r)) for r in runs]
    return [*means, points[-1]]


def span(values: Sequence[float], pad: float = 0.06) -> Point:
    """The range of `values` with some room; never of width 0."""
    low, high = min(values), max(values)
    room = (high - low) * pad or max(abs(high) * 0.1, 0.1)
    return low - room, high + room


def line_chart(title: str, series: Sequence[Series], x_label: str, width: int = 360, height: int = 210) -> str:
    """Lines over a common x; hovering a point shows its numbers. Points that are not finite are left out."""
    finite = ([p for p in s.points if all(map(math.isfinite, p))] for s in series)
    kept = [Series(s.name, thin(points), s.style, s.dashed) for s, points in zip(series, finite) if points]
    if not kept:
        return ""
    xs, ys = ([point[i] for s in kept for point in s.points] for i in (0, 1))
    x_range = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 0.5, min(xs) + 0.5)
    frame = Frame(width, height, x_range, span(ys))
    frame.axes(x_label)
    for s in kept:
        css = f"s{s.style % N_STYLES} d{s.style % N_STYLES}" + (" held-out" if s.dashed else "")
        if len(s.points) == 1:
            frame.parts.append(marker(frame.x(s.points[0][0]), frame.y(s.points[0][1]), s.style))
        else:
            frame.line(s.points, css)
    for s in kept:
        for x, y in thin(s.points, 60):
            frame.hit(x, y, f"{s.name} · {x_label} {number(x)}: {number(y, 4)}")
    return frame.svg(title)


def marker(x: float, y: float, style: int, size: float = 5) -> str:
    css, corners = f'class="mark s{style % N_STYLES}"', CORNERS[style % len(CORNERS)]
    if not corners:
        return f'<circle {css} cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'
    points = " ".join(f"{x + a * size:.1f},{y + b * size:.1f}" for a, b in corners)
    return f'<polygon {css} points="{points}"/>'


def frontier_chart(curve: Sequence[Point], marks: Sequence[Mark], width: int, height: int, css: str = "") -> str:
    """Reward against KL with the exact frontier (may be empty); one labelled point with error bars per method."""
    right = max([m.x + (m.x_error or 0) for m in marks] + [0.0]) * 1.25 or max([x for x, _ in curve] + [1.0])
    shown = clip(curve, right)
    ys = [y for _, y in shown] + [m.y + s * (m.y_error or 0) for m in marks for s in (-1, 1)]
    frame = Frame(width, height, (0.0, right), span(ys, 0.08), left=54)
    frame.axes("KL to the base, nats per completion", "true reward")
    if shown:
        outline = [(frame.x(x), frame.y(y)) for x, y in shown]
        area = "L".join(f"{x:.1f} {y:.1f}" for x, y in outline)
        edge = f"M{outline[0][0]:.1f} {frame.top}L{area}L{outline[-1][0]:.1f} {frame.top}Z"
        frame.parts.append(f'<path class="beyond" d="{edge}"/>')
        frame.line(shown, "frontier")
        for x, y in thin(shown, 40):
            frame.hit(x, y, f"best possible at KL {number(x)}: {number(y)}")
        # The curve rises, so a text that ends on it is above it everywhere.
        x, y = shown[min(len(shown) - 1, len(shown) * 4 // 5)]
        words = "best possible" if width < 500 else "exact frontier: the best possible"
        frame.text(frame.x(x) - 6, max(frame.y(y) - 6, frame.top + 12), words, "end", "note")
    taken = [(frame.x(x) - 3, frame.y(y) - 6, frame.x(x) + 3, frame.y(y) + 6) for x, y in thin(shown, 60)]
    taken += [(frame.x(m.x) - 8, frame.y(m.y) - 8, frame.x(m.x) + 8, frame.y(m.y) + 8) for m in marks]
    for m in marks:
        _draw_mark(frame, m)
    for m in marks:
        _label(frame, m, taken)
    return frame.svg("true reward against KL, with the exact frontier", css)


def clip(curve: Sequence[Point], right: float) -> list[Point]:
    """The part of a curve with x at most `right`, its last point interpolated."""
    kept = [(x, y) for x, y in curve if x <= right]
    beyond = next(((x, y) for x, y in curve if x > right), None)
    if beyond is not None and kept:
        (x0, y0), (x1, y1) = kept[-1], beyond
        kept.append((right, y0 + (right - x0) / (x1 - x0) * (y1 - y0)))
    return kept


def _draw_mark(frame: Frame, m: Mark) -> None:
    x, y, (dx, dy) = frame.x(m.x), frame.y(m.y), (m.x_error or 0, m.y_error or 0)
    for x0, x1, y0, y1 in ((m.x - dx, m.x + dx, m.y, m.y), (m.x, m.x, m.y - dy, m.y + dy)):
        if (x0, y0) != (x1, y1):
            ends = f'x1="{frame.x(x0):.1f}" x2="{frame.x(x1):.1f}" y1="{frame.y(y0):.1f}" y2="{frame.y(y1):.1f}"'
            frame.parts.append(f'<line class="error s{m.style % N_STYLES}" {ends}/>')
    frame.parts.append(marker(x, y, m.style))
    reward = f"reward {number(m.y)}" + (f" ± {number(m.y_error, 2)}" if m.y_error else "")
    frame.hit(m.x, m.y, f"{m.name}: {reward}, KL {number(m.x)}", 11)


def _label(frame: Frame, m: Mark, taken: list[tuple[float, float, float, float]]) -> None:
    """Put the name beside the point, on the first side where it hits nothing."""
    x, y, width = frame.x(m.x), frame.y(m.y), 8.0 * len(m.name)
    places = [(11, 4, "start"), (-11, 4, "end"), (11, 20, "start"), (11, -12, "start"), (-11, 20, "end")]
    places += [(0, 25, "middle"), (0, -14, "middle"), (-11, -12, "end"), (24, 4, "start")]
    boxes = []
    for dx, dy, anchor in places:
        start = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        boxes.append((start, y + dy - 11, start + width, y + dy + 3))

    def free(x0: float, y0: float, x1: float, y1: float) -> bool:
        inside = x0 > frame.left and x1 < frame.width and y0 > 0 and y1 < frame.height - frame.bottom
        return inside and not any(x0 < b[2] and b[0] < x1 and y0 < b[3] and b[1] < y1 for b in taken)

    best = next((i for i, box in enumerate(boxes) if free(*box)), 0)
    dx, dy, anchor = places[best]
    taken.append(boxes[best])
    frame.text(x + dx, y + dy, m.name, anchor, f"name s{m.style % N_STYLES}")
