"""General Points: the verifier and the solver against each other and against independent checks; splits; episodes."""

import ast
import json
from collections import Counter
from fractions import Fraction
from itertools import combinations_with_replacement, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import lines_run

from amft_fast.config import GeneralPointsConfig
from amft_fast.interfaces import Message
from amft_fast.tasks.general_points.expressions import reachable, values
from amft_fast.tasks.general_points.hands import assign_split, hands
from amft_fast.tasks.general_points.task import GeneralPoints, read_answer, solve, verify_formula

KINDS = {"correct": 5, "partial": 1, "no_solution": -1, "wrong_number": -2, "illegal": -3}

cards = st.lists(st.integers(1, 13), min_size=2, max_size=4)
formula_like = st.text("0123456789+-*/()= ×÷−", max_size=40)


def value_and_numbers(formula):
    """An evaluation that shares nothing with the verifier: Python's own grammar, restricted to + - * / on integers."""
    numbers = []

    def walk(node):
        match node:
            case ast.Expression(body=body):
                return walk(body)
            case ast.Constant(value=int() as number):
                numbers.append(number)
                return Fraction(number)
            case ast.BinOp(left=left, op=op, right=right):
                a, b = walk(left), walk(right)
                match op:
                    case ast.Add():
                        return a + b
                    case ast.Sub():
                        return a - b
                    case ast.Mult():
                        return a * b
                    case ast.Div():
                        return a / b
        raise AssertionError(f"{ast.dump(node)} has no place in a formula")

    text = formula.translate(str.maketrans("×÷−", "*/-"))
    return walk(ast.parse(text.strip(), mode="eval")), numbers


@st.composite
def expressions(draw, numbers):
    """A legal formula over the numbers in their order, with brackets that may be superfluous."""
    if len(numbers) == 1:
        return str(numbers[0])
    cut = draw(st.integers(1, len(numbers) - 1))
    left, right = draw(expressions(numbers[:cut])), draw(expressions(numbers[cut:]))
    text = f"{left}{draw(st.sampled_from('+-*/'))}{right}"
    return f"({text})" if draw(st.booleans()) else text


@st.composite
def formulas(draw):
    numbers = draw(cards)
    return numbers, draw(expressions(draw(st.permutations(numbers))))


