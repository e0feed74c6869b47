"""From a row as it was read to a problem with its gold answer and its demonstration, in the layouts that people have.

    layout      columns
    verl        prompt (chat), reward_model.ground_truth, and target with the demonstration (LUFFY)
    arc         question, choices.text, choices.label, answerKey
    mmlu        question, options or choices, and the right one: answer (a letter or an index) or answer_index
    gpqa        Question, Correct Answer, Incorrect Answer 1, 2, 3
    messages    messages or conversations (ShareGPT): the last answer is the demonstration
    alpaca      instruction, input, output
    math        problem and solution
    gsm8k       question, answer that ends in `#### x`
    plain       a problem, and an answer or a demonstration or both, under the names in PROBLEMS, ANSWERS, RESPONSES

Column names are read without case, and a column that is null is not there. Any other layout is mapped by `columns`:
{"problem": ..., "answer": ..., "response": ...}, names with dots for what is nested.

A row without an answer column takes its gold from the demonstration, if that has a box or ends in `#### x`. One that has
neither is there to be imitated only: its `answer` is None.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from amft_fast.errors import UserError, shown
from amft_fast.tasks.math.answer import extract
from amft_fast.tasks.math.sameness import digest
from amft_fast.tasks.math.sources import BadRow

LETTERS = "ABCDEFGHIJ"
LAYOUTS = "verl, gsm8k, math, arc, mmlu, gpqa, messages, alpaca, plain prompt/response/answer"
PROBLEMS = ("problem", "question", "prompt", "query", "instruction", "input")
ANSWERS = ("answer", "final_answer", "ground_truth", "expected_answer", "gold_answer", "correct_answer")
RESPONSES = ("response", "target", "completion", "generated_solution", "output")
CHATS = ("messages", "conversations", "conversation")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
}
_ONLY_A_BOX = re.compile(r"[\s$.\\()\[\]]*\\f?boxed\b.*[}\d][\s$.\\()\[\]]*", re.DOTALL)
Turns = list[tuple[str, str]]


@dataclass(frozen=True)
class Row:
    """One problem as read. `answer` is None where there is no gold, `response` the demonstration, `system` the prompt that
    came with it, `history` the (role, text) of the turns before the problem."""

    problem: str
    answer: str | None
    response: str | None = None
    system: str | None = None
    choices: bool = False
    history: tuple[tuple[str, str], ...] = ()

    @property
    def asked(self) -> str:
        """All that is asked, the earlier turns too: what tells one problem from another."""
        return "\n\n".join([*(text for _, text in self.history), self.problem])


def read_row(row: dict[str, Any], columns: dict[str, str] | None = None, bare: bool = False) -> Row:
    """The problem in a row, by its layout or by the column map; with `bare` it needs neither gold nor demonstration.

    Raises BadRow.
    """
    found = _mapped(row, columns, bare) if columns else _recognised(row, bare)
    if found.answer is None and found.response is None and not bare:
        raise BadRow("neither a gold answer nor a demonstration")
    for what, text in (("problem", found.asked), ("answer", found.answer), ("demonstration", found.response)):
        if text and not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise BadRow(f"the {what} holds half a surrogate pair, as text that was cut or misread does")
    return found


def recognise(row: dict[str, Any]) -> str | None:
    """The layout's name, or None."""
    return _layout(_there(row))


def _recognised(row: dict[str, Any], bare: bool) -> Row:
    there = _there(row)
    layout = _layout(there) or ("plain" if bare and not there.keys().isdisjoint(PROBLEMS) else None)
    if layout is None:
        nulls = sorted(str(name) for name, value in row.items() if value is None)
        null = f" ({', '.join(nulls)[:100]} null)" if nulls else ""
        names = ", ".join(sorted(there))[:200] or "none"
        raise BadRow(f"columns {names}{null} are of no known layout ({LAYOUTS})")
    return _READERS[layout](there)


