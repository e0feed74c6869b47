"""Pictures for V-IRL, drawn here: the four views at a point of a generated city, and the map of an episode.

A view shows the sky, a street that leads away or the front of a house, and a landmark's board where one stands. Colours and
houses hang on the city's look (the part of its name before the first "-"), so that another city looks different. Everything
is deterministic: the same point gives the same pixels on every machine with the same Pillow.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from amft_fast.tasks.virl.routes import DIRECTIONS, SIDES, Place, Point, difference

LINE = 4  # pixels between the four views

Colour = tuple[int, int, int]


class Look(NamedTuple):
    """The colours of a city."""

    sky: Colour
    ground: Colour
    road: Colour
    houses: tuple[Colour, ...]
    window: Colour


def _look(colours: str) -> Look:
    """A look from hexadecimal colours in the order of its fields, the walls' with slashes between them."""
    values = [tuple(tuple(bytes.fromhex(c)) for c in field.split("/")) for field in colours.split()]
    return Look(*(v if len(v) > 1 else v[0] for v in values))


LOOKS = {
    "brick": _look("9ec4e4 7a9660 5c5c60 9e4c3a/b06246/803e38 ece2c4"),
    "stone": _look("c4d0d8 969c94 464a50 b0aca0/929698/c4beb0 5c7084"),
    "desert": _look("f4ce8c deb87e a4845c ecd6b2/cea46c/f4e6cc 547e8a"),
    "night": _look("121630 18221e 2c2c3c 342e54/243a52/462c46 fad65c"),
}


@lru_cache(maxsize=512)
def drawn_views(point: Point, city: str, size: int) -> Image.Image:
    """Front, right, back and left at a point as one picture. Callers must not draw on it."""
    look = LOOKS[city.partition("-")[0]]
    panes = []
    for k in range(4):
        middle = point.heading + 90 * k
        open_street = any(abs(difference(middle, e)) < 45 for e in point.exits)
        rng = random.Random(f"{city}/{point.place[0]:.1f}/{point.place[1]:.1f}/{round(middle) % 360}")
        pane = _street(look, size, rng) if open_street else _house_front(look, size, rng)
        if point.landmark and _pane_of(point.side)[0] == k:
            _board(pane, point.landmark, _pane_of(point.side)[1])
        panes.append(pane)
    return grid_of(panes)


