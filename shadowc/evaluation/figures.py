"""Pictures for a page, as SVG that needs nothing else: curves and heat maps.

Colours are CSS variables (`STYLE`), so that a picture follows the reader's light or dark theme.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Point = tuple[float, float]
#: A value as text, for axes and tooltips.
Format = Callable[[float], str]

#: One hue for each way to choose units (Okabe and Ito's, apart also for the colour-blind).
_LIGHT = {
    "shadow": "#0072b2", "layerwise": "#d55e00", "static": "#00835f", "oracle": "#b8518c",
    "random": "#7a7a7a", "fullseq": "#8a7000", "dense": "#333333", "grid": "#dddddd",
    "heat": "#3a93cf", "paper": "#fff", "ink": "#1a1a1a",
}  # fmt: skip
_DARK = {
    "shadow": "#56b4e9", "layerwise": "#ff8a3d", "static": "#2fc79a", "oracle": "#e79ac3",
    "random": "#a0a0a0", "fullseq": "#f0e442", "dense": "#dddddd", "grid": "#3a3a3a",
    "heat": "#2a78ad", "paper": "#161616", "ink": "#e8e8e8",
}  # fmt: skip


def _variables(colors: Mapping[str, str]) -> str:
    return "; ".join(f"--{name}: {color}" for name, color in colors.items())


STYLE = f"""
:root {{ color-scheme: light dark; {_variables(_LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(_DARK)} }} }}
body {{ background: var(--paper); color: var(--ink) }}
figure {{ margin: 2rem 0 }} figcaption {{ margin: .3rem 0 .6rem }}
figure svg {{ display: block; max-width: 100%; height: auto; margin-bottom: .8rem }}
figure svg text {{ font: 12px system-ui, sans-serif; fill: var(--ink) }}
figure svg .axis {{ stroke: var(--ink); stroke-width: 1 }}
figure svg .grid {{ stroke: var(--grid); stroke-width: 1 }}
figure svg .name {{ font-weight: 600 }}
figure svg path {{ fill: none; stroke-width: 2; stroke-linejoin: round }}
"""


def percent(value: float) -> str:
    """0.5 -> 50%."""
    return f"{100 * value:.3g}%"


def whole_percent(value: float) -> str:
    """0.512 -> 51%."""
    return f"{100 * value:.0f}%"


def tenths(value: float) -> str:
    """14.13 -> 14.1."""
    return f"{value:.1f}"


def number(value: float) -> str:
    """Three figures or whole numbers: 27.1, 1,824, 1.7e+06."""
    if abs(value) >= 1e6:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclass(frozen=True)
class Axis:
    """One axis: what it shows and where its ticks are.

    Attributes:
        label: With the unit.
        ticks: Ascending; the first and the last are the ends, unless `ends` are given.
        show: A tick as text.
        log: Whether distances are ratios.
        ends: The ends of the axis.
    """

    label: str
    ticks: Sequence[float]
    show: Format = number
    log: bool = False
    ends: tuple[float, float] | None = None

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        low, high = self.ends or (self.ticks[0], self.ticks[-1])
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


def linear(label: str, values: Sequence[float], show: Format = number) -> Axis:
    """An axis around values, with about five ticks at round numbers."""
    low, high = min(values), max(values)
    rough = (high - low or 1.0) / 5
    unit: float = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return Axis(label, [round(step * i, 10) for i in range(first, last + 1)], show)


def logarithmic(label: str, values: Sequence[float], show: Format = number) -> Axis:
    """An axis around positive values, with ticks at powers of ten, or closer on a short one."""
    low, high = min(values) / 1.05, max(values) * 1.05
    steps: Sequence[float] = (1,)
    if high / low < 1e4:
        steps = (1, 2, 5) if high / low > 10 else (1, 1.5, 2, 3, 4, 5, 7)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]
    return Axis(label, ticks or [low, high], show, log=True, ends=(low, high))


def curves(
    name: str,
    series: Mapping[str, Sequence[Point]],
    x: Axis,
    y: Axis,
    *,
    levels: Mapping[str, float] | None = None,
    width: int = 746,
    height: int = 400,
) -> str:
    """Lines with a point for every value; the legend is in the order of their ends.

    Args:
        name: What is shown, for readers that do not see it.
        series: Points by name, ascending in x; names are those of colours.
        x: The x axis.
        y: The y axis.
        levels: Values of y by name that do not depend on x: dashed lines.
        width: In pixels.
        height: In pixels.
    """
    left = 34 + 7 * max(4, *(len(y.show(tick)) for tick in y.ticks))
    right, top, bottom = width - 130, 12, height - 46

    def place(point: Point) -> Point:
        return (
            round(left + x.share(point[0]) * (right - left), 1),
            round(bottom - y.share(point[1]) * (bottom - top), 1),
        )

    parts = []
    for tick in y.ticks:
        at = place((x.ticks[0], tick))[1]
        parts.append(_line(left, at, right, at, "grid"))
        parts.append(_label(left - 7, at + 4, y.show(tick), "end"))
    for tick in x.ticks:
        at = place((tick, y.ticks[0]))[0]
        parts.append(_line(at, bottom, at, bottom + 4, "axis"))
        parts.append(_label(at, bottom + 18, x.show(tick), "middle"))
    parts.append(_line(left, bottom, right, bottom, "axis"))
    parts.append(_label((left + right) / 2, height - 8, x.label, "middle"))
    middle = (top + bottom) / 2
    turned = f'transform="rotate(-90 14 {middle})"'
    parts.append(_label(14, middle, y.label, "middle", turned))
    for line, level in (levels or {}).items():
        at = place((x.ticks[0], level))[1]
        style = f'style="stroke: var(--{line})" stroke-dasharray="6 4"'
        parts.append(f'<path d="M{left} {at}H{right}" {style}>{_tip(line, y.show(level))}</path>')
    ends = dict(levels or {})
    for line, points in series.items():
        if not points:
            continue
        ends[line] = points[-1][1]
        placed = [place(point) for point in points]
        way = "M" + "L".join(f"{a} {b}" for a, b in placed)
        parts.append(f'<path d="{way}" style="stroke: var(--{line})"/>')
        for (a, b), (value, result) in zip(placed, points, strict=True):
            tip = _tip(line, f"{y.show(result)} at {x.show(value)}")
            parts.append(
                f'<circle cx="{a}" cy="{b}" r="3.5" style="fill: var(--{line})">{tip}</circle>'
            )
    for row, line in enumerate(sorted(ends, key=lambda key: -ends[key])):
        at = top + 10 + 20 * row
        dashes, text = "", line
        if line in (levels or {}):
            dashes, text = ' stroke-dasharray="6 4"', f"{line} {y.show(ends[line])}"
        parts.append(
            f'<path d="M{right + 14} {at}h22" style="stroke: var(--{line})"{dashes}/>'
            + _label(right + 42, at + 4, text, "start")
        )
    return _svg(name, width, height, parts)


def heat_map(
    name: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    row_label: str,
    column_label: str,
    most: float,
    show: Format = number,
) -> str:
    """A table of cells, the darker the larger; with a scale, and numbers where they fit.

    Args:
        name: What is shown; stands above the cells.
        rows: Names of the rows.
        columns: Names of the columns.
        values: A row each.
        row_label: What the rows are.
        column_label: What the columns are.
        most: The value of the darkest colour; 0 is that of the page.
        show: A value as text.
    """
    left = 34 + 7 * max(map(len, rows))
    cell, tall, top = max(12, min(46, 620 // len(columns))), 24, 26
    every = 1 if cell >= 20 else 4
    bottom = top + tall * len(rows)
    right = left + cell * len(columns)
    width, height = max(right + 6, left + 210), bottom + 74
    parts = [_label(left, 14, name, "start", 'class="name"')]
    middle = (top + bottom) / 2
    parts.append(_label(12, middle, row_label, "middle", f'transform="rotate(-90 12 {middle})"'))
    for i, (row, line) in enumerate(zip(rows, values, strict=True)):
        y = top + tall * i
        parts.append(_label(left - 7, y + 16, row, "end"))
        for j, (column, value) in enumerate(zip(columns, line, strict=True)):
            x = left + cell * j
            dark = round(0.85 * min(max(value / most, 0.0), 1.0), 3) if most > 0 else 0
            tip = _tip(f"{row_label} {row}, {column_label} {column}", show(value))
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{tall - 1}" '
                f'style="fill: var(--heat); fill-opacity: {dark}; stroke: var(--grid)">{tip}</rect>'
            )
            if cell >= 34:
                passive = 'pointer-events="none"'
                parts.append(_label(x + cell / 2 - 0.5, y + 16, show(value), "middle", passive))
    for j, column in enumerate(columns):
        if j % every == 0:
            parts.append(_label(left + cell * (j + 0.5), bottom + 15, column, "middle"))
    parts.append(_label((left + right) / 2, bottom + 32, column_label, "middle"))
    steps = 12
    for step in range(steps):
        dark = round(0.85 * (step + 0.5) / steps, 3)
        parts.append(
            f'<rect x="{left + 40 + step * 10}" y="{bottom + 48}" width="10" height="12" '
            f'style="fill: var(--heat); fill-opacity: {dark}"/>'
        )
    parts.append(_label(left + 34, bottom + 58, show(0.0), "end"))
    parts.append(_label(left + 46 + 10 * steps, bottom + 58, show(most), "start"))
    return _svg(name, width, height, parts)


def figure(title: str, caption: str, *pictures: str) -> str:
    """A titled group of pictures."""
    inner = "\n".join(pictures)
    return (
        f"<figure><h2>{html.escape(title)}</h2>"
        f"<figcaption>{html.escape(caption)}</figcaption>\n{inner}</figure>"
    )


def _svg(name: str, width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{html.escape(name)}">{"".join(parts)}</svg>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def _label(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {more}>{html.escape(text)}</text>'


def _tip(what: str, value: str) -> str:
    return f"<title>{html.escape(what)}: {html.escape(value)}</title>"
