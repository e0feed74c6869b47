"""V-IRL routes in the layout they were published in, read without trusting it; `python -m amft_fast.tasks.virl.data FOLDER`
checks a folder and writes its one pickle again as JSON.

    route_infos.json         [[route, ...], count]; of a route are read: start_place.relocated_geocode, init_heading,
                             milestone_info (a text of blocks `{"landmarks": ..., "to_next_intersection_heading":
                             "177 (south)"}`, one a leg), route_results.geocode_list (the end of each leg)
    gps_pano_mapping.pkl     a pickled {(latitude, longitude): panorama id}; a .json of that name written by the command
                             above is preferred
    street_views/            <panorama id>.jpg, equirectangular, with <panorama id>.metadata.json beside it, whose
                             `rotation` is the heading of its left edge, counted backwards from north. Needed for views only

A pickle can run code when it is loaded, so this one is not loaded: pickles.py reads numbers, texts, tuples and one dict out of
it and refuses all else. Panorama ids become file names and are held to letters, digits, - and _.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from amft_fast.errors import shown
from amft_fast.tasks.general_points.hands import draw
from amft_fast.tasks.virl.pickles import MAX_BYTES, read_pairs
from amft_fast.tasks.virl.routes import DIRECTIONS, Leg, Place, Point, Route

ROUTES, MAPPING, VIEWS = "route_infos.json", "gps_pano_mapping", "street_views"
METRES_PER_DEGREE = 111_320.0  # of latitude
MAX_PANORAMA_METRES = 50.0

_PANO_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_HEADING = re.compile(r"\s*(-?\d{1,6}(?:\.\d{1,15})?)\s*\(([a-z]+)\)\s*")


# -------------------------------------------------------------------------------------------------------------- routes


def load_routes(folder: Path, leg_points: int = 2) -> list[tuple[str, Route]]:
    """(key, route) of every route of a folder; a key is the route's number. `leg_points` points lie on each leg.

    Raises ValueError naming the file, the route and the field that is missing or wrong.
    """
    path = folder / ROUTES
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}; it is part of the published layout") from None
    except RecursionError:
        raise ValueError(f"{path} is JSON nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"{path} is not JSON: {e}") from None
    if not isinstance(found, list) or len(found) != 2 or not isinstance(found[0], list):
        raise ValueError(f"{path} must hold a pair [list of routes, count], got {_kind(found)}")
    out = []
    for i, info in enumerate(found[0]):
        try:
            out.append((str(i), _route(info, leg_points, init=draw("init heading", folder.name, i))))
        except ValueError as e:
            raise ValueError(f"{path}, route {i}: {e}") from None
    return out


def _route(info: Any, leg_points: int, init: float) -> Route:
    start = _geocode(_field(info, "start_place.relocated_geocode"), "start_place.relocated_geocode")
    ends = _field(info, "route_results.geocode_list")
    if not isinstance(ends, list) or not ends:
        raise ValueError(f"route_results.geocode_list must be a list of places, got {_kind(ends)}")
    text = _field(info, "milestone_info")
    if not isinstance(text, str):
        raise ValueError(f"milestone_info must be a text, got {_kind(text)}")
    milestones = parse_milestones(text)
    if len(milestones) != len(ends):
        raise ValueError(f"milestone_info has {len(milestones)} blocks for {len(ends)} places in geocode_list")
    legs = []
    for k, (milestone, end) in enumerate(zip(milestones, ends)):
        heading = _HEADING.fullmatch(milestone.get("to_next_intersection_heading", ""))
        if heading is None or heading[2] not in DIRECTIONS:
            raise ValueError(
                f"milestone {k}: to_next_intersection_heading must be like '177 (south)', "
                f"got {shown(milestone.get('to_next_intersection_heading'))}"
            )
        place = to_metres(_geocode(end, f"geocode_list[{k}]"), start)
        legs.append(Leg(float(heading[1]) % 360, heading[2], place, *_sight(milestone), leg_points))
    # The published environment draws the heading at the start where it is 0 or missing; here it hangs on the route.
    given = info.get("init_heading") or 0
    if isinstance(given, bool) or not isinstance(given, int | float) or not -1e6 <= given <= 1e6:
        raise ValueError(f"init_heading must be a number of degrees, got {shown(given)}")
    return Route((0.0, 0.0), float(given) % 360 if given else float(int(init * 360)), tuple(legs), origin=start)


def parse_milestones(text: str) -> list[dict[str, str]]:
    """The blocks of a milestone_info. It looks like JSON, but has commas before closing braces and bare quotes in names."""
    blocks: list[dict[str, str]] = []
    for line in text.splitlines():
        line = line.strip().rstrip(",")
        if line.startswith("{"):
            blocks.append({})
            line = line[1:].strip()
        key, colon, value = line.removesuffix("}").rstrip(" ,").partition(":")
        if colon and blocks:
            blocks[-1][key.strip(" \"'")] = value.strip().removeprefix('"').removesuffix('"').strip()
    return blocks


def _sight(milestone: dict[str, str]) -> tuple[str, str]:
    """(landmark, side) of "Bakery is on your left"."""
    text = milestone.get("landmarks", "")
    if text.lower().startswith("no landmark"):
        return "", ""
    name, found, side = text.rpartition(" is on your ")
    return (name, side) if found else (text, "")


def _field(info: Any, path: str) -> Any:
    for name in path.split("."):
        if not isinstance(info, dict) or name not in info:
            raise ValueError(f"{path} is missing")
        info = info[name]
    return info


def _geocode(value: Any, name: str) -> tuple[float, float]:
    pair = isinstance(value, list | tuple) and len(value) == 2
    numbers = pair and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
    if not numbers or not (-90 <= value[0] <= 90 and -360 <= value[1] <= 360):
        raise ValueError(f"{name} must be (latitude, longitude), got {shown(value)}, which is no place in degrees")
    return float(value[0]), float(value[1])


def _kind(value: Any) -> str:
    return f"{type(value).__name__} of length {len(value)}" if hasattr(value, "__len__") else type(value).__name__


def to_metres(geocode: tuple[float, float], origin: tuple[float, float]) -> Place:
    """(east, north) in metres of a geocode near `origin`."""
    north = (geocode[0] - origin[0]) * METRES_PER_DEGREE
    return (geocode[1] - origin[1]) * METRES_PER_DEGREE * math.cos(math.radians(origin[0])), north


def to_geocode(place: Place, origin: tuple[float, float]) -> tuple[float, float]:
    """The inverse of `to_metres`."""
    east = METRES_PER_DEGREE * math.cos(math.radians(origin[0]))
    return origin[0] + place[1] / METRES_PER_DEGREE, origin[1] + place[0] / east


# ------------------------------------------------------------------------------------------------------------- mapping


def load_mapping(folder: Path) -> dict[tuple[float, float], str]:
    """{(latitude, longitude): panorama id} from the JSON file if there is one, else from the pickle.

    Raises ValueError for a pickle that holds anything but plain data, and for data of another form.
    """
    path = folder / f"{MAPPING}.json"
    try:
        if path.exists():
            rows = json.loads(path.read_text(encoding="utf-8"))
            pairs = [((row[0], row[1]), row[2]) for row in rows]
        else:
            path = folder / f"{MAPPING}.pkl"
            with path.open("rb") as file:
                pairs = read_pairs(file.read(MAX_BYTES + 1))
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}") from None
    except Exception as e:  # what broken data make a reader raise may be anything
        why = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise ValueError(
            f"{path} is refused, as it is not a plain mapping from places to panorama ids: {why}"
        ) from None
    out = {}
    for key, pano in pairs:
        if not isinstance(pano, str) or not _PANO_ID.fullmatch(pano):
            raise ValueError(f"{path}: a panorama id may hold letters, digits, - and _, got {shown(pano)}")
        try:
            out[_geocode(key, "a place")] = pano
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
    if not out:
        raise ValueError(f"{path} holds no places")
    return out


def save_mapping(folder: Path, mapping: dict[tuple[float, float], str]) -> Path:
    """Writes a mapping as JSON rows [latitude, longitude, panorama id], which `load_mapping` prefers."""
    path = folder / f"{MAPPING}.json"
    path.write_text(json.dumps([[*place, pano] for place, pano in mapping.items()]))
    return path


# --------------------------------------------------------------------------------------------------------------- views


class Panoramas:
    """The street views of a folder: for a point of a rail, the four views of the nearest panorama."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / VIEWS
        mapping = load_mapping(folder)
        self.places = np.array(list(mapping), np.float64)  # [M, 2]
        self.ids = list(mapping.values())

    def views(self, route: Route, point: Point, size: int):
        """Front, right, back and left as one PIL picture of 2 × 2 views of `size` pixels.

        Raises ValueError when there is no panorama within 50 m, or its files are missing.
        """
        from PIL import Image

        from amft_fast.tasks.virl.views import grid_of

        image, rotation = self._panorama(self._nearest(to_geocode(point.place, route.origin)))
        panes = [perspective(image, point.heading + 90 * k + rotation, size) for k in range(4)]
        return grid_of([Image.fromarray(pane) for pane in panes])

    def _nearest(self, geocode: tuple[float, float]) -> str:
        away = (self.places - geocode) * METRES_PER_DEGREE
        away[:, 1] *= math.cos(math.radians(geocode[0]))
        metres = np.hypot(*away.T)
        at = int(metres.argmin())
        if metres[at] > MAX_PANORAMA_METRES:
            raise ValueError(f"no panorama within {MAX_PANORAMA_METRES:.0f} m of {geocode}: {metres[at]:.0f} m away")
        return self.ids[at]

    @lru_cache(maxsize=64)  # noqa: B019 lives as long as its task
    def _panorama(self, pano: str) -> tuple[np.ndarray, float]:
        from PIL import Image

        try:
            with Image.open(self.folder / f"{pano}.jpg") as image:
                pixels = np.asarray(image.convert("RGB"))
            rotation = float(json.loads((self.folder / f"{pano}.metadata.json").read_text())["rotation"])
            if not math.isfinite(rotation):
                raise ValueError(f"rotation must be a number of degrees, got {rotation}")
        except Image.DecompressionBombError as e:
            raise ValueError(f"panorama {pano} in {self.folder}: {e}") from None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
            raise ValueError(f"panorama {pano} in {self.folder}: {type(e).__name__}: {e}") from None
        return pixels, rotation