def _there(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that hold something, by lower-case name; a name that is written so comes before one that is not."""
    names = sorted(row, key=lambda name: str(name) == str(name).lower())
    return {str(name).strip().lower(): row[name] for name in names if row[name] is not None}


def _layout(row: dict[str, Any]) -> str | None:
    has = row.keys().__contains__
    if has("prompt") and isinstance(_parsed(row.get("reward_model")), dict):
        return "verl"
    if has("question") and has("choices") and has("answerkey"):
        return "arc"
    if has("question") and (has("options") or has("choices")) and (has("answer") or has("answer_index")):
        return "mmlu"
    if has("question") and has("correct answer"):
        return "gpqa"
    if any(map(has, CHATS)):
        return "messages"
    if has("instruction") and has("output"):
        return "alpaca"
    if has("problem") and has("solution"):
        return "math"
    if has("question") and isinstance(row.get("answer"), str) and "####" in row["answer"]:
        return "gsm8k"
    return "plain" if any(map(has, PROBLEMS)) and any(map(has, (*ANSWERS, *RESPONSES, "solution"))) else None


def _mapped(row: dict[str, Any], columns: dict[str, str], bare: bool) -> Row:
    unknown = set(columns) - {"problem", "answer", "response", "system"}
    if unknown or "problem" not in columns or not (bare or {"answer", "response"} & set(columns)):
        raise UserError(
            "columns must map problem and answer (or response alone, for demonstrations without a gold), and may map response "
            f"and system, got {sorted(columns)}"
        )
    found = {}
    for role, name in columns.items():
        value: Any = row
        for part in name.split("."):
            value = _parsed(value)
            if not isinstance(value, dict) or part not in value:
                raise BadRow(f"no column {name!r} (the map's {role})")
            value = value[part]
        found[role] = value
    if found["problem"] is None:
        raise BadRow(f"column {columns['problem']!r} (the map's problem) is null")
    system, history, problem = _asked(found["problem"])
    answer, response = _gold_and_demo(found.get("answer"), _response(found.get("response")))
    own = found.get("system")
    return Row(problem, answer, response, own if isinstance(own, str) else system, history=history)


def _verl(row: dict[str, Any]) -> Row:
    answer = _parsed(row["reward_model"]).get("ground_truth")
    response = next((row[c] for c in (*RESPONSES, "solution") if row.get(c)), None)
    return _row(_asked(row["prompt"]), *_gold_and_demo(answer, _response(response)))


def _plain(row: dict[str, Any]) -> Row:
    question = next(row[c] for c in PROBLEMS if c in row)
    answer = next((row[c] for c in ANSWERS if c in row), None)
    response = _response(next((row[c] for c in RESPONSES if row.get(c) not in (None, "")), row.get("response")))
    solution = _response(row.get("solution"))
    if answer is None and response is None and solution is not None and _is_bare(solution):
        answer, solution = solution, None
    if response is None and solution is not None and (answer is None or _boxed(solution)):
        response = solution
    return _row(_asked(question), *_gold_and_demo(answer, response))


def _alpaca(row: dict[str, Any]) -> Row:
    task = _text("instruction", row["instruction"])
    given = _text("input", row.get("input", ""))
    question = f"{task}\n\n{given}" if given.strip() else task
    return _plain({**{k: v for k, v in row.items() if k not in PROBLEMS}, "problem": question})


def _messages(row: dict[str, Any]) -> Row:
    turns = _turns(next(row[c] for c in CHATS if c in row))
    if not turns or turns[-1][0] != "assistant":
        return _plain({**row, "problem": [{"role": role, "content": text} for role, text in turns]})
    *asked, (_, response) = turns
    own = {k: v for k, v in row.items() if k not in RESPONSES}
    return _plain({**own, "problem": [{"role": r, "content": t} for r, t in asked], "response": response})


def _row(asked: tuple[str | None, tuple[tuple[str, str], ...], str], answer: str | None, response: str | None) -> Row:
    system, history, problem = asked
    choices = answer is not None and _offers_choices(problem, answer)
    return Row(problem, answer, response, system, choices, history)


def _offers_choices(problem: str, answer: str) -> bool:
    return len(answer) == 1 and answer in LETTERS and all(re.search(rf"(?m)^\s*\(?{c}[).:]", problem) for c in "AB")


# ---------------------------------------------------------------------------------------------------- multiple choices


def _arc(row: dict[str, Any]) -> Row:
    choices = _parsed(row["choices"])
    if not isinstance(choices, dict) or not isinstance(choices.get("text"), list):
        raise BadRow("choices holds no list text")
    labels = [str(label) for label in choices.get("label") or []]
    if str(row["answerkey"]) not in labels:
        raise BadRow(f"answerKey {shown(row['answerkey'])} is none of the labels {shown(labels)}")
    return _multiple_choice(row["question"], choices["text"], labels.index(str(row["answerkey"])))


def _mmlu(row: dict[str, Any]) -> Row:
    options = _parsed(row.get("options", row.get("choices")))
    right = row.get("answer_index", row.get("answer"))
    if isinstance(right, str) and len(right.strip()) == 1 and right.strip() in LETTERS:
        right = LETTERS.index(right.strip())
    if isinstance(right, bool) or not isinstance(right, int):
        raise BadRow(f"answer must be a letter or an index, got {shown(right)}")
    return _multiple_choice(row["question"], options, right)


def _gpqa(row: dict[str, Any]) -> Row:
    names = ["correct answer", *(f"incorrect answer {i}" for i in (1, 2, 3))]
    options = [_text(name, row.get(name)) for name in names]
    # The right one stands first in every row: shuffle, by the question alone.
    order = sorted(range(4), key=lambda i: digest(f"{i}|{row['question']}"))
    return _multiple_choice(row["question"], [options[i] for i in order], order.index(0))


def _multiple_choice(question: Any, options: Any, right: int) -> Row:
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS) or not 0 <= right < len(options):
        raise BadRow(
            f"need 2 to {len(LETTERS)} options and the right one among them, got {shown(options, 80)} and {right}"
        )
    lines = "\n".join(f"{letter}) {_option(option)}" for letter, option in zip(LETTERS, options))
    return Row(f"{_text('question', question).strip()}\n\n{lines}", LETTERS[right], choices=True)


def _option(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f"an option must be a text or a number, got {shown(value)}")
    return str(value).strip()


_READERS: dict[str, Callable[[dict[str, Any]], Row]] = {
    "verl": _verl,
    "arc": _arc,
    "mmlu": _mmlu,
    "gpqa": _gpqa,
    "messages": _messages,
    "alpaca": _alpaca,
    "math": _plain,
    "gsm8k": _plain,
    "plain": _plain,
}


# ------------------------------------------------------------------------------------------------ golds, demonstrations


def _gold_and_demo(answer: Any, response: str | None) -> tuple[str | None, str | None]:
    """The gold as text and the demonstration, each taken from the other where it is not there itself."""
    gold = None if answer is None else _answer(answer)
    if gold is not None and "####" in gold:
        steps, _, last = gold.rpartition("####")
        if last.strip() and "\n" not in last.strip():
            gold = last.strip()
            steps = re.sub(r"<<[^<>]*>>", "", steps).strip()  # GSM8K's notes for a calculator
            response = response or (f"{steps}\nThe answer is \\boxed{{{gold}}}." if steps else None)
    if gold is not None and _boxed(gold) and _is_bare(gold):
        gold = _boxed(gold)
    if gold is None and response is not None:
        gold = _boxed(response) or (extract(response) if "####" in response else None)
    return gold, response


def _boxed(text: str) -> str | None:
    return extract(text) if "\\boxed" in text or "\\fbox" in text else None


def _is_bare(solution: str) -> bool:
    """Whether a solution is nothing but its answer: a box, or one short line that is no sentence."""
    line = solution.strip()
    if "boxed" in line:
        return len(line) <= 300 and _ONLY_A_BOX.fullmatch(line) is not None
    return len(line) <= 100 and "\n" not in line and not re.search(r"[^\W\d_]{2,}[,:]?\s+[^\W\d_]{2,}", line)


def _answer(value: Any) -> str:
    """A gold answer as text: 27.0 is "27", a list of one its only element, a list of several joined by commas."""
    if isinstance(value, list):
        return ", ".join(_answer(v) for v in value)
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise BadRow(f"the answer must be a text or a number, got {shown(value)}")
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            raise BadRow(f"the answer must be a finite number, got {value}")
        value = int(value) if value == int(value) else value
    if isinstance(value, str) and value.lstrip().startswith('["'):  # a list of texts, written down as JSON
        texts = _parsed(value)
        if isinstance(texts, list) and all(isinstance(t, str) for t in texts):
            return ", ".join(t.strip() for t in texts)
    return str(value).strip()


def _response(value: Any) -> str | None:
    """A demonstration: a text, the last message of a chat, or the first text of several."""
    value = _parsed(value)
    if isinstance(value, list):
        if not value:
            return None
        value = _content(value[-1]) if isinstance(value[-1], dict) else value[0]
    if isinstance(value, dict):
        value = _content(value)
    return None if value is None else _text("the demonstration", value)


# ----------------------------------------------------------------------------------------------------------------- chats


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} must be a text, got {shown(value)}")
    return value


def _parsed(value: Any) -> Any:
    """A list or an object that was written down as JSON text, as tables have it; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[{", "{", '["')):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _asked(value: Any) -> tuple[str | None, tuple[tuple[str, str], ...], str]:
    """(system prompt, earlier turns, the last user's message) of a chat, or (None, (), the text)."""
    if isinstance(value, str):
        turns = _parsed(value)
        if not isinstance(turns, list) or not all(isinstance(m, dict) and ROLES.keys() & _role(m) for m in turns):
            return None, (), value
        value = turns
    turns = _turns(value)
    system = "\n\n".join(text for role, text in turns if role == "system") or None
    spoken = [(role, text) for role, text in turns if role != "system"]
    for i, (role, _) in enumerate(spoken):
        if role != ("user", "assistant")[i % 2]:
            raise BadRow(f"the prompt's turns must go user, assistant, user, ...: turn {i + 1} is of {role}")
    if len(spoken) % 2 == 0:
        raise BadRow(f"the prompt must end with a user's message, got {len(spoken)} turns")
    return system, tuple(spoken[:-1]), spoken[-1][1]


def _turns(value: Any) -> Turns:
    """(role, text) of each message of a chat, in OpenAI's form (role, content) or ShareGPT's (from, value)."""
    value = _parsed(value)
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise BadRow(f"the prompt must be a text or a list of messages, got {shown(value)}")
    turns = []
    for message in value:
        role = next((ROLES[r] for r in _role(message) if r in ROLES), None)
        if role is None:
            raise BadRow(f"a message of role {shown(next(iter(_role(message)), None))}: known are {', '.join(ROLES)}")
        turns.append((role, _content(message)))
    return turns


def _role(message: dict[str, Any]) -> set[str]:
    return {r.lower() for k in ("role", "from") if isinstance(r := message.get(k), str)}


def _content(message: dict[str, Any]) -> str:
    """The text of a message, which may come in parts."""
    content = next((message[k] for k in ("content", "value") if message.get(k) is not None), None)
    if not isinstance(content, list):
        return _text("a message's content", content)
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise BadRow(f"a message holds a part of type {shown(kind)}, and this task reads text alone")
        texts.append(text)
    return "".join(texts)
