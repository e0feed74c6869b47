"""Generated cities for V-IRL: a random street graph with named landmarks, and routes through it. Needs no download.

Streets run along the lines of a grid whose rows and columns are unevenly spaced, with some streets taken away and some
diagonals added; the graph stays connected. The streets at a crossing differ in their compass words, so that "turn north"
names one of them. Routes are kept only if, at every turn, the relative word ("slightly left") names one street as well:
whoever follows the instruction word by word arrives, in either action space.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from amft_fast.tasks.virl.routes import Leg, Place, Route, difference, direction_of, heading_between, side_of, turn_of

LANDMARKS = (
    *("bakery", "bank", "barber", "bookshop", "brewery", "cafe", "chapel", "cinema", "clinic", "diner", "embassy"),
    *("florist", "fountain", "garage", "gallery", "hotel", "kiosk", "laundry", "library", "market", "museum", "park"),
    *("pharmacy", "playground", "school", "stadium", "statue", "station", "tavern", "temple", "theatre", "tower"),
)
LANDMARK_SHARE = 0.85  # of crossings that have one
MAX_TRIES = 2000

Node = tuple[int, int]  # (column, row)


@dataclass(frozen=True)
class City:
    """A street graph. `streets` lists for each node its neighbours; `landmarks` names the one that stands at a node."""

    name: str
    places: dict[Node, Place]
    streets: dict[Node, tuple[Node, ...]]
    landmarks: dict[Node, tuple[str, Place]]

    def exits(self, node: Node) -> tuple[float, ...]:
        """Headings of the streets that leave a node."""
        return tuple(heading_between(self.places[node], self.places[n]) for n in self.streets[node])

    def is_plain(self, node: Node) -> bool:
        """Whether the street just runs on straight here: no place to turn."""
        ways = self.streets[node]
        # Diagonals are not quite straight on an uneven grid: where two of them meet there is a bend.
        return len(ways) == 2 and any(a == b == c for a, b, c in zip(*ways, node))

    def walk(self, node: Node, towards: Node) -> Node:
        """Straight on from `node` through `towards` to the next place to turn."""
        while self.is_plain(towards):
            node, towards = towards, (2 * towards[0] - node[0], 2 * towards[1] - node[1])
        return towards


def build_city(name: str, size: int = 10, block: float = 80.0, keep: float = 0.7, diagonals: float = 0.15) -> City:
    """A city of size × size crossings, which hangs on its name alone.

    `keep` is the share of grid streets kept, `diagonals` the share of blocks with a diagonal street.
    """
    rng = random.Random(f"city/{name}/{size}/{block}/{keep}/{diagonals}")
    lines = [[i * block + rng.uniform(-0.25, 0.25) * block for i in range(size)] for _ in "xy"]
    nodes = [(c, r) for c in range(size) for r in range(size)]
    places = {(c, r): (lines[0][c], lines[1][r]) for c, r in nodes}
    grid = [((c, r), (c + dc, r + dr)) for c, r in nodes for dc, dr in ((1, 0), (0, 1)) if (c + dc, r + dr) in places]
    rng.shuffle(grid)
    chosen = _spanning_tree(nodes, grid)
    chosen += [edge for edge in grid if edge not in set(chosen) and rng.random() < keep]
    for c, r in nodes:
        if (c + 1, r + 1) in places and rng.random() < diagonals:
            chosen.append(((c, r), (c + 1, r + 1)) if rng.random() < 0.5 else ((c + 1, r), (c, r + 1)))
    streets: dict[Node, list[Node]] = {node: [] for node in nodes}
    for a, b in chosen:
        streets[a].append(b)
        streets[b].append(a)
    city = City(name, places, {n: tuple(sorted(ways)) for n, ways in streets.items()}, {})
    for node in nodes:
        if rng.random() < LANDMARK_SHARE and not city.is_plain(node):
            city.landmarks[node] = (rng.choice(LANDMARKS), _free_corner(city, node, rng, block / 4))
    return city


def _spanning_tree(nodes: list[Node], edges: list[tuple[Node, Node]]) -> list[tuple[Node, Node]]:
    """Edges that connect all nodes, taken greedily in their order."""
    root = {node: node for node in nodes}

    def find(node: Node) -> Node:
        while root[node] != node:
            node = root[node]
        return node

    tree = []
    for a, b in edges:
        if find(a) != find(b):
            root[find(a)] = find(b)
            tree.append((a, b))
    return tree


def _free_corner(city: City, node: Node, rng: random.Random, reach: float) -> Place:
    """A place beside a crossing that no street runs through."""
    x, y = city.places[node]
    corners = [(x + reach * dx, y + reach * dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1) if (dx, dy) != (0, 0)]
    exits = city.exits(node)
    free = [c for c in corners if all(abs(difference(heading_between((x, y), c), e)) > 25 for e in exits)]
    return rng.choice(free or corners)


def draw_route(
    city: City, legs: int, rng: random.Random, spacing: float = 35.0
) -> tuple[Route, tuple[Node, ...]] | None:
    """A random route of so many legs with a point every `spacing` metres or so, and its nodes.

    None if the walk ran into a dead end or a word with two meanings.
    """
    node = rng.choice(list(city.places))
    heading = float(rng.randrange(360))
    start, start_heading, path, made = node, heading, [node], []
    named: set[str] = set()
    for i in range(legs):
        ways = [w for w in city.streets[node] if _is_named(city, node, heading, w, at_start=i == 0)]
        if not ways:
            return None
        end = city.walk(node, rng.choice(ways))
        landmark, at = city.landmarks.get(end, ("", (0.0, 0.0)))
        if end in path or city.is_plain(end) or landmark in named or (i + 1 == legs and not landmark):
            return None
        heading = heading_between(city.places[node], city.places[end])
        forwards = max(1, round(math.dist(city.places[node], city.places[end]) / spacing) - 1)
        side = side_of(heading, heading_between(city.places[end], at)) if landmark else ""
        made.append(Leg(heading, direction_of(heading), city.places[end], landmark, side, forwards, city.exits(end)))
        named |= {landmark} - {""}
        path.append(end)
        node = end
    return Route(city.places[start], start_heading, tuple(made), city.exits(start)), tuple(path)


def _is_named(city: City, node: Node, heading: float, way: Node, at_start: bool) -> bool:
    """Whether taking `way` is a turn that both its compass word and its relative word single out."""
    exits = city.exits(node)
    wanted = heading_between(city.places[node], city.places[way])
    # Behind lies the street one has come along: no turn leads back, so it cannot be meant.
    ahead = [e for e in exits if at_start or abs(difference(heading, e)) < 170]
    turned = abs(difference(heading, wanted))
    return (
        wanted in ahead
        and 20 < turned < 170
        and sum(turn_of(heading, e) == turn_of(heading, wanted) for e in ahead) == 1
        and sum(direction_of(e) == direction_of(wanted) for e in exits) == 1
    )


def draw_routes(city: City, legs: tuple[int, int], seed: int, spacing: float = 35.0) -> Iterator[tuple[Route, str]]:
    """Routes of a city without end, no path twice, each with a key that names its path.

    Raises ValueError when a great many draws in a row gave no new one: the city is then used up, or too small.
    """
    rng = random.Random(f"routes/{city.name}/{seed}")
    seen: set[str] = set()
    misses = 0
    while misses < MAX_TRIES:
        found = draw_route(city, rng.randint(*legs), rng, spacing)
        key = "-".join(f"{c}.{r}" for c, r in found[1]) if found else ""
        if found is None or key in seen:
            misses += 1
            continue
        seen.add(key)
        misses = 0
        yield found[0], key
    raise ValueError(f"city {city.name!r} has no more than {len(seen)} routes of {legs[0]} to {legs[1]} legs")
