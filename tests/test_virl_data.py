"""The published layout of V-IRL: a folder made here in its form, what is wrong with others, and pickles that bite."""

import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amft_fast.config import VirlConfig
from amft_fast.errors import UserError
from amft_fast.tasks.virl.data import (
    Panoramas,
    load_mapping,
    load_routes,
    main,
    parse_milestones,
    perspective,
    to_geocode,
    to_metres,
)
from amft_fast.tasks.virl.routes import rail, sentences
from amft_fast.tasks.virl.task import Virl

START = (40.75, -73.98)
MILESTONES = """
{
"intersection_idx": "1",
"landmarks": "Joe's "Best" Pizza is on your left",
"distance": "80 meters",
"human_heading": "0",
"to_next_intersection_heading": "29 (northeast)",
}

{
"intersection_idx": "2",
"landmarks": "No landmark nearby",
"distance": "120 meters",
"human_heading": "29",
"to_next_intersection_heading": "299 (northwest)",
}

{
"intersection_idx": "3",
"landmarks": "The destination Plaza: Hotel is on your right front",
"distance": "60 meters",
"human_heading": "299",
"to_next_intersection_heading": "29 (northeast)",
}
"""


def ahead(place, heading, metres):
    turn = math.radians(heading)
    return place[0] + metres * math.sin(turn), place[1] + metres * math.cos(turn)


def route_info(init_heading=15):
    places = [(0.0, 0.0)]
    for heading, metres in ((29, 80), (299, 120), (29, 60)):
        places.append(ahead(places[-1], heading, metres))
    return {
        "start_place": {"relocated_geocode": list(START)},
        "dest_place": {"name": "Plaza: Hotel"},
        "init_heading": init_heading,
        "milestone_info": MILESTONES,
        "route_results": {
            "geocode_list": [list(to_geocode(p, START)) for p in places[1:]],
            "landmark_list": [{"name": "Joe's"}, None],
        },
    }


@pytest.fixture
def folder(tmp_path):
    """A small folder in the published form: 12 routes, panoramas every 20 m along them, painted by compass quarter."""
    infos = [route_info(init_heading=h) for h in range(10, 130, 10)]
    (tmp_path / "route_infos.json").write_text(json.dumps([infos, len(infos)]))
    (tmp_path / "street_views").mkdir()
    mapping = {}
    route = load_routes(tmp_path)[0][1]
    for i, point in enumerate(rail(route)):
        mapping[to_geocode(point.place, route.origin)] = f"pano_{i}"
        # Left edge of the picture at heading -90 (rotation 90): then north is a quarter in, east at half ...
        pixels = np.zeros((90, 360, 3), np.uint8)
        for quarter, colour in enumerate([(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]):  # N, E, S, W
            middle = (90 + 90 * quarter) % 360
            columns = np.arange(middle - 45, middle + 45) % 360
            pixels[:, columns] = colour
        Image.fromarray(pixels).save(tmp_path / "street_views" / f"pano_{i}.jpg", quality=95)
        (tmp_path / "street_views" / f"pano_{i}.metadata.json").write_text('{"rotation": 90.0}')
    (tmp_path / "gps_pano_mapping.pkl").write_bytes(pickle.dumps(mapping))
    return tmp_path


def test_a_published_route_becomes_a_rail(folder):
    (key, route), *_ = load_routes(folder, leg_points=2)
    assert key == "0" and route.heading == 10 and route.origin == START
    assert [leg.direction for leg in route.legs] == ["northeast", "northwest", "northeast"]
    assert [leg.landmark for leg in route.legs] == ['Joe\'s "Best" Pizza', "", "The destination Plaza: Hotel"]
    assert sentences(route) == [
        "First, turn slightly right to face northeast.",
        'Move forward until you reach next intersection where Joe\'s "Best" Pizza is on your left.',
        "Turn left to face northwest.",
        "Move forward until you reach next intersection.",
        "Turn right to face northeast.",
        "Move forward until you reach destination where The destination Plaza: Hotel is on your right front.",
    ]
    points = rail(route)
    assert [p.action for p in points] == [*["turn", "forward", "forward"] * 3, "stop"]
    assert points[3].place == pytest.approx(ahead((0, 0), 29, 80), abs=0.01)
    assert all(to_metres(to_geocode(p.place, START), START) == pytest.approx(p.place, abs=1e-6) for p in points)


def test_a_heading_of_0_is_drawn_once_and_for_all(tmp_path):
    (tmp_path / "route_infos.json").write_text(json.dumps([[route_info(0), route_info(0)], 2]))
    first, second = (route.heading for _, route in load_routes(tmp_path))
    assert (first, second) == tuple(route.heading for _, route in load_routes(tmp_path))
    assert first != second and 0 <= first < 360


def test_milestones_in_other_hands():
    one_line = '{"landmarks": "A is on your left", \n"to_next_intersection_heading": "177 (south)"}'
    assert parse_milestones(one_line) == [
        {"landmarks": "A is on your left", "to_next_intersection_heading": "177 (south)"}
    ]
    assert parse_milestones("") == [] and parse_milestones("nonsense: here\n}") == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.pop("start_place"), "route 1: start_place.relocated_geocode is missing"),
        (lambda r: r.update(start_place={"relocated_geocode": [1, "x"]}), r"must be \(latitude, longitude\), got"),
        (lambda r: r.update(milestone_info=5), "milestone_info must be a text, got int"),
        (
            lambda r: r.update(milestone_info=MILESTONES.replace("29 (northeast)", "29 (up)", 1)),
            "milestone 0: .*'29 .up.'",
        ),
        (lambda r: r["route_results"]["geocode_list"].pop(), "3 blocks for 2 places"),
        (lambda r: r["route_results"].update(geocode_list={}), "must be a list of places"),
        (lambda r: r.update(init_heading="north"), "init_heading must be a number"),
    ],
)
def test_what_is_wrong_with_a_route_is_said_with_its_place(tmp_path, change, said):
    infos = [route_info(), route_info()]
    change(infos[1])
    (tmp_path / "route_infos.json").write_text(json.dumps([infos, 2]))
    with pytest.raises(ValueError, match=said) as e:
        load_routes(tmp_path)
    assert "route_infos.json, route 1: " in str(e.value)