def grid_of(panes: Sequence[Image.Image]) -> Image.Image:
    """Four square pictures (front, right, back, left) as one: front and right above, back and left below."""
    size = panes[0].size[0]
    out = Image.new("RGB", (2 * size + LINE, 2 * size + LINE))
    for k, pane in enumerate(panes):
        out.paste(pane, ((k % 2) * (size + LINE), (k // 2) * (size + LINE)))
    return out


def _pane_of(side: str) -> tuple[int, float]:
    """Which of the four views a side falls into, and where in it (0 left, 1 right); corners belong to right and left."""
    places = ((0, 0.5), (1, 0.2), (1, 0.5), (1, 0.8), (2, 0.5), (3, 0.2), (3, 0.5), (3, 0.8))
    return places[SIDES.index(side)]


def _street(look: Look, size: int, rng: random.Random) -> Image.Image:
    """A street that leads away between houses."""
    image = Image.new("RGB", (size, size), look.sky)
    pen = ImageDraw.Draw(image)
    far = size * 0.55
    pen.rectangle((0, far, size, size), look.ground)
    for left in (True, False):
        near = 0.0
        for _ in range(3):  # houses grow smaller towards the far end
            wide, tall = size * rng.uniform(0.1, 0.16), size * rng.uniform(0.2, 0.4) * (1 - near / size)
            x = near if left else size - near - wide
            box = (x, far - tall, x + wide, far + (size * 0.2) * (1 - 2 * near / size))
            pen.rectangle(box, rng.choice(look.houses))
            _windows(pen, box, look.window, max(2, int(wide / 7)))
            near += wide
    pen.polygon(
        ((size * 0.46, far), (size * 0.54, far), (size * 0.86, size), (size * 0.14, size)),
        look.road,
    )
    return image


def _house_front(look: Look, size: int, rng: random.Random) -> Image.Image:
    """Houses across the whole view: no way through."""
    image = Image.new("RGB", (size, size), look.sky)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, size * 0.8, size, size), look.ground)
    x = 0.0
    while x < size:
        wide = size * rng.uniform(0.3, 0.5)
        box = (x, size * rng.uniform(0.1, 0.3), min(x + wide, size), size * 0.82)
        pen.rectangle(box, rng.choice(look.houses))
        _windows(pen, box, look.window, max(3, size // 20))
        x += wide
    return image


def _windows(pen: ImageDraw.ImageDraw, box: tuple[float, ...], colour: Colour, edge: int) -> None:
    x0, y0, x1, y1 = (round(v) for v in box)
    for x in range(x0 + edge, x1 - edge, 2 * edge):
        for y in range(y0 + edge, y1 - edge, 2 * edge):
            pen.rectangle((x, y, x + edge // 2, y + edge - 1), colour)


def _board(image: Image.Image, name: str, where: float) -> None:
    """A landmark's board: its name on a colour of its own, on a post."""
    size = image.size[0]
    rng = random.Random(f"board/{name}")
    paint = tuple(rng.randrange(150, 256) for _ in range(3))
    font = ImageFont.load_default_imagefont()  # the bitmap that Pillow carries: no font file, the same everywhere
    box = font.getbbox(name)
    words = Image.new("RGB", (box[2] + 6, box[3] + 4), paint)
    ImageDraw.Draw(words).text((3, 2), name, (0, 0, 0), font=font)
    wide = min(round(size * 0.62), words.size[0] * 3)
    words = words.resize((wide, max(9, round(wide * words.size[1] / words.size[0]))), Image.Resampling.NEAREST)
    x = min(max(0, round(where * size - wide / 2)), size - wide)
    y = round(size * 0.42)
    pen = ImageDraw.Draw(image)
    pen.rectangle((x + wide // 2 - 1, y, x + wide // 2 + 1, round(size * 0.85)), (120, 120, 120))
    image.paste(words, (x, y))
    pen.rectangle((x - 1, y - 1, x + wide, y + words.size[1]), outline=(0, 0, 0))


# ----------------------------------------------------------------------------------------------------------------- map

_MARKS = {"first": "#2c8c5a", "later": "#d39a1c", "never": "#c0392b", "open": "#9aa3ad"}


def map_svg(problem, trace: Sequence[tuple[int, str, str]], width: int = 260) -> str:
    """The map of an episode. Grey: streets at the places of the route; blue: the route asked. A point is green when it was
    solved at the first try, amber later, red when it was passed over, grey when it was not reached; a red stroke shows the
    turn that a wrong answer named."""
    points = problem.points
    ends = [problem.route.start, *(leg.end for leg in problem.route.legs)]
    xs, ys = [p[0] for p in ends], [p[1] for p in ends]
    pad = 45.0
    left, top = min(xs) - pad, max(ys) + pad
    wide, tall = max(xs) - left + pad, top - min(ys) + pad
    mark = max(wide, tall) / 45

    def at(place) -> tuple[str, str]:
        return f"{place[0] - left:.1f}", f"{top - place[1]:.1f}"

    def stroke(a, heading: float, length: float, colour: str, thick: float) -> str:
        (x1, y1), (x2, y2) = at(a), at(_ahead(a, heading, length))
        style = f'stroke="{colour}" stroke-width="{thick:.1f}" stroke-linecap="round"'
        return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" {style}/>'

    exits = [problem.route.exits, *(leg.exits for leg in problem.route.legs)]
    parts = [stroke(p, e, 38, "#c9ced4", 2 * mark) for p, ways in zip(ends, exits) for e in ways]
    line = " ".join(",".join(at(p)) for p in ends)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#3b6fb5" stroke-width="{0.7 * mark:.1f}"/>')
    for i, kind, action in trace:
        heading = _turned(points[i], action, problem.space)
        if kind != "correct" and heading is not None:
            parts.append(stroke(points[i].place, heading, 26, _MARKS["never"], 0.5 * mark))
    for i, point in enumerate(points):
        x, y = at(point.place)
        colour = _MARKS[_outcome([kind for j, kind, _ in trace if j == i])]
        parts.append(f'<circle cx="{x}" cy="{y}" r="{mark:.1f}" fill="{colour}"/>')
    for leg in problem.route.legs:
        if leg.landmark:
            x, y = at(leg.end)
            size = f'font-size="{2.6 * mark:.1f}" dx="{1.5 * mark:.1f}" dy="{-1.5 * mark:.1f}"'
            parts.append(f'<text x="{x}" y="{y}" {size} font-family="sans-serif">{escape(leg.landmark)}</text>')
    height = round(width * tall / wide)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {tall:.0f}" width="{width}" height="{height}">'
    return f'{head}<rect width="100%" height="100%" fill="#f5f6f4"/>{"".join(parts)}</svg>'


def _ahead(place: Place, heading: float, length: float) -> Place:
    return place[0] + length * math.sin(math.radians(heading)), place[1] + length * math.cos(math.radians(heading))


def _turned(point: Point, action: str, space: str) -> float | None:
    """The heading that an action names, None for a stop or an answer that named none."""
    relative = {"left": -90, "right": 90, "slightly left": -30, "slightly right": 30, "forward": 0}
    if action in DIRECTIONS:
        return 45.0 * DIRECTIONS.index(action)
    return point.heading + relative[action] if action in relative else None


def _outcome(kinds: Sequence[str]) -> str:
    if not kinds:
        return "open"
    return "never" if "correct" not in kinds else "first" if kinds[0] == "correct" else "later"