def perspective(pixels: np.ndarray, angle: float, size: int) -> np.ndarray:
    """A level view of 90 degrees, [size, size, 3], out of an equirectangular picture [H, W, 3].

    `angle` is that of the view's middle, degrees to the right of the picture's left edge.
    """
    across = np.linspace(-1, 1, size)
    x, y = np.meshgrid(across, across)
    longitude = np.degrees(np.arctan(x)) + angle
    latitude = np.degrees(np.arctan(y / np.hypot(x, 1)))
    height, width = pixels.shape[:2]
    column = np.floor(longitude % 360 / 360 * width).astype(np.int64) % width
    row = np.clip((latitude / 180 + 0.5) * height, 0, height - 1).astype(np.int64)
    return pixels[row, column]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m amft_fast.tasks.virl.data",
        description="Checks a V-IRL folder in the published layout and writes its pickle again as JSON.",
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    try:
        routes, mapping = load_routes(folder), load_mapping(folder)
        path = save_mapping(folder, mapping)
    except (ValueError, OSError) as e:
        print(f"virl_data: {e}", file=sys.stderr)
        return 2
    legs = [len(route.legs) for _, route in routes]
    print(f"{len(routes)} routes of {min(legs, default=0)} to {max(legs, default=0)} legs; {len(mapping)} panoramas")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
