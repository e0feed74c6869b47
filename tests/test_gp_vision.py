"""General Points with pictures: the cards are told apart, recognition is judged, the splits are what they say."""

import json
from hashlib import sha256
from itertools import combinations, product

import numpy as np
import pytest

from amft_fast.config import GeneralPointsConfig, TaskConfig
from amft_fast.run.build import make_task
from amft_fast.tasks.general_points.cards import BLACK_SUITS, RANKS, RED_SUITS, SUITS, card_image, table_image
from amft_fast.tasks.general_points.hands import Problem
from amft_fast.tasks.general_points.task import REWARDS, GeneralPoints
from amft_fast.tasks.general_points.vision import GeneralPointsVision, cards_right, read_cards

SMALL = {"num_cards": 3, "targets": (1, 40), "answer_format": "formula", "card_size": (16, 32), "card_margin": 0}
HAND = Problem(("J", "4", "7"), (10, 4, 7), 42, "10", ("spades", "clubs", "spades"))


@pytest.fixture(scope="module")
def small():
    return GeneralPointsVision(GeneralPointsConfig(**SMALL))


@pytest.fixture(scope="module")
def large():
    return GeneralPointsVision(GeneralPointsConfig(max_train=20, max_val=20, max_test=20, max_ood=20))


# ---------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("size", [(8, 16), (16, 24), (16, 32), (64, 96), (112, 160)])
def test_every_card_has_a_picture_of_its_own(size):
    drawn = {card: card_image(*card, size) for card in product(RANKS, SUITS)}
    assert len({image.tobytes() for image in drawn.values()}) == 52
    for a, b in combinations(RANKS, 2):  # ranks differ by more than a stray pixel, whatever the suit
        for suit in SUITS:
            one, other = drawn[a, suit].convert("L").tobytes(), drawn[b, suit].convert("L").tobytes()
            assert sum(x != y for x, y in zip(one, other)) >= 2


def test_colours_follow_the_suit():
    for rank, suit in product(RANKS, SUITS):
        pixels = np.asarray(card_image(rank, suit, (32, 48)))
        reddish = (pixels[..., 0] > 150) & (pixels[..., 1] < 80)
        assert reddish.any() == (suit in RED_SUITS)


def test_the_pixels_are_the_same_on_every_machine():
    cards = b"".join(card_image(r, s, (16, 32)).tobytes() for r, s in product(RANKS, SUITS))
    table = table_image(("A", "10", "K"), ("spades", "hearts", "clubs"), (112, 160), 12, "key").tobytes()
    assert sha256(cards).hexdigest() == CARDS_HASH and sha256(table).hexdigest() == TABLE_HASH


CARDS_HASH = "02793fa43a1f61b49fb21b67668e989ffc7f626cf4736f9a5e850f3175413ea3"
TABLE_HASH = "a2c9e85b32d9ed5efb0a9d102f356b6a27ebf1c591086da1d81fc787223628a6"


def test_cards_lie_where_the_key_says(large):
    lay = [table_image(("A", "K"), ("spades", "clubs"), (32, 48), 8, key).tobytes() for key in "aab"]
    assert lay[0] == lay[1] != lay[2]
    with pytest.raises(ValueError, match="rank"):
        card_image("1", "spades", (32, 48))
    with pytest.raises(ValueError, match="8 x 16"):
        card_image("A", "spades", (4, 48))
    problem = large.prompts("train")[0].data
    assert large.image(problem) is large.image(problem) and large.image(problem).size == (4 * 136, 184)


def test_the_report_shows_the_hand(small):
    item = small.prompts("train")[0]
    assert small.picture(item, None).size == (240, 160) and small.image(item.data).size == (48, 32)


# ---------------------------------------------------------------------------------------------------------------- answers


def test_cards_are_read_as_models_write_them():
    written = ["K", "q", 7, "10", "Ace of spades", "jack", "9♥", "2 of Clubs", "A♠"]
    assert read_cards(written) == ["K", "Q", "7", "10", "A", "J", "9", "2", "A"]
    assert read_cards(["1", "11", "joker", "", None, True, ["K"], "K of", "K" * 100]) == ["?"] * 9
    assert read_cards("J 4 7") == read_cards(None) == [] and len(read_cards(["A"] * 999)) == 16


def test_the_share_of_cards_right():
    assert cards_right(["7", "J", "4"], HAND.cards) == 1  # the order is not judged
    assert cards_right(["J", "4", "8"], HAND.cards) == pytest.approx(2 / 3)
    assert cards_right(["J", "4", "7", "7"], HAND.cards) == 3 / 4
    assert cards_right([], HAND.cards) == 0


def as_json(cards, number, formula) -> str:
    return "I see cards. " + json.dumps({"cards": cards, "number": number, "formula": formula})


