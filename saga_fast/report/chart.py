"""Line charts as inline SVG. Colours are classes of page.css, so that one drawing suits a light page and a dark one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 58, 8, 10, 34  # room around the axes
LARGEST = 1e290  # larger values and nan are not drawn
POINTS = 240  # of a line, at most: longer runs are averaged

Line = tuple[str, Sequence[float], Sequence[float]]  # name, steps, values


class Chart(NamedTuple):
    """lines: (name, its value at the end) in the order of their colours."""

    title: str
    lines: list[tuple[str, str]]
    svg: Markup


def chart(title: str, lines: Sequence[Line], unit: str = "", zero: bool = False) -> Chart | None:
    """None where no line has a finite point. unit: of the values; zero: whether the axis starts at 0."""
    kept = [(name, _thinned(steps, values)) for name, steps, values in lines]
    kept = [(name, points) for name, points in kept if points]
    if not kept:
        return None
    xs, ys = zip(*(point for _, points in kept for point in points))
    low, high, ticks = _axis(min(0.0, *ys) if zero else min(ys), max(ys))
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    summary = "; ".join(f"{name} {short(p[0][1])} to {short(p[-1][1])}" for name, p in kept)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {summary}")}">']
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for step, anchor in ((first, "start"), (last, "end")):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 18}" text-anchor="{anchor}">{step:.0f}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    if unit:
        middle = (TOP + HEIGHT - BOTTOM) / 2
        parts.append(f'<text transform="translate(9 {middle}) rotate(-90)" text-anchor="middle">{escape(unit)}</text>')
    for i, (_, points) in enumerate(kept):
        path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)
        parts.append(f'<path class="line c{i}" d="M{path}"/>')
        if len(points) <= 12:
            parts += [f'<circle class="c{i}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.5"/>' for s, v in points]
    parts.append("</svg>")
    return Chart(title, [(name, short(points[-1][1])) for name, points in kept], Markup("".join(parts)))


def _thinned(steps: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    points = [(s, v) for s, v in zip(steps, values) if math.isfinite(s) and abs(v) < LARGEST]
    size = -(-len(points) // POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(v for _, v in part) / len(part)) for part in parts]


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """(low, high, ticks): widened to round numbers, three to six of them."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [i * step for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number in a few characters."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        digits, power = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    return (
        f"{value:.3f}".rstrip("0").rstrip(".")
        if abs(value) < 10
        else f"{value:,.4g}"
        if abs(value) < 1e3
        else f"{value:,.0f}"
    )
