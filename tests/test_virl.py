"""V-IRL: the rail against hand-worked routes, rewards row by row, episodes, splits, and the generator's promises."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amft_fast.cli import eval_table
from amft_fast.config import VirlConfig
from amft_fast.interfaces import Message
from amft_fast.tasks.virl.city import build_city, draw_routes
from amft_fast.tasks.virl.routes import (
    DIRECTIONS,
    Leg,
    Route,
    difference,
    direction_of,
    heading_between,
    rail,
    sentences,
    side_of,
    turn_of,
)
from amft_fast.tasks.virl.task import REWARDS, Problem, Virl, judge
from amft_fast.tasks.virl.words import answer_text, observation_text, read_answer

# From (0, 0) facing east: north for 80 m to a bakery, slightly right to the northeast, then right to the destination.
ROUTE = Route(
    (0.0, 0.0),
    90.0,
    (
        Leg(0.0, "north", (0.0, 80.0), "bakery", "left", 2),
        Leg(40.0, "northeast", (60.0, 150.0), "", "", 0),
        Leg(135.0, "southeast", (120.0, 90.0), "bank", "right front", 1),
    ),
)


@pytest.fixture(scope="module")
def task():
    return Virl(VirlConfig(num_train=60, num_val=12, num_test=20, cities=2))


@pytest.fixture(scope="module")
def compact():
    return Virl(VirlConfig(answer_format="compact", num_train=60, num_val=12, num_test=20, cities=2))


# --------------------------------------------------------------------------------------------------------- routes, rails


def test_the_rail_of_a_route_worked_by_hand():
    points = rail(ROUTE)
    assert [p.action for p in points] == ["turn", "forward", "forward", "turn", "turn", "forward", "stop"]
    assert [p.sentence for p in points] == [1, 2, 2, 3, 5, 6, 6]
    places = [(0, 0), (0, 80 / 3), (0, 160 / 3), (0, 80), (60, 150), (90, 120), (120, 90)]
    assert all(p.place == pytest.approx(place) for p, place in zip(points, places, strict=True))
    assert [p.heading for p in points] == [90, 0, 0, 0, 40, 135, 135]
    assert [p.crossing for p in points] == [False, False, False, True, True, False, False]
    assert [p.direction for p in points if p.action == "turn"] == ["north", "northeast", "southeast"]
    assert [p.turn for p in points if p.action == "turn"] == ["left", "slightly right", "right"]
    assert [(p.landmark, p.side) for p in points if p.landmark] == [("bakery", "left"), ("bank", "right front")]


def test_the_instruction_of_a_route_worked_by_hand():
    assert sentences(ROUTE) == [
        "First, turn left to face north.",
        "Move forward until you reach next intersection where bakery is on your left.",
        "Turn slightly right to face northeast.",
        "Move forward until you reach next intersection.",
        "Turn right to face southeast.",
        "Move forward until you reach destination where The destination bank is on your right front.",
    ]


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        (0, 46, "right"),
        (0, 45, "slightly right"),
        (0, 1, "slightly right"),
        (0, 0, "slightly left"),
        (0, 359, "slightly left"),
        (0, 315, "slightly left"),
        (0, 314, "left"),
        (350, 10, "slightly right"),  # across north, where a plain difference says left
        (10, 350, "slightly left"),
        (270, 0, "right"),
        (90, 269, "right"),
        (90, 270, "left"),
    ],
)
def test_relative_words(before, after, word):
    assert turn_of(before, after) == word


@given(st.floats(0, 360), st.floats(-1e6, 1e6))
def test_differences_and_compass_words_do_not_break_at_north(heading, turn):
    assert -180 <= difference(heading, heading + turn) < 180
    assert direction_of(heading) in DIRECTIONS
    nearest = 45 * DIRECTIONS.index(direction_of(heading))
    assert abs(difference(nearest, heading)) <= 22.5 + 1e-9


def test_sides():
    assert [side_of(90, 90 + a) for a in (0, 44, 90, 180, 270, 337)] == [
        *("front", "right front", "right", "behind", "left", "left front")
    ]


# ------------------------------------------------------------------------------------------------------ cities and routes


@pytest.mark.parametrize("name", ["brick-0-0", "night-7-1"])
def test_cities_are_connected_and_their_streets_have_names(name):
    city = build_city(name)
    assert city == build_city(name)
    reached, todo = set(), [(0, 0)]
    while todo:
        node = todo.pop()
        if node not in reached:
            reached.add(node)
            todo += city.streets[node]
    assert reached == set(city.places)
    for node in city.places:
        words = [direction_of(e) for e in city.exits(node)]
        assert len(set(words)) == len(words)
        assert all(node in city.streets[n] for n in city.streets[node])


def follow(city, route, space):
    """Walks a city by the words of the instruction alone, with eyes for crossings only; returns the places of the turns."""
    names = {place: node for node, place in city.places.items()}
    place, heading, places = route.start, route.heading, [route.start]
    for sentence in sentences(route)[::2]:
        word = re.search({"absolute": r"face (\w+)\.", "relative": r"urn ((?:slightly )?\w+) to"}[space], sentence)[1]
        exits = [e for e in city.exits(names[place]) if len(places) == 1 or abs(difference(heading, e)) < 170]
        named = [e for e in exits if word == (direction_of(e) if space == "absolute" else turn_of(heading, e))]
        assert len(named) == 1
        node = names[place]
        towards = next(n for n in city.streets[node] if heading_between(place, city.places[n]) == named[0])
        while len(city.streets[towards]) == 2:
            onward = next(n for n in city.streets[towards] if n != node)
            if abs(difference(named[0], heading_between(city.places[towards], city.places[onward]))) > 1:
                break
            node, towards = towards, onward
        place, heading = city.places[towards], named[0]
        places.append(place)
    return places


def test_every_route_can_be_walked_by_its_words_and_both_action_spaces_agree():
    city = build_city("stone-3-0")
    for (route, key), _ in zip(draw_routes(city, (2, 5), seed=3), range(150)):
        ends = [route.start, *(leg.end for leg in route.legs)]
        assert follow(city, route, "absolute") == follow(city, route, "relative") == ends
        nodes = [tuple(map(int, n.split("."))) for n in key.split("-")]
        assert [city.places[n] for n in nodes] == ends and len(set(nodes)) == len(nodes)
        assert route.legs[-1].landmark
        assert all(leg.forwards >= 1 for leg in route.legs)


def test_a_city_that_is_used_up_says_so():
    with pytest.raises(ValueError, match=r"no more than \d+ routes of 3 to 3 legs: ask for fewer"):
        Virl(VirlConfig(legs=(3, 3), num_train=100_000, cities=1))


# -------------------------------------------------------------------------------------------------------- rewards, answers


def said(observation, instruction, action):
    return json.dumps({"current observation": observation, "current instruction": instruction, "action": action})


CROSSING, STREET = "No landmarks nearby; You observe an intersection", "No landmarks nearby; "
TURN, FORWARD = "Turn slightly right to face northeast.", "Move forward until you reach next intersection."


@pytest.mark.parametrize(
    ("at", "text", "kind"),
    [
        # At point 3, a crossing: the right action is turn_direction(northeast), by sentence 3.
        (3, said(CROSSING, TURN, "turn_direction(northeast)"), "correct"),
        (3, said(STREET, FORWARD, "turn_direction(northeast)"), "correct"),
        (3, said(CROSSING, TURN, " Turn_direction( 'northeast' ) "), "correct"),
        (3, said(CROSSING, TURN, "turn_direction(east)"), "wrong_action"),
        (3, said(CROSSING, "3. turn SLIGHTLY right to face northeast", "forward()"), "wrong_action"),
        (3, said(CROSSING, "3", "forward()"), "wrong_action"),
        (3, said(CROSSING, FORWARD, "forward()"), "wrong_instruction"),
        (3, said(CROSSING, "", "stop()"), "wrong_instruction"),
        (3, said(STREET, TURN, "forward()"), "wrong_observation"),
        (3, said("I am not at an intersection", TURN, "forward()"), "wrong_observation"),
        (3, said(STREET, FORWARD, "forward()"), "wrong_observation"),
        # At point 1, on the way along the first leg: forward(), by sentence 2.
        (1, said(STREET, "2", "forward()"), "correct"),
        (1, said(CROSSING, "2", "turn_direction(north)"), "wrong_observation"),
        (1, said(STREET, "3", "turn_direction(north)"), "wrong_instruction"),
        (1, said(STREET, "2", "stop()"), "wrong_action"),
        # At the destination.
        (6, said("The destination bank is on your right front", "6", "stop()"), "correct"),
        (6, said(STREET, "6", "forward()"), "wrong_action"),
        # What cannot be read, or names no action of this space.
        (3, "turn_direction(northeast)", "illegal"),
        (3, said(CROSSING, TURN, "turn_direction(slightly right)"), "illegal"),
        (3, said(CROSSING, TURN, "turn_direction(northeast); stop()"), "illegal"),
        (3, '{"action": "forward()"}', "illegal"),
        (3, said(CROSSING, TURN, None), "illegal"),
        (3, "", "illegal"),
        (3, "{" * 5000, "illegal"),
    ],
)
def test_rewards_row_by_row(at, text, kind):
    problem = Problem(ROUTE, "absolute", "brick-0-0")
    assert judge(problem, problem.points[at], text, "json")[0] == kind


def test_the_reward_table_is_the_published_one():
    assert REWARDS["correct"] == 1 and REWARDS["wrong_action"] == -1
    assert REWARDS["wrong_observation"] == -1.5 and REWARDS["wrong_instruction"] == -1.75
    assert min(REWARDS.values()) == REWARDS["illegal"]  # silence must not pay


@pytest.mark.parametrize(
    ("at", "space", "text", "kind"),
    [
        (3, "absolute", "cross 3 turn northeast", "correct"),
        (3, "relative", "cross 3 turn slightly right", "correct"),
        (3, "relative", "street 9 turn slightly right", "correct"),
        (3, "relative", "cross 3 turn right", "wrong_action"),
        (3, "absolute", "street 3 forward", "wrong_observation"),
        (3, "absolute", "cross 4 forward", "wrong_instruction"),
        (1, "absolute", " street  2 forward\n", "correct"),
        (6, "absolute", "street 6 stop", "correct"),
    ],
)
def test_compact_answers_row_by_row(at, space, text, kind):
    problem = Problem(ROUTE, space, "brick-0-0")
    assert judge(problem, problem.points[at], text, "compact")[0] == kind


@pytest.mark.parametrize(
    ("at", "space", "text"),
    [
        (3, "relative", "cross 3 turn northeast"),
        (3, "absolute", "cross 3 turn slightly right"),
        (6, "absolute", "street 6"),
        (6, "absolute", "street 6 stop stop"),
        (6, "absolute", "street ６ stop"),
    ],
)
def test_compact_answers_that_cannot_be_read_or_name_no_action_of_the_space(at, space, text):
    problem = Problem(ROUTE, space, "brick-0-0")
    assert judge(problem, problem.points[at], text, "compact")[0] == "illegal"


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=100), st.sampled_from(["json", "compact"]), st.sampled_from(["absolute", "relative"]))
def test_no_text_breaks_the_reader(text, answer_format, space):
    assert read_answer(text, space, answer_format) is None or "{" in text or answer_format == "compact"


@pytest.mark.parametrize("gap", [1, 250, 256, 5000])
def test_nothing_may_stand_behind_a_compact_answer_however_far(gap):
    problem = Problem(ROUTE, "absolute", "brick-0-0")
    right = answer_text(ROUTE, problem.points[0], "absolute", "compact")
    assert judge(problem, problem.points[0], right + " " * 20, "compact")[0] == "correct"
    for more in ("stop", "x", "street 1 turn south", "\0"):
        assert judge(problem, problem.points[0], right + " " * gap + more, "compact")[0] == "illegal"


def test_the_last_of_several_answers_counts_and_talk_around_it_does_not():
    first, last = said(STREET, "2", "stop()"), said(STREET, "2", "forward()")
    problem = Problem(ROUTE, "absolute", "brick-0-0")
    assert judge(problem, problem.points[1], f"Hm. {first} No: {last[:-1]},\n}} so.", "json") == ("correct", "forward")


# ------------------------------------------------------------------------------------------------------------- episodes


def right_answers(task, problem):
    return [answer_text(problem.route, p, problem.space, task.answer_format) for p in problem.points]


@pytest.mark.parametrize("split", ["train", "test", "ood"])
@pytest.mark.parametrize("which", ["task", "compact"])
def test_the_right_answers_walk_to_the_end(which, split, request):
    task = request.getfixturevalue(which)
    for item in task.prompts(split):
        episode = task.start(item)
        answers = right_answers(task, item.data)
        results = [episode.step(answer) for answer in answers]
        assert [r.reward for r in results] == [1.0] * len(answers)
        assert [r.done for r in results] == [False] * (len(answers) - 1) + [True]
        assert results[-1].info["success"] and not any(r.info["success"] for r in results[:-1])
        assert results[-1].info["step_accuracy"] == results[-1].info["first_try"] == 1.0
        assert all(r.message.role == "user" for r in results[:-1]) and results[-1].message is None
        assert len(answers) * task.verify_turns <= task.max_turns


def test_a_wrong_answer_is_told_and_a_second_passes_the_point_over(task):
    item = task.prompts("train")[0]
    answers, episode = right_answers(task, item.data), task.start(item)
    wrong = said(STREET, "1", "stop()")
    told = episode.step(wrong)
    assert told.reward == -1 and told.message.content.startswith("That is not the right action.") and not told.done
    assert told.info == {**told.info, "kind": "wrong_action", "state": "0/0", "step_accuracy": 0.0, "first_try": 0.0}
    passed = episode.step(wrong)
    assert passed.message.content.startswith("Wrong again: you are taken on") and "\nO_2: " in passed.message.content
    rest = [episode.step(answer) for answer in answers[1:]]
    assert rest[0].info["state"] == "1/0" and rest[-1].done and not rest[-1].info["success"]
    n = len(answers)
    assert rest[-1].info["step_accuracy"] == (n - 1) / (n + 1) and rest[-1].info["first_try"] == (n - 1) / n
    assert [kind for _, kind, _ in rest[-1].info["trace"]][:3] == ["wrong_action", "wrong_action", "correct"]
    with pytest.raises(RuntimeError, match="ended"):
        episode.step(wrong)


def test_a_second_try_saves_the_walk(compact):
    item = compact.prompts("test")[1]
    episode = compact.start(item)
    messages = [episode.step("street 1 stop").message.content]
    results = [episode.step(answer) for answer in right_answers(compact, item.data)]
    assert messages == ["wrong action again"] and results[-1].info["success"]
    assert results[-1].info["first_try"] < 1 and results[0].message.content == "street nothing"


@pytest.mark.parametrize(
    ("scale", "first", "total"), [("published", -1.0, -1.0), ("shaped", -1.0, -1.0), ("binary", 0, 0)]
)
def test_reward_scales(scale, first, total):
    task = Virl(VirlConfig(reward_scale=scale, verify_turns=1, num_train=3, num_val=3, num_test=3, cities=1))
    item = task.prompts("train")[0]
    answers = right_answers(task, item.data)
    n = len(answers)
    share = n if scale == "shaped" else 1
    good = task.start(item)
    rewards = [good.step(answer).reward for answer in answers]
    assert sum(rewards) == pytest.approx(1.0 if scale != "published" else n)
    bad = task.start(item)
    rewards = [bad.step(said(STREET, "1", "stop()") if i == 0 else answer).reward for i, answer in enumerate(answers)]
    assert rewards[0] == first / share and sum(rewards) == pytest.approx(0 if scale == "binary" else (n - 2) / share)
    assert total <= 0


def test_demos_are_whole_walks_that_the_verifier_approves(task, compact):
    for t in (task, compact):
        demos, items = t.demos("train"), {i.id: i for i in t.prompts("train")}
        assert len(demos) == 60
        for demo in demos[:20]:
            episode = t.start(items[demo.id])
            assert tuple(episode.messages) == demo.messages
            result = episode.step(demo.response)
            for message, answer in demo.more:
                assert result.message == message
                result = episode.step(answer)
            assert result.done and result.info["success"]


def test_prompts_say_the_action_space_the_instruction_and_what_is_seen(task, compact):
    item = task.prompts("test")[0]
    text = task.start(item).messages[0].content
    assert all(f"{i}. {s}" in text for i, s in enumerate(sentences(item.data.route), 1))
    assert "northwest" in text and text.endswith("O_1: No landmarks nearby")
    other = task.start(task.prompts("ood")[0]).messages[0].content
    assert "one of left, right, slightly left, slightly right." in other
    problem = Problem(ROUTE, "relative", "brick-0-0")
    assert compact.start(task.prompts("ood")[0]).messages[0].content.startswith("relative 1 turn ")
    assert compact._opening(problem) == (
        Message(
            "user",
            "relative 1 turn left north 2 to bakery left 3 turn slightly right northeast 4 to nothing "
            "5 turn right southeast 6 to goal bank right front street nothing",
        ),
    )
    assert [observation_text(p, "compact") for p in problem.points][3:] == [
        *("cross bakery left", "cross nothing", "street nothing", "street goal bank right front")
    ]


# --------------------------------------------------------------------------------------------------------------- splits


def test_splits_share_no_path_and_ood_differs_from_test_in_the_rule_alone(task):
    ids = {split: [i.id for i in task.prompts(split)] for split in task.splits}
    assert [len(ids[s]) for s in ("train", "val", "test", "ood")] == [60, 12, 20, 20]
    for a, b in pairwise(["train", "val", "test"]):
        assert not set(ids[a]) & set(ids[b])
    assert ids["ood"] == [f"{i}/relative" for i in ids["test"]]
    for test, ood in zip(task.prompts("test"), task.prompts("ood")):
        assert test.data.route == ood.data.route and (test.data.space, ood.data.space) == ("absolute", "relative")


def test_items_are_the_same_each_time_and_growing_one_split_keeps_the_others_clean(task):
    again = Virl(VirlConfig(num_train=60, num_val=12, num_test=20, cities=2))
    assert all(task.prompts(s) == again.prompts(s) for s in task.splits)
    other = Virl(VirlConfig(num_train=60, num_val=12, num_test=20, cities=2, seed=1))
    assert not {i.id for i in task.prompts("train")} & {i.id for i in other.prompts("train")}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"answer_format": "xml"}, "answer_format\n.*'json' or 'compact'"),
        ({"reward_scale": "x"}, "reward_scale"),
        ({"legs": (3, 2)}, "legs must be"),
        ({"verify_turns": 0}, "verify_turns"),
        ({"ood_data": "x"}, "ood_data needs data"),
        ({"val_share": 0.5, "test_share": 0.5}, "val_share"),
        ({"data": "nowhere"}, "nowhere/route_infos.json cannot be read"),
    ],
)
def test_bad_settings_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        Virl(VirlConfig(**settings))


def test_eval_prints_what_the_task_reports():
    row = {"prompts": 3, "k": 8, "greedy": 0.5, "sampled": 0.25, "stderr": 0.01, "pass_at_k": 0.6, "reward": 1.0}
    table = eval_table({"test": row | {"step_accuracy": 0.91234}, "visual_ood": row}, 8).splitlines()
    assert table[0].split() == ["split", "prompts", "greedy", "sampled", "stderr", "pass@8", "step_accuracy"]
    assert table[1].split() == ["test", "3", "50.0%", "25.0%", "1.0%", "60.0%", "0.912"]
    assert table[2].split() == ["visual_ood", "3", "50.0%", "25.0%", "1.0%", "60.0%"]
    assert len({line.index("0%") for line in table[1:]}) == 1  # columns stand under each other
