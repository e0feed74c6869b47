"""Routes through streets, and the rail that an episode runs on. Shared by both sources of V-IRL (virl_city, virl_data).

A route is a start with a heading and one leg after another, each ending where the next turn is made or at the destination.
Its instruction has two numbered sentences a leg: "Turn right to face northeast." and "Move forward until you reach next
intersection where X is on your left.". The rail is the row of points at which the policy is asked: one `turn` at the start
of each leg, `forwards` points along it, and one `stop` at the destination. Sentences, rail and the words for turns follow
the environment of arXiv 2501.17161, with two differences: a relative turn is taken from the difference of headings brought
into [-180, 180) (there 350 to 10 degrees is "left"), and points on a leg are evenly spaced between its ends.

Places are (east, north) in metres, headings degrees clockwise from north.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DIRECTIONS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
TURNS = ("left", "right", "slightly left", "slightly right")
SIDES = ("front", "right front", "right", "right behind", "behind", "left behind", "left", "left front")
ACTION_SPACES = {"absolute": DIRECTIONS, "relative": TURNS}

Place = tuple[float, float]


@dataclass(frozen=True)
class Leg:
    """One straight part of a route.

    `heading` leads to `end`, `direction` is its compass word. On arrival `landmark` is on the `side` ("" for both: none).
    `forwards` points lie between the ends. `exits` are headings of the streets that leave `end`, where known.
    """

    heading: float
    direction: str
    end: Place
    landmark: str = ""
    side: str = ""
    forwards: int = 1
    exits: tuple[float, ...] = ()


@dataclass(frozen=True)
class Route:
    """A route. `heading` is the one at the start; `origin` is (latitude, longitude) of (0, 0), for places on the globe."""

    start: Place
    heading: float
    legs: tuple[Leg, ...]
    exits: tuple[float, ...] = ()
    origin: tuple[float, float] | None = None


@dataclass(frozen=True)
class Point:
    """One point of the rail: where the policy stands, what it sees, what it must do.

    `action` is turn, forward or stop; a turn has its compass word in `direction` and its relative one in `turn`.
    `sentence` counts the instruction's sentences from 1.
    """

    place: Place
    heading: float
    action: str
    sentence: int
    crossing: bool = False
    landmark: str = ""
    side: str = ""
    direction: str = ""
    turn: str = ""
    exits: tuple[float, ...] = ()

    def target(self, space: str) -> str:
        """The word of a turn in an action space; empty for other actions."""
        return {"absolute": self.direction, "relative": self.turn}[space]


def heading_between(a: Place, b: Place) -> float:
    """Degrees in [0, 360)."""
    return math.degrees(math.atan2(b[0] - a[0], b[1] - a[1])) % 360


def difference(before: float, after: float) -> float:
    """The turn from one heading to another, degrees in [-180, 180), positive to the right."""
    return (after - before + 180) % 360 - 180


def direction_of(heading: float) -> str:
    """The nearest of the eight compass words."""
    return DIRECTIONS[round(heading / 45) % 8]


def turn_of(before: float, after: float) -> str:
    """The relative word of a turn: up to 45 degrees are "slightly"."""
    angle = difference(before, after)
    word = "right" if angle > 0 else "left"
    return f"slightly {word}" if abs(angle) <= 45 else word


def side_of(heading: float, towards: float) -> str:
    """On which of eight sides something lies that is seen in the direction `towards`."""
    return SIDES[round(difference(heading, towards) % 360 / 45) % 8]


def rail(route: Route) -> tuple[Point, ...]:
    """All points of a route, in order."""
    points: list[Point] = []
    here, heading, exits = route.start, route.heading, route.exits
    landmark = side = ""
    for i, leg in enumerate(route.legs):
        turn = turn_of(heading, leg.heading)
        points.append(
            Point(here, heading, "turn", 2 * i + 1, i > 0, landmark, side, leg.direction, turn, exits or (leg.heading,))
        )
        for k in range(1, leg.forwards + 1):
            t = k / (leg.forwards + 1)
            place = tuple(a + t * (b - a) for a, b in zip(here, leg.end))
            along = (leg.heading, (leg.heading + 180) % 360)
            points.append(Point(place, leg.heading, "forward", 2 * i + 2, exits=along))
        here, heading, landmark, side, exits = leg.end, leg.heading, leg.landmark, leg.side, leg.exits
    points.append(
        Point(here, heading, "stop", 2 * len(route.legs), False, landmark, side, exits=exits or (heading + 180,))
    )
    return tuple(points)


def sight(landmark: str, side: str, destination: bool = False) -> str:
    """ "Bakery is on your left", "The destination Bank is on your right"; empty without a landmark."""
    if not landmark:
        return ""
    name = f"The destination {landmark}" if destination and not landmark.startswith("The destination") else landmark
    return f"{name} is on your {side}" if side else name


def sentences(route: Route) -> list[str]:
    """The instruction, two sentences a leg."""
    out, heading = [], route.heading
    for i, leg in enumerate(route.legs):
        last = i + 1 == len(route.legs)
        out.append(f"{'First, turn' if i == 0 else 'Turn'} {turn_of(heading, leg.heading)} to face {leg.direction}.")
        where = sight(leg.landmark, leg.side, last)
        goal = "destination" if last else "next intersection"
        out.append(f"Move forward until you reach {goal}{f' where {where}' if where else ''}.")
        heading = leg.heading
    return out
