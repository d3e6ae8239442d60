"""Bar charts in SVG, one panel per case and one bar per implementation, ours in blue."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

WIDTH, NAMES, ROW, TITLE = 720, 280, 18, 30


def bars(title: str, panels: Mapping[str, Mapping[str, float]], digits: int = 1) -> str:
    """panels: title → {way: value}, each panel on its own scale from 0; ways whose names begin with "ours" are ours."""
    parts, y = [f'<text x="10" y="18" font-weight="bold">{escape(title)}</text>'], TITLE
    for name, values in panels.items():
        most = max(values.values())
        parts.append(f'<text x="10" y="{y + 14}">{escape(name)}</text>')
        y += ROW + 2
        for way, value in values.items():
            length = (WIDTH - NAMES - 70) * value / most
            color = "#06c" if way.startswith("ours") else "#999"
            parts += [
                f'<text x="{NAMES - 6}" y="{y + 13}" text-anchor="end">{escape(way)}</text>',
                f'<rect x="{NAMES}" y="{y + 2}" width="{length:.1f}" height="{ROW - 4}" fill="{color}"/>',
                f'<text x="{NAMES + length + 5:.1f}" y="{y + 13}">{value:.{digits}f}</text>',
            ]
            y += ROW
        y += ROW // 2
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}"'
    return "\n".join([f'{head} font-family="sans-serif" font-size="11">', *parts, "</svg>\n"])
