"""Small charts as inline SVG for the HTML pages: lines, stacked bars, one bar of shares.

Colours are CSS classes (`c0`…`c7`, defined by `STYLE`), so that one drawing serves light, dark and paper. Each chart carries
its figures in words for those who do not see it. Imports no matplotlib: twenty of its SVGs take two seconds and 1 MB.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 216
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 24
MOST_POINTS = 400  # about one for each pixel of a card

LIGHT = ("#6b7280", "#2563a8", "#c2521b", "#1f7a5c", "#7a4fa3", "#a06c00", "#b03a6b", "#2f7d92")
DARK = ("#9aa3ad", "#6aaeea", "#f08a5b", "#55c19a", "#b795e0", "#dcb04c", "#e58bb0", "#6fc3d6")

_ids = itertools.count()


def _variables(colours: Sequence[str]) -> str:
    return " ".join(f"--c{i}: {c};" for i, c in enumerate(colours))


STYLE = f"""
:root {{ {_variables(LIGHT)} --grid: #e3e6ea; --shade: #f1f2f4; }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} --grid: #2f353c; --shade: #22272d; }} }}
{"".join(f".c{i} {{ --c: var(--c{i}); }} " for i in range(len(LIGHT)))}
svg.chart {{ display: block; width: 100%; height: auto; font-size: 11px; fill: var(--muted); }}
svg.chart .grid {{ stroke: var(--grid); }}
svg.chart .shade {{ fill: var(--shade); }}
svg.chart .guide {{ stroke: var(--muted); stroke-dasharray: 2 3; }}
svg.chart .halo {{ paint-order: stroke; stroke: var(--card); stroke-width: 3px; stroke-linejoin: round; }}
.line {{ fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }}
.line.faint {{ stroke-width: 1; opacity: .35; }}
.line.dashed {{ stroke-dasharray: 6 3; }}
.line.dotted {{ stroke-width: 1.2; stroke-dasharray: 1 4; }}
.dot {{ fill: var(--c); }}
.dot.open {{ fill: var(--card); stroke: var(--c); stroke-width: 1.6; }}
.bar {{ fill: var(--c); stroke: var(--card); stroke-width: .6; }}
.legend {{ list-style: none; display: flex; flex-wrap: wrap; gap: 0 1em; margin: 0 0 .3em; padding: 0; font-size: .8rem; }}
.legend svg {{ width: 22px; height: 10px; vertical-align: 0; margin-right: .3em; }}
"""


@dataclass(frozen=True)
class Line:
    """A series. `ys` may hold None for what was not finite: the line is broken there.

    `style`: solid, dashed, dotted, faint (raw values behind a smoothed line), points or open (points alone).
    `errors` are half lengths of error bars; `shift` moves the drawing by pixels, so that bars at one step stand side by side.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    colour: int = 1
    style: str = "solid"
    errors: Sequence[float] = ()
    in_legend: bool = True
    shift: float = 0.0

    def finite(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in zip(self.xs, self.ys) if y is not None]


@dataclass(frozen=True)
class Guide:
    """A horizontal line at a value that matters: a target, a bound."""

    name: str
    value: float


# ------------------------------------------------------------------------------------------------------------- numbers


def number(value: float | None, percent: bool = False) -> str:
    """A figure for people: three significant digits, 12.3k, 4.5M, 2.1e-7, or a percentage with one decimal."""
    if value is None or not math.isfinite(value):
        return "–"
    if percent:
        return f"{100 * value:.1f}%"
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            scale = 1e3 if name == "k" else unit
            return f"{value / scale:.{0 if size >= 100 * scale else 1}f}{name}".replace(".0", "")
    if size and size < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    text = f"{value:.0f}" if size >= 100 else f"{value:.3g}"
    return text.replace("-", "−")


def ticks(low: float, high: float, n: int = 4) -> list[float]:
    """About n round numbers that cover [low, high]: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    raw = (high - low) / n
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [i * step for i in range(first, last + 1)]


def _label(value: float, step: float, percent: bool) -> str:
    """The text of a tick: all ticks of an axis with the same decimals."""
    if percent:
        return f"{100 * value:.{max(0, -math.floor(math.log10(100 * step) + 1e-9))}f}%"
    if step < 1e-3 or abs(value) >= 1e4:
        return number(value) if value else "0"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    decimals += not math.isclose(round(step, decimals), step)  # steps of 0.25
    return f"{value:.{decimals}f}".replace("-", "−")


class Scale:
    """From values to pixels, linear or logarithmic, with ticks."""

    def __init__(self, values: Sequence[float], pixels: tuple[float, float], log: bool = False, n: int = 4) -> None:
        self.log, self.pixels = log, pixels
        low, high = min(values), max(values)
        if log:
            first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
            last += first == last
            every = -(-(last - first) // 5)
            self.ticks = [10.0**e for e in range(first, last + 1, every)]
            self.low, self.high = float(first), float(last)
        else:
            if high - low < 1e-12 * max(abs(high), abs(low), 1e-9):
                low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
            self.ticks = ticks(low, high, n)
            self.low, self.high = self.ticks[0], self.ticks[-1]

    def __call__(self, value: float) -> float:
        if self.log:
            value = math.log10(value)
        share = (value - self.low) / (self.high - self.low)
        return self.pixels[0] + share * (self.pixels[1] - self.pixels[0])

    def labels(self, percent: bool) -> list[str]:
        if self.log:
            return [number(t, percent) for t in self.ticks]
        return [_label(t, self.ticks[1] - self.ticks[0], percent) for t in self.ticks]


def thin(xs: Sequence[float], ys: Sequence[float | None]) -> tuple[list[float], list[float | None]]:
    """At most about MOST_POINTS points: of each run of neighbours the lowest and the highest, so that spikes stay."""
    if len(xs) <= MOST_POINTS:
        return list(xs), list(ys)
    size = -(-2 * len(xs) // MOST_POINTS)
    out: list[tuple[float, float | None]] = []
    for i in range(0, len(xs), size):
        pairs = [(x, y) for x, y in zip(xs[i : i + size], ys[i : i + size]) if y is not None]
        if not pairs:
            out.append((xs[i], None))
            continue
        out += sorted({min(pairs, key=lambda p: p[1]), max(pairs, key=lambda p: p[1])})
    return [x for x, _ in out], [y for _, y in out]


# -------------------------------------------------------------------------------------------------------------- drawing


def line_chart(
    title: str,
    lines: Sequence[Line],
    note: str = "",
    *,
    guides: Sequence[Guide] = (),
    shaded: tuple[float, float] | None = None,
    percent: bool = False,
    log: bool | None = None,
    include: Sequence[float] = (),
) -> Markup:
    """A figure with title, legend (each series with its last value), chart and note; empty when nothing is finite.

    `guides` are horizontal lines; `shaded` = (first, last, in x) is the warm-up; `include` are values the y axis must
    reach. `log` None: logarithmic where all is positive and spans a factor of 30 or has spikes.
    """
    lines = [line for line in lines if line.finite()]
    if not lines:
        return Markup("")
    values = [y for line in lines for _, y in line.finite()]
    if log is None:
        log = min(values) > 0 and (
            max(values) > 30 * min(values) or max(values) > 10 * sorted(values)[len(values) // 2]
        )
    if log:
        include = []
    reach = [y + s * e for line in lines for y, e in zip(line.ys, line.errors) for s in (-1, 1) if y is not None]
    y_of = Scale([*values, *(g.value for g in guides), *include, *([] if log else reach)], (HEIGHT - BOTTOM, TOP), log)
    xs = [x for line in lines for x, _ in line.finite()]
    x_of = Scale([*xs, *(shaded or ())], (LEFT + 9, WIDTH - RIGHT - 9), n=5)
    if max(xs) > min(xs):  # steps need not end at a round number
        x_of.low, x_of.high = min(xs + list(shaded or ())), max(xs)
    parts = [_shade(x_of, shaded), _axes(x_of, y_of, percent)]
    parts += [_guide(g, y_of, percent) for g in guides]
    parts += [_line(line, x_of, y_of) for line in lines]
    named = [line for line in lines if line.in_legend]
    legend = [(line.name, line.colour, line.style, number(line.finite()[-1][1], percent)) for line in named]
    words = ". ".join([_in_words(line, percent) for line in named] + [f"{g.name}: {g.value:.4g}" for g in guides])
    return figure(title, _svg(title, words, Markup("").join(parts)), note, legend)


def figure(title: str, svg: Markup, note: str, legend: Sequence[tuple[str, int, str, str]]) -> Markup:
    """Title, legend and note round a drawing. A legend of (name, colour, style, value)."""
    items = Markup("").join(
        Markup("<li>{}{} <b>{}</b></li>").format(_swatch(colour, style), name, value)
        for name, colour, style, value in legend
    )
    return Markup('<figure><figcaption><h3>{}</h3><ul class="legend">{}</ul></figcaption>{}{}</figure>').format(
        title, items, svg, Markup('<p class="note">{}</p>').format(note) if note else ""
    )


def stacked_bars(
    title: str, edges: Sequence[float], layers: Sequence[tuple[str, int, Sequence[float]]], note: str = ""
) -> Markup:
    """Stacked bars between neighbouring `edges` (one more than bars); layers of (name, colour, heights), lowest first."""
    heights = [sum(column) for column in zip(*(h for _, _, h in layers))]
    if not heights or max(heights) <= 0:
        return Markup("")
    x_of = Scale(edges, (LEFT + 9, WIDTH - RIGHT - 9), n=5)
    x_of.low, x_of.high = edges[0], edges[-1]
    y_of = Scale([0.0, max(heights)], (HEIGHT - BOTTOM, TOP))
    parts = [_axes(x_of, y_of, False)]
    base = [0.0] * len(heights)
    for _, colour, layer in layers:
        for i, height in enumerate(layer):
            if height > 0:
                x, y = x_of(edges[i]), y_of(base[i] + height)
                parts.append(_rect(x, y, x_of(edges[i + 1]) - x, y_of(base[i]) - y, colour))
                base[i] += height
    words = ". ".join(f"{name}: {number(sum(layer) / len(layer))} on average" for name, _, layer in layers)
    return figure(title, _svg(title, words, Markup("").join(parts)), note, [(n, c, "bar", "") for n, c, _ in layers])


def share_bar(title: str, shares: Sequence[tuple[str, int, float]]) -> Markup:
    """One horizontal bar of (name, colour, share of 1), each share of 6 % or more labelled."""
    parts, x = [], 0.0
    for _, colour, share in shares:
        parts.append(_rect(x, 2, share * WIDTH, 24, colour))
        if share >= 0.06:
            text = f'<text class="halo" x="{x + share * WIDTH / 2:.1f}" y="40" text-anchor="middle">{share:.0%}</text>'
            parts.append(Markup(text))
        x += share * WIDTH
    words = ", ".join(f"{name} {share:.1%}" for name, _, share in shares)
    return _svg(title, words, Markup("").join(parts), 46)


def swatch(colour: int) -> Markup:
    """A filled sample of a colour for a table."""
    return _swatch(colour, "bar")


def _svg(title: str, words: str, inner: Markup, height: int = HEIGHT) -> Markup:
    name = f"chart{next(_ids)}"
    return Markup(
        '<svg class="chart" role="img" viewBox="0 0 {} {}" aria-labelledby="{}t {}d"><title id="{}t">{}</title>'
        '<desc id="{}d">{}</desc>{}</svg>'
    ).format(WIDTH, height, name, name, name, title, name, words, inner)


def _axes(x_of: Scale, y_of: Scale, percent: bool) -> Markup:
    parts = []
    for value, label in zip(y_of.ticks, y_of.labels(percent)):
        y = y_of(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{escape(label)}</text>')
    inside = [t for t in x_of.ticks if x_of.low - 1e-9 <= t <= x_of.high + 1e-9 and t == int(t)]
    for value in inside or [x_of.low]:
        x = x_of(value)
        if x < WIDTH - 52:  # room for the word step
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(number(value))}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">step</text>')
    return Markup("".join(parts))


def _shade(x_of: Scale, shaded: tuple[float, float] | None) -> Markup:
    if shaded is None or shaded[1] <= shaded[0]:
        return Markup("")
    x, width = x_of(shaded[0]), x_of(shaded[1]) - x_of(shaded[0])
    out = f'<rect class="shade" x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - BOTTOM - TOP}"/>'
    if width > 52:
        out += f'<text x="{x + 4:.1f}" y="{TOP + 11}">warm-up</text>'
    return Markup(out)


def _guide(guide: Guide, y_of: Scale, percent: bool) -> Markup:
    y, right = y_of(guide.value), WIDTH - RIGHT
    text = f"{guide.name} {number(guide.value, percent)}"
    return Markup(
        f'<line class="guide" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="halo" x="{right}" y="{y - 4 if y > TOP + 12 else y + 12:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _line(line: Line, x_of: Scale, y_of: Scale) -> Markup:
    xs, ys = thin(line.xs, line.ys)
    pen, path, dots = "M", [], []
    alone = line.style in ("points", "open")
    for i, (x, y) in enumerate(zip(xs, ys)):
        if y is None or (y_of.log and y <= 0):
            pen = "M"
            continue
        path.append(f"{pen}{x_of(x) + line.shift:.1f} {y_of(y):.1f}")
        lonely = pen == "M" and (i + 1 == len(ys) or ys[i + 1] is None)
        if alone or (lonely and line.style != "dotted"):
            dots.append(f'<circle cx="{x_of(x) + line.shift:.1f}" cy="{y_of(y):.1f}" r="{3.2 if alone else 2}"/>')
        pen = "L"
    bars = [
        f"M{x_of(x) + line.shift:.1f} {y_of(y - e):.1f}V{y_of(y + e):.1f}"
        for x, y, e in zip(line.xs, line.ys, line.errors)
        if y is not None and e and not y_of.log
    ]
    out = "" if alone else f'<path class="line {line.style} c{line.colour}" d="{"".join(path)}"/>'
    if bars:
        out += f'<path class="line c{line.colour}" d="{"".join(bars)}"/>'
    if dots:
        out += f'<g class="dot {"open" if line.style == "open" else ""} c{line.colour}">{"".join(dots)}</g>'
    return Markup(out)


def _rect(x: float, y: float, width: float, height: float, colour: int) -> Markup:
    return Markup(
        f'<rect class="bar c{colour}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"/>'
    )


def _swatch(colour: int, style: str) -> Markup:
    inner = {
        "bar": '<rect class="bar c{0}" x="5" y="0" width="11" height="10"/>',
        "points": '<circle class="dot c{0}" cx="11" cy="5" r="3.4"/>',
        "open": '<circle class="dot open c{0}" cx="11" cy="5" r="3.4"/>',
    }.get(style, '<path class="line {1} c{0}" d="M1 5H21"/>')
    return Markup('<svg aria-hidden="true" viewBox="0 0 22 10">{}</svg>').format(Markup(inner.format(colour, style)))


def _in_words(line: Line, percent: bool) -> str:
    points = line.finite()
    (x0, y0), (x1, y1) = points[0], points[-1]
    low, high = min(y for _, y in points), max(y for _, y in points)
    if len(points) == 1:
        return f"{line.name}: {number(y0, percent)} at step {x0:g}"
    return (
        f"{line.name}: from {number(y0, percent)} at step {x0:g} to {number(y1, percent)} at step {x1:g}, "
        f"between {number(low, percent)} and {number(high, percent)}"
    )