TABLE = [  # cards, numbers, formula, kind: with J 4 7 and the target 42, J counts 10
    (["J", "4", "7"], [10, 4, 7], "(10-4)*7=42", "correct"),
    (["7", "J", "4"], [4, 7, 10], "7*(10-4)", "correct"),
    (["J", "4", "7"], [10, 4, 7], "(10-4)", "partial"),
    (["J", "4", "7"], [10, 4, 7], "10+4+7", "no_solution"),
    (["K", "4", "7"], [10, 4, 7], "(10-4)*7=42", "wrong_cards"),  # the formula would be right
    (["K", "4", "7"], [10, 4, 7], "10+4+7", "wrong_cards"),
    (["J", "4"], [10, 4, 7], "(10-4)*7", "wrong_cards"),
    (["J", "4", "8"], [10, 4, 8], "(10-4)*8", "wrong_cards"),  # before the numbers that follow from it
    (["J", "4", "7"], [11, 4, 7], "(11-4)*7", "wrong_number"),
    (["J", "4", "7"], [10, 4, 7], "(10-4)*7*7", "wrong_number"),
    (["J", "4", "7"], [10, 4, 7], "(10-4)*7; import os", "illegal"),
    (["K", "4", "7"], [10, 4, 7], "(10-4)*", "illegal"),  # nothing legal: the worst is blamed
]


@pytest.mark.parametrize(("cards", "number", "formula", "kind"), TABLE)
def test_reward_table(small, large, cards, number, formula, kind):
    verdict, figures = large.judge(HAND, as_json(cards, number, formula))
    assert verdict.kind == kind
    share = cards_right(cards, HAND.cards)
    assert figures == {"recognition": float(share == 1), "cards_right": share, "answer": figures["answer"]}
    verdict, figures = small.judge(HAND, f"{' '.join(cards)} formula {formula}")
    assert verdict.kind == kind and figures["cards_right"] == share


def test_rewards_are_the_published_ones(large):
    published = GeneralPointsVision(GeneralPointsConfig(reward_scale="published", max_train=2))
    worth = {
        "correct": 5, "partial": 1, "no_solution": -1, "wrong_cards": -1.5, "wrong_number": -2, "illegal": -3
    }  # fmt: skip
    assert worth == REWARDS
    for cards, number, formula, kind in TABLE:
        verdict, _ = published.judge(HAND, as_json(cards, number, formula))
        assert published.reward(verdict) == worth[kind]


@pytest.mark.parametrize(
    "text", ["", "{}", "no json", '{"formula": 3}', '{"cards": ["J", "4", "7"]}', "J 4 7", "formula"]
)
def test_what_cannot_be_read_is_illegal(small, large, text):
    for task in (small, large):
        verdict, figures = task.judge(HAND, text)
        assert verdict.kind == "illegal" and 0 <= figures["recognition"] <= 1


def test_an_episode_reports_recognition_and_says_what_was_wrong(small):
    task = GeneralPointsVision(GeneralPointsConfig(**SMALL, max_turns=2, reward_scale="published"))
    episode = task.start(next(i for i in task.prompts("train")))
    told = episode.step("A A A formula 1 + 1")
    assert told.message.content == "wrong cards again" and told.reward == -1.5 and told.info["recognition"] == 0.0
    assert not told.message.images
    assert episode.step("").done


# ---------------------------------------------------------------------------------------------------------------- the task


@pytest.mark.parametrize("answer_format", ["json", "formula"])
def test_demos_are_correct_and_prompts_do_not_name_the_cards(answer_format):
    task = GeneralPointsVision(
        GeneralPointsConfig(**{**SMALL, "answer_format": answer_format}, max_train=40, max_test=40, max_ood=40)
    )
    items = {i.id: i for split in task.splits for i in task.prompts(split)}
    for split in ("train", "test", "ood", "visual_ood"):
        demos = task.demos(split)
        assert len(demos) == 40
        for demo in demos:
            item = items[demo.id]
            verdict, figures = task.judge(item.data, demo.response)
            assert verdict.kind == "correct" and figures["recognition"] == 1.0
            (message,) = demo.messages
            assert message.images == (task.image(item.data),) and str(item.data.target) in message.content
            if answer_format == "formula":
                faces = "10" if item.data.rule == "10" else "11 12 13"
                assert message.content == f"faces {faces} target {item.data.target}"


def test_splits(small):
    plain = GeneralPoints(GeneralPointsConfig(num_cards=3, targets=(1, 40), answer_format="formula"))
    assert small.splits == ("train", "val", "test", "ood", "visual_ood")
    for split in plain.splits:
        assert [i.id for i in small.prompts(split)] == [i.id for i in plain.prompts(split)]
    for split in small.splits:
        suits = {s for i in small.prompts(split) for s in i.data.suits}
        assert suits == set(RED_SUITS if split == "visual_ood" else BLACK_SUITS)
    test, red = small.prompts("test"), small.prompts("visual_ood")
    assert [(i.data.cards, i.data.target, i.data.rule) for i in test] == [
        (i.data.cards, i.data.target, i.data.rule) for i in red
    ]
    assert not {i.id for i in test} & {i.id for i in red}
    assert {i.data.rule for i in small.prompts("ood")} == {"11-12-13"}


def test_the_config_makes_it():
    settings = {"images": True, "card_size": (16, 32), "card_margin": 0, "num_cards": 3, "max_train": 3}
    task = make_task(TaskConfig(name="general_points", general_points=settings))
    assert isinstance(task, GeneralPointsVision) and task.card_size == (16, 32)
    plain = make_task(TaskConfig(name="general_points", general_points={"num_cards": 3}))
    assert not isinstance(plain, GeneralPointsVision) and not hasattr(plain, "picture")
    with pytest.raises(ValueError, match="card_size"):
        GeneralPointsVision(GeneralPointsConfig(card_size=(4, 4)))