def brute_force(numbers):
    """All values of all binary trees over all orders."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    found = set()
    for order in set(permutations(numbers)):
        for cut in range(1, len(order)):
            for a in brute_force(order[:cut]):
                for b in brute_force(order[cut:]):
                    found |= {a + b, a - b, a * b} | ({a / b} if b else set())
    return found


# -------------------------------------------------------------------------------------------------------- the verifier


@pytest.mark.parametrize(
    ("formula", "kind"),
    [
        ("4*3+2+10=24", "correct"),
        (" ( 4 × 3 ) + 2 − ( 0 - 10 ) ", "wrong_number"),
        ("4×3+2+10", "correct"),
        ("4*3+2", "partial"),
        ("4", "partial"),
        ("10+2*3*4", "no_solution"),
        ("4*3+2+10=25", "no_solution"),
        ("4*3+2=24", "wrong_number"),
        ("4*3+2=14", "wrong_number"),
        ("4*3+4", "wrong_number"),
        ("4*3+12", "wrong_number"),
        ("4*3+2+", "illegal"),
        ("4*3+2+10=", "illegal"),
        ("4*(3+2", "illegal"),
        ("4/(3-3)", "illegal"),
        ("4*3+2+1 0", "illegal"),
        ("04*3+2+10", "illegal"),
        ("-4*3", "illegal"),
        ("", "illegal"),
    ],
)
def test_kinds_and_the_published_rewards(formula, kind):
    verdict = verify_formula(formula, [4, 3, 2, 10])
    assert (verdict.kind, verdict.reward) == (kind, KINDS[kind])


@given(formulas(), st.booleans())
@settings(deadline=None)
def test_a_legal_formula_is_judged_as_python_evaluates_it(hand_and_formula, tail):
    numbers, formula = hand_and_formula
    try:
        value, used = value_and_numbers(formula)
    except ZeroDivisionError:
        assert verify_formula(formula, numbers).kind == "illegal"
        return
    assert Counter(used) == Counter(numbers)
    verdict = verify_formula(formula, numbers, target=24)
    assert verdict.value == value
    assert verdict.kind == ("correct" if value == 24 else "no_solution")
    if value.denominator == 1:
        assert verify_formula(f"{formula} = {value}" if tail else formula, numbers, int(value)).kind == "correct"
        assert verify_formula(f"{formula}={value + 1}", numbers, int(value)).kind == "no_solution"


@given(st.one_of(formula_like, st.text(max_size=60)), cards, st.integers(0, 40))
@settings(max_examples=300, deadline=None)
def test_whatever_is_accepted_as_correct_is_so(formula, numbers, target):
    verdict = verify_formula(formula, numbers, target)
    assert verdict.kind in KINDS
    if verdict.kind == "correct":
        value, used = value_and_numbers(formula.split("=")[0])
        assert value == target and Counter(used) == Counter(numbers)


@pytest.mark.parametrize(
    "formula",
    [
        "(" * 10_000,
        "(" * 10_000 + "4" + ")" * 10_000,
        "(" * 100 + "4" + ")" * 100,
        "9" * 100_000,
        "9**9**9**9",
        "4*3+2+10" + "*1" * 50_000,
        "999999*" * 36 + "1",
        "1/0",
        "4*3+2+10/(1-1)",
        "__import__('os').system('true')",
        "４*３+２+１０",
        "٤*3+2+10",
        "4*3+2+²",
        "4*3+2+10\x00",
        "4*3+2+10\u2028",
        "4*3+2+10;0",
        "4*3+2+1e1",
        "4*3+2+0xA",
        "4*3+2+10==24",
        "24",
        "=24",
        "\ud800",
        None,
        24,
        b"4*3+2+10",
        ["4*3+2+10"],
    ],
    ids=lambda formula: repr(formula)[:24].encode("ascii", "replace").decode(),
)
def test_hostile_formulas_are_refused_at_once(formula):
    """Some 7 lines of the parser for each of the 256 characters that are read, on numbers of few digits."""
    assert verify_formula(formula, [4, 3, 2, 10]).kind in {"illegal", "wrong_number"}
    assert lines_run(lambda: verify_formula(formula, [4, 3, 2, 10])) < 20 * 256


def test_the_caller_s_own_mistakes_are_named():
    with pytest.raises(ValueError, match="numbers"):
        verify_formula("4", ["4"])
    with pytest.raises(ValueError, match="target"):
        verify_formula("4", [4], target=24.0)


@given(st.lists(st.integers(1, 10), min_size=2, max_size=3), st.integers(0, 30), st.data())
@settings(max_examples=60, deadline=None)
def test_partial_means_that_something_can_be_put_behind(numbers, target, data):
    order = data.draw(st.permutations(numbers))
    kept = data.draw(st.integers(1, len(order) - 1))
    prefix = data.draw(expressions(order[:kept]))
    verdict = verify_formula(prefix, numbers, target)
    if verdict.kind == "illegal":
        return
    endings = endings_of(order[kept:])
    extended = [prefix + ending for ending in endings]
    assert (verdict.kind == "partial") == any(verify_formula(f, numbers, target).kind == "correct" for f in extended)


def endings_of(rest):
    """All that can follow a formula to use up one or two more numbers, superfluous brackets left out."""
    if len(rest) == 1:
        return [f"{op}{rest[0]}" for op in "+-*/"]
    found = []
    for a, b in permutations(rest):
        for op in "+-*/":
            found += [f"{op}{a}{second}{b}" for second in "+-*/"] + [f"{op}({a}{second}{b})" for second in "+-*/"]
    return found


# ---------------------------------------------------------------------------------------------------------- the solver


@given(st.lists(st.integers(0, 13), min_size=1, max_size=4), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_solver_finds_what_brute_force_finds(numbers, target):
    found = solve(numbers, target)
    assert bool(found) == (target in brute_force(tuple(numbers)))
    assert found == solve(numbers[::-1], target)
    assert len(set(found)) == len(found)
    for formula in found:
        assert value_and_numbers(formula)[0] == target
        assert verify_formula(formula, numbers, target).kind == "correct"


def test_solver_lists_each_solution_once_and_knows_the_famous_hands():
    assert solve([1, 3, 4, 6]) == ["6/(1-3/4)"]
    assert solve([3, 3, 8, 8]) == ["8/(3-8/3)"]
    assert solve([1, 5, 1, 7]) == ["(1+1)*(5+7)", "(5-1)*(7-1)"]
    assert solve([1, 1, 1, 1]) == []
    # Known counts of hands of four that make 24: 566 of 715 with values to 10, 1362 of 1820 with values to 13.
    task = GeneralPoints(GeneralPointsConfig(val_share=0, test_share=0, ood_share=1))
    assert task.describe()["train"]["hands"] == 566
    assert task.describe()["ood"]["hands"] == 1362 - 566


def test_solver_counts_every_value_of_three_numbers():
    for numbers in [(2, 3, 7), (1, 4, 9), (3, 3, 5)]:
        for target in range(60):
            assert bool(solve(list(numbers), target)) == (target in brute_force(numbers))


def test_solver_manages_six_numbers_and_no_more():
    found = solve([1, 2, 3, 4, 5, 6])
    assert len(found) > 1000
    assert all(verify_formula(formula, [6, 5, 4, 3, 2, 1]).kind == "correct" for formula in found[::25])
    with pytest.raises(ValueError, match="numbers"):
        solve([1] * 7)
    with pytest.raises(ValueError, match="target"):
        solve([1, 2], -1)


# ---------------------------------------------------------------------------------------------------------- the splits


@pytest.fixture(scope="module")
def demo_task():
    return GeneralPoints(
        GeneralPointsConfig(
            num_cards=3, targets=(1, 40), answer_format="formula", max_turns=3, reward_scale="published"
        )
    )


@pytest.fixture(scope="module")
def task_24():
    return GeneralPoints()


@pytest.mark.parametrize("name", ["demo_task", "task_24"])
def test_splits_share_no_hand_and_every_problem_is_solvable(name, request):
    task = request.getfixturevalue(name)
    seen = {split: {tuple(sorted(item.data.values)) for item in task.prompts(split)} for split in task.splits}
    assert all(seen.values())
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))
    ids = [item.id for split in task.splits for item in task.prompts(split)]
    assert len(set(ids)) == len(ids)
    for split in task.splits:
        for item in task.prompts(split)[::7]:
            assert solve(list(item.data.values), item.data.target)
            assert (item.data.rule == "11-12-13") == (split == "ood")
            assert split != "ood" or any(card in ("J", "Q", "K") for card in item.data.cards)


def test_splits_do_not_move():
    known = {(4, 7, 10): "train", (10, 4, 7): "train", (1, 1, 2): "val", (1, 1, 3): "test", (11, 2, 3): "ood_train"}
    assert {hand: assign_split(hand) for hand in known} == known
    whole = GeneralPoints(GeneralPointsConfig(num_cards=3, targets=(1, 40)))
    part = GeneralPoints(
        GeneralPointsConfig(num_cards=3, targets=(1, 40), max_train=50, max_val=10, max_test=20, max_ood=30)
    )
    for split, size in {"train": 50, "val": 10, "test": 20, "ood": 30}.items():
        assert part.prompts(split) == whole.prompts(split)[:size]
    other = GeneralPoints(GeneralPointsConfig(num_cards=3, targets=(1, 40), seed=1))
    assert {i.data.values for i in other.prompts("test")} != {i.data.values for i in whole.prompts("test")}


def test_face_cards_count_what_the_rule_says(demo_task):
    faces = Counter()
    for split in demo_task.splits:
        for item in demo_task.prompts(split):
            counts = {"A": 1, **({"J": 11, "Q": 12, "K": 13} if split == "ood" else dict.fromkeys("JQK", 10))}
            assert item.data.values == tuple(counts.get(card) or int(card) for card in item.data.cards)
            faces.update(card for card in item.data.cards if split != "ood" and counts.get(card, card) in (10, "10"))
    assert len(faces) == 4 and max(faces.values()) < 2 * min(faces.values())


def test_there_is_no_hand_twice():
    for rule, total in {"10": 220, "11-12-13": 455 - 220}.items():
        found = list(hands(3, rule))
        assert len(found) == len(set(found)) == total
    assert set(hands(3)) == set(combinations_with_replacement(range(1, 11), 3))


@pytest.mark.parametrize("answer_format", ["json", "formula"])
def test_demos_are_correct_answers(answer_format):
    task = GeneralPoints(
        GeneralPointsConfig(
            num_cards=3, targets=(10, 20), answer_format=answer_format, demo_share=0.5, reward_scale="published"
        )
    )
    by_id = {item.id: item for split in task.splits for item in task.prompts(split)}
    shapes = Counter()
    for split in task.splits:
        for demo in task.demos(split):
            assert demo.messages == task.start(by_id[demo.id]).messages
            result = task.start(by_id[demo.id]).step(demo.response)
            assert result.done and result.info["kind"] == "correct" and result.info["success"] and result.reward == 5
            formulas = solve(list(by_id[demo.id].data.values), by_id[demo.id].data.target)
            shapes[len(formulas) > 1 and formulas[0] in demo.response.replace(" ", "")] += 1
    hands_with = {tuple(sorted(by_id[demo.id].data.values)) for demo in task.demos("train")}
    hands_all = {tuple(sorted(item.data.values)) for item in task.prompts("train")}
    assert 0.3 < len(hands_with) / len(hands_all) < 0.7
    assert len(task.demos("val")) == len(task.prompts("val"))
    assert shapes[True] and shapes[False]


# -------------------------------------------------------------------------------------------------------- the episodes


def item_of(task, cards):
    return next(i for split in task.splits for i in task.prompts(split) if sorted(i.data.cards) == sorted(cards))


def test_an_episode_goes_on_until_it_is_right(demo_task):
    item = next(i for i in demo_task.prompts("train") if len(set(i.data.values)) == 3)
    episode = demo_task.start(item)
    words = episode.messages[0].content.split()
    assert words == [*item.data.cards, "faces", "10", "target", str(item.data.target)]

    first = episode.step("not a formula")
    assert (first.message, first.reward, first.done) == (Message("user", "wrong formula again"), -3, False)
    second = episode.step(" + ".join(map(str, [*item.data.values, 1])))
    assert second.message.content == "wrong numbers again" and not second.info["success"]
    third = episode.step(f"{solve(list(item.data.values), item.data.target)[0]} = {item.data.target}")
    assert third.message is None and third.done and third.info["kind"] == "correct" and third.info["success"]
    with pytest.raises(RuntimeError, match="ended"):
        episode.step("1")


def test_an_episode_ends_with_its_turns(demo_task):
    episode = demo_task.start(demo_task.prompts("test")[0])
    results = [episode.step("(") for _ in range(3)]
    assert [r.done for r in results] == [False, False, True]
    assert results[-1].message is None and not results[-1].info["success"]


def test_feedback_names_the_value(demo_task):
    item = next(i for i in demo_task.prompts("train") if i.data.target == 2 and min(i.data.values) > 2)
    a, b, c = item.data.values
    result = demo_task.start(item).step(f"{a} * {b} * {c}")
    assert result.message.content == f"wrong value {a * b * c} again"
    fraction = Fraction(a, b) - c
    result = demo_task.start(item).step(f"{a} / {b} - {c}")
    assert result.message.content.replace(" ", "") == f"wrongvalue{fraction}again"


def test_json_answers():
    task = GeneralPoints(GeneralPointsConfig(target=24, max_turns=2))
    item = next(i for i in task.prompts("train") if "J" in i.data.cards)
    formula = solve(list(item.data.values))[0]
    answer = {"cards": list(item.data.cards), "number": list(item.data.values), "formula": formula + "=24"}

    def kind(text):
        return task.start(item).step(text).info["kind"]

    assert kind(json.dumps(answer)) == "correct"
    assert kind(f"Let me think {{ ... }}\n```json\n{json.dumps(answer, indent=2)}\n```\nDone.") == "correct"
    assert kind(json.dumps({**answer, "formula": "1+"}) + "\nNo: " + json.dumps(answer)) == "correct"
    assert kind(json.dumps(answer) + " or " + json.dumps({**answer, "formula": "1+"})) == "illegal"
    assert kind(json.dumps({**answer, "number": [str(n) for n in item.data.values[::-1]]})) == "correct"
    assert kind(json.dumps({**answer, "number": [11, *item.data.values[1:]]})) == "wrong_number"
    assert kind(json.dumps({**answer, "number": None})) == "wrong_number"
    assert kind(json.dumps({**answer, "formula": 24})) == "illegal"
    assert kind(json.dumps(answer).replace("}", ",}")) == "correct"
    assert kind(formula) == "illegal"
    prompt = task.start(item).messages[0].content
    assert ", ".join(item.data.cards) in prompt and "each count 10" in prompt and "24" in prompt
    ood = task.start(task.prompts("ood")[0]).messages[0].content
    assert "J = 11, Q = 12 and K = 13" in ood
    feedback = task.start(item).step("I give up").message
    assert feedback.role == "user" and "no legal" in feedback.content


@pytest.mark.parametrize(
    "text", ["{" * 100_000, '{"a":' * 20_000, "[" * 100_000, '{"formula": ' + "9" * 5000, "}{", ""]
)
def test_hostile_json_is_refused_at_once(text):
    """The last 32 braces are tried, within the last 4096 characters."""
    assert read_answer(text) is None
    assert lines_run(lambda: read_answer(text)) < 10 * 32


@given(st.text(max_size=200))
@settings(deadline=None)
def test_any_text_gets_a_step(text):
    task = GeneralPoints(GeneralPointsConfig(num_cards=2, targets=(1, 20), max_turns=1))
    assert task.start(task.prompts("train")[0]).step(text).done


@pytest.mark.parametrize(("scale", "expected"), [("published", (5, 1)), ("shaped", (1, 0.2)), ("binary", (1, 0))])
def test_reward_scales(scale, expected):
    task = GeneralPoints(GeneralPointsConfig(num_cards=3, targets=(1, 40), answer_format="formula", reward_scale=scale))
    item = next(i for i in task.prompts("train") if any(f"{i.data.values[0]}+" in f for f in solved(i)))
    right = next(f for f in solved(item) if f"{item.data.values[0]}+" in f)
    rewards = tuple(task.start(item).step(text).reward for text in (right, str(item.data.values[0])))
    assert rewards == pytest.approx(expected)


def solved(item):
    return [f for f in solve(list(item.data.values), item.data.target) if f.startswith(str(item.data.values[0]))]


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_cards": 1},
        {"num_cards": 7},
        {"num_cards": 3.5},
        {"target": -1},
        {"targets": (5, 1)},
        {"targets": (1, 2, 3)},
        {"targets": "12"},
        {"answer_format": "xml"},
        {"reward_scale": "none"},
        {"max_turns": 0},
        {"seed": -1},
        {"test_share": 1.5},
        {"val_share": 0.5, "test_share": 0.5},
        {"ood_share": "half"},
        {"demo_share": -0.1},
        {"max_test": 0},
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        GeneralPoints(GeneralPointsConfig(**arguments))
    with pytest.raises(ValueError, match="split"):
        GeneralPoints(GeneralPointsConfig(num_cards=2)).prompts("dev")


def test_making_a_task_evaluates_each_set_of_numbers_once():
    """Of 13 numbers there are 13 + 91 + 455 sets of up to 3; of the 1820 hands of 4 some 17 sub-hands are asked each."""
    values.cache_clear(), reachable.cache_clear()
    GeneralPoints(GeneralPointsConfig(num_cards=3, targets=(1, 40))).prompts("train")
    GeneralPoints().prompts("train")
    assert values.cache_info().misses <= 13 + 91 + 455
    assert reachable.cache_info().misses < 20 * 1820
