"""The wording of V-IRL: prompts, observations, answers and the verifier's messages, and the reading of answers.

Two formats. "json", for language models: an answer with the fields `current observation`, `current instruction` and
`action` (`forward()`, `turn_direction(x)`, `stop()`). "compact", for tiny models with one token a word: the prompt
`absolute 1 turn right north 2 to bakery left 3 turn left west 4 to goal bank right street nothing`, the answer
`street 1 turn north`, that is: no crossing here, sentence 1, turn north. A later observation is `cross bakery left`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from amft_fast.tasks.last_object import last_object
from amft_fast.tasks.virl.routes import ACTION_SPACES, DIRECTIONS, SIDES, Point, Route, sentences, sight, turn_of

ANSWER_FORMATS = ("json", "compact")

# Every word that the compact format can put before a model; landmarks and numbers come on top.
COMPACT_WORDS = (
    *("absolute", "relative", "turn", "to", "forward", "stop", "street", "cross", "nothing", "goal", "slightly"),
    *("wrong", "place", "sentence", "action", "unreadable", "again", "passed"),
    *DIRECTIONS,
    *dict.fromkeys(word for side in SIDES for word in side.split()),
)


@dataclass(frozen=True)
class Answer:
    """A policy's answer, read: whether it claims a crossing, the sentence it quotes (a number or words), its action."""

    crossing: bool
    sentence: int | str
    action: str  # forward, stop, or the word of a turn


# ------------------------------------------------------------------------------------------------------------- wording

_JSON_PROMPT = """\
You walk through a city and follow written instructions. At each point you are told what you observe. Find the sentence \
of the instruction that is to be carried out now, and choose the action that does so.

Instruction:
{instruction}

Actions:
"forward()": go on one step.
"turn_direction(x)": turn and go into the street there, where x is one of {words}.
"stop()": you have arrived.

Answer at each point with one JSON object with three fields and nothing after it:
{{"current observation": what you observe, "current instruction": the sentence to carry out now, "action": the action}}
{views}
O_1: {observation}"""
_VIEWS = """
The picture shows four views: front and right in the upper row, back and left in the lower one.
"""
_JSON_FEEDBACK = {
    "illegal": "Your answer is not one JSON object with the three fields.",
    "wrong_observation": "You are {not_}at an intersection.",
    "wrong_instruction": "That is not the sentence to carry out now.",
    "wrong_action": "That is not the right action.",
}
_COMPACT_FEEDBACK = {
    "illegal": "unreadable again",
    "wrong_observation": "wrong place again",
    "wrong_instruction": "wrong sentence again",
    "wrong_action": "wrong action again",
}


def prompt_text(route: Route, first: Point, space: str, answer_format: str, views: bool) -> str:
    """The prompt: the instruction, the action space, the first observation."""
    if answer_format == "compact":
        return f"{space} {_compact_instruction(route)} {observation_text(first, answer_format, views)}"
    lines = "\n".join(f"{i}. {s}" for i, s in enumerate(sentences(route), 1))
    words = ", ".join(ACTION_SPACES[space])
    observation = observation_text(first, answer_format, views)
    return _JSON_PROMPT.format(instruction=lines, words=words, observation=observation, views=_VIEWS if views else "")


def _compact_instruction(route: Route) -> str:
    out, heading = [], route.heading
    for i, leg in enumerate(route.legs):
        goal = "goal " if i + 1 == len(route.legs) else ""
        seen = f"{leg.landmark} {leg.side}" if leg.landmark else "nothing"
        out.append(f"{2 * i + 1} turn {turn_of(heading, leg.heading)} {leg.direction} {2 * i + 2} to {goal}{seen}")
        heading = leg.heading
    return " ".join(out)


def observation_text(point: Point, answer_format: str, views: bool = False) -> str:
    """What is seen at a point. With views the landmarks are left to the eye, and crossings are still told."""
    last = point.action == "stop"
    if answer_format == "compact":
        seen = f"{'goal ' if last else ''}{point.landmark} {point.side}" if point.landmark and not views else "nothing"
        return f"{'cross' if point.crossing else 'street'} {seen}"
    crossing = "You observe an intersection" if point.crossing else ""
    if views:
        return f"You observe an image of 4 views; {crossing}".rstrip(" ;")
    return f"{sight(point.landmark, point.side, last) or 'No landmarks nearby'}; {crossing}".rstrip(" ;")


