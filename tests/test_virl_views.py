"""The drawn views of V-IRL and the map of an episode."""

from xml.etree import ElementTree

import numpy as np
import pytest

from amft_fast.config import VirlConfig
from amft_fast.interfaces import Sample
from amft_fast.tasks.virl.city import LANDMARKS
from amft_fast.tasks.virl.routes import SIDES, Point
from amft_fast.tasks.virl.task import HELD_IN_LOOKS, OTHER_LOOKS, Virl
from amft_fast.tasks.virl.views import LINE, LOOKS, drawn_views


@pytest.fixture(scope="module")
def task():
    return Virl(VirlConfig(views=True, view_size=64, num_train=20, num_val=8, num_test=8, cities=2))


def point(landmark="", side="", exits=(0.0,), heading=0.0):
    return Point((10.0, 20.0), heading, "turn", 1, True, landmark, side, "north", "left", exits)


def panes(image, size=64):
    pixels = np.asarray(image)
    starts = [(0, 0), (0, size + LINE), (size + LINE, 0), (size + LINE, size + LINE)]
    return [pixels[r : r + size, c : c + size] for r, c in starts]


def test_views_are_the_same_each_time():
    first = drawn_views(point("bakery", "left"), "brick-0-0", 64)
    drawn_views.cache_clear()
    again = drawn_views(point("bakery", "left"), "brick-0-0", 64)
    assert first is not again and np.array_equal(np.asarray(first), np.asarray(again))
    assert first.size == (2 * 64 + LINE, 2 * 64 + LINE)


def test_every_landmark_side_and_city_gives_a_picture_of_its_own():
    names = [drawn_views(point(name, "left"), "brick-0-0", 64).tobytes() for name in LANDMARKS]
    sides = [drawn_views(point("bakery", side), "brick-0-0", 64).tobytes() for side in SIDES]
    cities = [drawn_views(point("bakery", "left"), f"{look}-0-0", 64).tobytes() for look in LOOKS]
    for pictures in (names, sides, cities):
        assert len(set(pictures)) == len(pictures)


def test_a_landmark_shows_in_the_view_of_its_side_alone():
    without = panes(drawn_views(point(), "stone-0-0", 64))
    for side, where in (("front", 0), ("right", 1), ("right behind", 1), ("behind", 2), ("left", 3), ("left front", 3)):
        with_board = panes(drawn_views(point("tower", side), "stone-0-0", 64))
        assert [not np.array_equal(a, b) for a, b in zip(without, with_board)] == [k == where for k in range(4)]


def test_a_street_and_a_house_front_look_different():
    road = np.array(LOOKS["brick"].road)
    open_left = panes(drawn_views(point(exits=(270.0,)), "brick-0-0", 64))
    shows_road = [(pane[-3, 32] == road).all() for pane in open_left]
    assert shows_road == [False, False, False, True]  # front, right, back, left


def test_looks_of_other_cities_are_not_those_of_training(task):
    assert set(LOOKS) == {*HELD_IN_LOOKS, *OTHER_LOOKS} and not set(HELD_IN_LOOKS) & set(OTHER_LOOKS)
    for split, looks in (("train", HELD_IN_LOOKS), ("test", HELD_IN_LOOKS), ("visual_ood", OTHER_LOOKS)):
        assert {i.data.city.partition("-")[0] for i in task.prompts(split)} <= set(looks)
    assert len(task.prompts("visual_ood")) == len(task.prompts("test"))


def test_pictures_come_with_the_prompt_and_with_every_new_point(task):
    item = task.prompts("test")[0]
    demo = next(d for d in task.demos("test") if d.id == item.id)
    assert [len(m.images) for m in (*demo.messages, *(m for m, _ in demo.more))] == [1] * len(item.data.points)
    opening = task.start(item).messages[0].content
    assert "four views" in opening and opening.endswith("O_1: You observe an image of 4 views")
    seen = [m.content for m, _ in demo.more]
    assert any(text.endswith("4 views; You observe an intersection") for text in seen)
    assert not any("is on your" in text for text in seen)


def test_without_views_no_picture_is_drawn():
    words = Virl(VirlConfig(num_train=3, num_val=3, num_test=3, cities=1))
    assert "visual_ood" not in words.splits
    assert words.start(words.prompts("train")[0]).messages[0].images == ()


def test_the_map_shows_what_was_done(task):
    item = task.prompts("train")[0]
    n = len(item.data.points)
    trace = [(0, "wrong_action", "south"), (0, "correct", "north"), (1, "illegal", ""), (1, "wrong_action", "stop")]
    sample = Sample([], [], [], [], 0, "stop", item.id, 0, info={"trace": tuple(trace)})
    tree = ElementTree.fromstring(task.picture(item, sample))
    circles = [e.get("fill") for e in tree.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(circles) == n and len(set(circles[:3])) == 3 and set(circles[2:]) == {circles[2]}
    texts = {e.text for e in tree.iter("{http://www.w3.org/2000/svg}text")}
    assert texts == {leg.landmark for leg in item.data.route.legs} - {""}
    empty = Sample([], [], [], [], 0, "stop", item.id, 0)
    assert "<svg" in task.picture(item, empty)
