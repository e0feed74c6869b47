"""Playing cards drawn for General Points with pictures: ranks and suits from glyphs of our own, no font, no foreign image.

A glyph is a small bitmap, enlarged to the card by whole pixels or, where it does not fit so, by area. Cards lie in a row on
a table; with a margin they lie a little off their places, drawn from `key`. The same arguments give the same pixels on every
machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw

from amft_fast.tasks.general_points.hands import draw

BLACK_SUITS, RED_SUITS = ("spades", "clubs"), ("hearts", "diamonds")
SUITS = BLACK_SUITS + RED_SUITS
RANKS = ("A", *map(str, range(2, 11)), "J", "Q", "K")

TABLE, PAPER, EDGE = (38, 104, 70), (250, 248, 240), (120, 120, 116)
INK = {**dict.fromkeys(BLACK_SUITS, (20, 20, 28)), **dict.fromkeys(RED_SUITS, (196, 30, 38))}

_RANK_ROWS = {  # 7 rows each; "10" is wider than the others
    "A": "..#.. .#.#. #...# #...# ##### #...# #...#",
    "2": ".###. #...# ....# ...#. ..#.. .#... #####",
    "3": "##### ...#. ..#.. ...#. ....# #...# .###.",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": "..##. .#... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ..#.. ..#.. .#... .#...",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ...#. .##..",
    "10": "#..### ##.#.# #..#.# #..#.# #..#.# #..#.# #..###",
    "J": "..### ...#. ...#. ...#. ...#. #..#. .##..",
    "Q": ".###. #...# #...# #...# #.#.# #..#. .##.#",
    "K": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
}
_SUIT_ROWS = {  # 7 by 7
    "spades": "...#... ..###.. .#####. ####### ###.### ...#... ..###..",
    "clubs": "..###.. ..###.. ###.### ####### ###.### ...#... ..###..",
    "hearts": ".##.##. ####### ####### ####### .#####. ..###.. ...#...",
    "diamonds": "...#... ..###.. .#####. ####### .#####. ..###.. ...#...",
}


def _glyph(rows: str) -> Image.Image:
    """A bitmap as a mask: 255 where it is inked."""
    lines = rows.split()
    mask = Image.new("L", (len(lines[0]), len(lines)))
    mask.putdata([255 * (mark == "#") for line in lines for mark in line])
    return mask


@lru_cache(maxsize=256)
def _enlarged(rows: str, wide: int, tall: int) -> Image.Image:
    """A glyph as large as fits into wide x tall: by a whole factor where one does, else smoothed."""
    mask = _glyph(rows)
    factor = min(wide // mask.width, tall // mask.height)
    if factor:
        return mask.resize((factor * mask.width, factor * mask.height), Image.Resampling.NEAREST)
    return mask.resize((min(wide, mask.width), min(tall, mask.height)), Image.Resampling.BOX)


@lru_cache(maxsize=512)
def card_image(rank: str, suit: str, size: tuple[int, int]) -> Image.Image:
    """One card, `size` (width, height) in pixels: its rank above, its suit below. Callers must not draw on it.

    Raises ValueError for a rank or suit that is none, or a card too small to be read (under 8 x 16).
    """
    if rank not in RANKS or suit not in SUITS:
        raise ValueError(
            f"a card needs a rank of {', '.join(RANKS)} and a suit of {', '.join(SUITS)}, got {rank!r} {suit!r}"
        )
    wide, tall = size
    if wide < 8 or tall < 16:
        raise ValueError(f"size of a card must be at least 8 x 16 pixels, got {wide} x {tall}")
    card = Image.new("RGB", size, PAPER)
    line = max(1, wide // 48)
    ImageDraw.Draw(card).rectangle((0, 0, wide - 1, tall - 1), outline=EDGE, width=line)
    pad = max(1, wide // 14)
    room = (wide - 2 * pad, tall // 2 - 2 * pad)
    for rows, middle in ((_RANK_ROWS[rank], tall // 4), (_SUIT_ROWS[suit], tall - tall // 4)):
        mask = _enlarged(rows, *room)
        card.paste(INK[suit], ((wide - mask.width + 1) // 2, middle - mask.height // 2), mask)
    return card


@lru_cache(maxsize=4096)
def table_image(
    ranks: tuple[str, ...], suits: tuple[str, ...], size: tuple[int, int], margin: int = 0, key: str = ""
) -> Image.Image:
    """The cards in a row on a table, RGB. Every card has `margin` pixels of table around it, and lies up to half of that
    off its place, as `key` has it. Callers must not draw on it."""
    wide, tall = size
    table = Image.new("RGB", (len(ranks) * (wide + 2 * margin), tall + 2 * margin), TABLE)
    for i, (rank, suit) in enumerate(zip(ranks, suits, strict=True)):
        off = [round((draw("lay", key, i, axis) - 0.5) * margin) for axis in "xy"]
        table.paste(card_image(rank, suit, size), (i * (wide + 2 * margin) + margin + off[0], margin + off[1]))
    return table


def pick_suits(problem_id: str, count: int, suits: Sequence[str], seed: int) -> tuple[str, ...]:
    """A suit for each card, from what the problem is alone."""
    return tuple(suits[int(draw("suit", seed, problem_id, i) * len(suits))] for i in range(count))