def answer_text(route: Route, point: Point, space: str, answer_format: str) -> str:
    """The right answer at a point, as the policy should give it."""
    word = point.target(space)
    if answer_format == "compact":
        action = f"turn {word}" if point.action == "turn" else point.action
        return f"{'cross' if point.crossing else 'street'} {point.sentence} {action}"
    fields = {
        "current observation": observation_text(point, "json"),
        "current instruction": sentences(route)[point.sentence - 1],
        "action": f"turn_direction({word})" if point.action == "turn" else f"{point.action}()",
    }
    return json.dumps(fields)


def feedback_text(kind: str, point: Point, answer_format: str) -> str:
    """What the verifier says to a wrong answer before the next try at the same point."""
    if answer_format == "compact":
        return _COMPACT_FEEDBACK[kind]
    text = _JSON_FEEDBACK[kind].format(not_="" if point.crossing else "not ")
    return f"{text} Try again, with one JSON object as before."


def next_text(number: int, point: Point, passed: bool, answer_format: str, views: bool) -> str:
    """The next point's observation; `passed` when the one before was left unsolved."""
    seen = observation_text(point, answer_format, views)
    if answer_format == "compact":
        return f"passed {seen}" if passed else seen
    return f"{'Wrong again: you are taken on to the next point.' if passed else 'Right.'}\nO_{number}: {seen}"


# ------------------------------------------------------------------------------------------------------ reading answers

_MAX_CHARS = 4096  # of a compact answer
_ACTION = re.compile(r"(?:(forward|stop)\(\s*\)|turn_direction\(\s*['\"]?([a-z]+(?: +[a-z]+)?)['\"]?\s*\))")
_COMPACT = re.compile(r"(cross|street) ([0-9]{1,3}) (?:(forward|stop)|turn ((?:slightly )?[a-z]+))")
_DENIED = re.compile(r"\b(no|not|without|any)\b[^.;]*\bintersection")


def read_answer(text: str, space: str, answer_format: str) -> Answer | None:
    """An answer as the policy gave it, or None where it has no legal action in this action space. Nothing is executed."""
    fields = _compact_fields(text) if answer_format == "compact" else _json_fields(text)
    if fields is None or (fields[3] and fields[3] not in ACTION_SPACES[space]):
        return None
    crossing, sentence, action, word = fields
    return Answer(crossing, sentence, word or action)


def _compact_fields(text: str) -> tuple[bool, int, str | None, str | None] | None:
    # The whole text: whoever looks at its beginning alone takes a right answer with anything far behind it.
    match = _COMPACT.fullmatch(" ".join(text.split())) if len(text) <= _MAX_CHARS else None
    return match and (match[1] == "cross", int(match[2]), match[3], match[4])


def _json_fields(text: str) -> tuple[bool, str, str | None, str | None] | None:
    """From the last JSON object with a field "action" (see `last_object`)."""
    found = last_object(text, "action")
    if found is None:
        return None
    seen, sentence, action = (found.get(k) for k in ("current observation", "current instruction", "action"))
    if not all(isinstance(field, str) for field in (seen, sentence, action)):
        return None
    match = _ACTION.fullmatch(" ".join(action.lower().split()))
    if match is None:
        return None
    seen = seen.lower()
    return "intersection" in seen and not _DENIED.search(seen), sentence, match[1], match[2]


def same_sentence(said: int | str, number: int, lines: Sequence[str]) -> bool:
    """Whether an answer quotes the sentence with this number: the number itself, or its words up to case and signs."""
    if isinstance(said, int):
        return said == number
    words = re.sub(r"[^a-z0-9]+", " ", said.lower()).strip()
    wanted = re.sub(r"[^a-z0-9]+", " ", lines[number - 1].lower()).strip()
    return words in (wanted, f"{number} {wanted}", str(number))