@pytest.mark.parametrize(("text", "said"), [("[1", "not JSON"), ("{}", "pair"), ("[[], 1, 2]", "pair")])
def test_a_routes_file_of_another_form_is_refused(tmp_path, text, said):
    (tmp_path / "route_infos.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        load_routes(tmp_path)


# -------------------------------------------------------------------------------------------------------------- pickles


class Bite:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def hostile(marker: Path):
    command = f"touch {marker}"
    yield pickle.dumps(Bite(os.system, command))
    yield pickle.dumps({(1.0, 2.0): Bite(os.system, command)})
    yield pickle.dumps({(1.0, 2.0): Bite(eval, f"open({str(marker)!r}, 'w')")}, protocol=0)
    yield pickle.dumps({(1.0, 2.0): Bite(getattr, "", "__class__")}, protocol=4)
    yield pickle.dumps({np.float64(1.0): "a"})  # harmless, but no plain data
    yield f"cos\nsystem\n(S'{command}'\ntR.".encode()
    yield f"(S'{command}'\nios\nsystem\n.".encode()  # opcode INST
    yield b"\x82\x01."  # opcode EXT1
    yield b"Pid\n."  # opcode PERSID
    yield b"not a pickle"
    yield b""


def test_hostile_pickles_are_refused_and_run_nothing(tmp_path):
    marker = tmp_path / "bitten"
    for data in hostile(marker):
        (tmp_path / "gps_pano_mapping.pkl").write_bytes(data)
        with pytest.raises(ValueError, match=r"gps_pano_mapping\.pkl is refused"):
            load_mapping(tmp_path)
        assert not marker.exists()


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({(1.0, 2.0): "../../etc/passwd"}, "panorama id may hold letters"),
        ({(1.0, 2.0): 7}, "panorama id may hold letters"),
        ({(1.0,): "a"}, "latitude"),
        ({(float("nan"), 1.0): "a"}, "latitude"),
        ({}, "holds no places"),
        ([1, 2], "is refused"),
    ],
)
def test_plain_pickles_of_another_form_are_refused(tmp_path, mapping, said):
    (tmp_path / "gps_pano_mapping.pkl").write_bytes(pickle.dumps(mapping))
    with pytest.raises(ValueError, match=said):
        load_mapping(tmp_path)


def test_the_converter_writes_json_that_is_then_preferred(folder, capsys):
    before = load_mapping(folder)
    assert main([str(folder)]) == 0
    assert "12 routes of 3 to 3 legs; 10 panoramas" in capsys.readouterr().out
    (folder / "gps_pano_mapping.pkl").write_bytes(b"no longer read")
    assert load_mapping(folder) == before
    assert main([str(folder / "nowhere")]) == 2
    assert "cannot be read" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- views


def test_a_panorama_is_looked_at_in_the_right_direction(folder):
    route = load_routes(folder)[0][1]
    north = rail(route)[1]
    view = Panoramas(folder).views(route, north.__class__(north.place, 0.0, "forward", 1), size=32)
    middle = {k: view.getpixel(((k % 2) * 36 + 16, (k // 2) * 36 + 16)) for k in range(4)}
    seen = {k: tuple(round(c / 200) for c in pixel) for k, pixel in middle.items()}
    assert seen == {0: (1, 0, 0), 1: (0, 1, 0), 2: (0, 0, 1), 3: (1, 1, 0)}  # front N, right E, back S, left W


def test_a_perspective_is_straight_ahead_in_the_middle_and_45_degrees_at_its_edges():
    columns = np.tile((np.arange(360) % 256).astype(np.uint8)[None, :, None], (180, 1, 3))
    view = perspective(columns, 100.0, 91)
    assert view[45, 45, 0] == 100 and abs(int(view[45, 0, 0]) - 55) <= 1 and abs(int(view[45, 90, 0]) - 145) <= 1


def test_missing_and_far_panoramas_are_named(folder):
    route = load_routes(folder)[0][1]
    point = rail(route)[0]
    views = Panoramas(folder)
    (folder / "street_views" / "pano_0.jpg").unlink()
    with pytest.raises(ValueError, match="panorama pano_0 in"):
        views.views(route, point, 16)
    with pytest.raises(ValueError, match="no panorama within 50 m"):
        views.views(route, point.__class__((0.0, 900.0), 0.0, "forward", 1), 16)


def test_the_task_runs_on_published_routes_with_pictures(folder):
    task = Virl(
        VirlConfig(data=str(folder), ood_data=str(folder), views=True, view_size=24, val_share=0.3, test_share=0.3)
    )
    assert task.splits == ("train", "val", "test", "ood", "visual_ood")
    assert sum(len(task.prompts(s)) for s in ("train", "val", "test")) == 12 == len(task.prompts("visual_ood"))
    episode = task.start(task.prompts("test")[0])
    (image,) = episode.messages[0].images
    assert image.size == (52, 52) and "Plaza" in episode.messages[0].content
    for path in (folder / "street_views").glob("*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match=r"task\.virl: panorama pano_[0-9] in "):
        Virl(VirlConfig(data=str(folder), views=True, view_size=24, val_share=0.3, test_share=0.3)).demos("train")[0]
