"""Rows of problems: from JSONL, JSON and Parquet files and from datasets of the Hugging Face hub, streamed, in the layouts that
people have.

    layout      columns
    verl        prompt (chat), reward_model.ground_truth, and target with the demonstration (LUFFY)
    arc         question, choices.text, choices.label, answerKey
    mmlu-pro    question, options, answer (a letter) or answer_index
    gpqa        Question, Correct Answer, Incorrect Answer 1, 2, 3
    math        problem, solution with a boxed answer, or with a column answer
    gsm8k       question, answer that ends in `#### x`
    plain       prompt, question or problem; answer; response, if there are demonstrations

Any other is mapped by `columns`: {"problem": ..., "answer": ..., "response": ...}, names with dots for what is nested.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from amft_fast.errors import UserError
from amft_fast.tasks.math.answer import extract

FILE_ENDINGS = (".jsonl", ".json", ".parquet")
LETTERS = "ABCDEFGHIJ"
LAYOUTS = "verl, gsm8k, math, arc, mmlu-pro, gpqa, plain prompt/response/answer"


@dataclass(frozen=True)
class Row:
    """One problem as read. `system` is the prompt that came with it, `response` the demonstration."""

    problem: str
    answer: str
    response: str | None = None
    system: str | None = None
    choices: bool = False


class BadRow(ValueError):
    """A row that cannot be used; its text says why."""


# --------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Source:
    """Where rows come from: a file, or a dataset `name`, `name:config`, `name@split`, `name:config@split`.

    The name may be a folder: datasets reads those as it does the hub's.
    """

    text: str
    split: str = "train"

    @property
    def is_file(self) -> bool:
        return self.text.endswith(FILE_ENDINGS) or Path(self.text).is_file()

    def rows(self) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
        """(place, row) pairs; the place is `file:line`, for Parquet and datasets `name:row`, counted from 1.

        A line that is no JSON object comes as a BadRow. Raises UserError when the source cannot be read at all.
        """
        if self.is_file:
            if not Path(self.text).is_file():
                raise UserError(f"no data file {self.text!r}")
            read = _parquet if self.text.endswith(".parquet") else _json if self.text.endswith(".json") else _jsonl
            yield from read(Path(self.text))
        else:
            yield from _hub(self.text, self.split)


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for i, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{i}", _object(line)
    except OSError as e:
        raise UserError(f"data file {str(path)!r} cannot be read: {e.strerror}") from None


def _object(line: str) -> dict[str, Any] | BadRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        return BadRow(f"no JSON ({e})")
    return row if isinstance(row, dict) else BadRow(f"no JSON object but {type(row).__name__}")


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as e:
        raise UserError(f"data file {str(path)!r} cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"data file {str(path)!r} is no JSON: {e}; one object a line is .jsonl") from None
    if not isinstance(rows, list):
        raise UserError(f"data file {str(path)!r} must hold a JSON list of rows, got {type(rows).__name__}")
    for i, row in enumerate(rows, 1):
        yield f"{path}:{i}", row if isinstance(row, dict) else BadRow(f"no JSON object but {type(row).__name__}")


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{str(path)!r} takes pyarrow to read: pip install 'amft-fast[math]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            i = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    i += 1
                    yield f"{path}:{i}", row
    except (OSError, pyarrow.ArrowException) as e:
        raise UserError(f"data file {str(path)!r} cannot be read as Parquet: {str(e).splitlines()[0]}") from None


def _hub(text: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{text!r} is no file, and to read it from the hub takes datasets: pip install 'amft-fast[math]'"
        ) from None
    name, _, asked = text.partition("@")
    name, _, config = name.partition(":")
    from huggingface_hub.utils import logging as hub_logging

    datasets.utils.logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config or None, split=asked or split, streaming=True)
        for i, row in enumerate(rows, 1):
            yield f"{text}:{i}", row
    except Exception as e:  # every layer below (datasets, hub, http, fsspec) has exceptions of its own
        raise UserError(
            f"dataset {text!r} is no file here, and could not be had from the hub: {_first_line(e)}"
        ) from None


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


# --------------------------------------------------------------------------------------------------------------- layouts


def read_row(row: dict[str, Any], columns: dict[str, str] | None = None) -> Row:
    """The problem in a row, by its layout or by the column map. Raises BadRow."""
    if columns:
        return _mapped(row, columns)
    layout = recognise(row)
    if layout is None:
        raise BadRow(f"columns {', '.join(sorted(map(str, row)))[:200]} are of no known layout ({LAYOUTS})")
    return _READERS[layout](row)


def recognise(row: dict[str, Any]) -> str | None:
    """The layout's name, or None."""
    has = row.keys().__contains__
    if has("prompt") and isinstance(row.get("reward_model"), dict):
        return "verl"
    if has("question") and has("choices") and has("answerKey"):
        return "arc"
    if has("question") and has("options") and (has("answer") or has("answer_index")):
        return "mmlu-pro"
    if has("Question") and has("Correct Answer"):
        return "gpqa"
    if has("problem") and has("solution"):
        return "math"
    if has("question") and isinstance(row.get("answer"), str) and "####" in row["answer"]:
        return "gsm8k"
    named = any(map(has, ("prompt", "question", "problem")))
    return "plain" if named and any(map(has, ("answer", "final_answer", "ground_truth"))) else None


def _mapped(row: dict[str, Any], columns: dict[str, str]) -> Row:
    unknown = set(columns) - {"problem", "answer", "response", "system"}
    if unknown or not {"problem", "answer"} <= set(columns):
        raise UserError(f"columns must map problem and answer, and may map response and system, got {sorted(columns)}")
    found = {}
    for role, name in columns.items():
        value: Any = row
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise BadRow(f"no column {name!r} (the map's {role})")
            value = value[part]
        found[role] = value
    system, problem = _chat(found["problem"])
    response = found.get("response")
    return Row(problem, _answer(found["answer"]), _response(response), found.get("system") or system)


def _verl(row: dict[str, Any]) -> Row:
    system, problem = _chat(row["prompt"])
    response = next((row[c] for c in ("target", "response", "solution") if row.get(c)), None)
    answer = _answer(row["reward_model"].get("ground_truth"))
    return Row(problem, answer, _response(response), system, _offers_choices(problem, answer))


def _offers_choices(problem: str, answer: str) -> bool:
    return answer in LETTERS and all(re.search(rf"(?m)^\s*\(?{c}[).:]", problem) for c in "AB")


def _gsm8k(row: dict[str, Any]) -> Row:
    steps, _, answer = row["answer"].rpartition("####")
    steps = re.sub(r"<<[^<>]*>>", "", steps).strip()
    answer = answer.strip()
    return Row(_text("question", row["question"]), answer, f"{steps}\nThe answer is \\boxed{{{answer}}}.")


def _math(row: dict[str, Any]) -> Row:
    solution = _text("solution", row["solution"])
    answer = row.get("answer")
    boxed = extract(solution) if "\\boxed" in solution or "\\fbox" in solution else None
    if answer is None:
        if boxed is None:
            raise BadRow("no column answer, and no boxed answer in solution")
        answer = boxed
    return Row(_text("problem", row["problem"]), _answer(answer), solution if boxed else None)


def _arc(row: dict[str, Any]) -> Row:
    choices = row["choices"]
    if not isinstance(choices, dict) or not isinstance(choices.get("text"), list):
        raise BadRow("choices holds no list text")
    labels = [str(label) for label in choices.get("label") or []]
    if str(row["answerKey"]) not in labels:
        raise BadRow(f"answerKey {row['answerKey']!r} is none of the labels {labels}")
    return _multiple_choice(row["question"], choices["text"], labels.index(str(row["answerKey"])))


def _mmlu_pro(row: dict[str, Any]) -> Row:
    index, answer = row.get("answer_index"), row.get("answer")
    if not isinstance(index, int):
        if not isinstance(answer, str) or answer not in LETTERS or not answer:
            raise BadRow(f"answer must be a letter, got {answer!r}")
        index = LETTERS.index(answer)
    return _multiple_choice(row["question"], row["options"], index)


def _gpqa(row: dict[str, Any]) -> Row:
    names = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    options = [_text(name, row.get(name)) for name in names]
    # The right one stands first in every row: shuffle, by the question alone.
    order = sorted(range(4), key=lambda i: digest(f"{i}|{row['Question']}"))
    return _multiple_choice(row["Question"], [options[i] for i in order], order.index(0))


def _multiple_choice(question: Any, options: Any, right: int) -> Row:
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS) or not 0 <= right < len(options):
        raise BadRow(f"need 2 to {len(LETTERS)} options and the right one among them, got {options!r:.80} and {right}")
    lines = "\n".join(f"{letter}) {str(option).strip()}" for letter, option in zip(LETTERS, options))
    return Row(f"{_text('question', question).strip()}\n\n{lines}", LETTERS[right], choices=True)


def _plain(row: dict[str, Any]) -> Row:
    question = next(row[c] for c in ("problem", "question", "prompt") if row.get(c) is not None)
    system, problem = _chat(question)
    answer = next((row[c] for c in ("answer", "final_answer", "ground_truth") if row.get(c) is not None), None)
    response = next((row[c] for c in ("response", "target", "completion") if row.get(c)), None)
    answer = _answer(answer)
    return Row(problem, answer, _response(response), system, _offers_choices(problem, answer))


_READERS: dict[str, Callable[[dict[str, Any]], Row]] = {
    "verl": _verl,
    "arc": _arc,
    "mmlu-pro": _mmlu_pro,
    "gpqa": _gpqa,
    "gsm8k": _gsm8k,
    "math": _math,
    "plain": _plain,
}


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} must be a text, got {value!r:.60}")
    return value


def _chat(value: Any) -> tuple[str | None, str]:
    """(system prompt, last user message) of a chat, or (None, the text)."""
    if isinstance(value, str):
        return None, value
    if not isinstance(value, list) or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value):
        raise BadRow(f"the prompt must be a text or a list of messages, got {value!r:.60}")
    users = [m["content"] for m in value if m.get("role") == "user"]
    if len(users) != 1:
        raise BadRow(f"the prompt must hold one user message, got {len(users)}")
    return next((m["content"] for m in value if m.get("role") == "system"), None), users[0]


def _answer(value: Any) -> str:
    """A gold answer as text: 27.0 is "27", a list of one its only element, a list of several joined by commas."""
    if isinstance(value, bool) or value is None:
        raise BadRow(f"the answer must be a text or a number, got {value!r}")
    if isinstance(value, list):
        return ", ".join(_answer(v) for v in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float):
        raise BadRow(f"the answer must be a text or a number, got {value!r:.60}")
    return str(value).strip()


def _response(value: Any) -> str | None:
    """A demonstration: a text, or the assistant's message of a chat."""
    if isinstance(value, list):
        value = next((m.get("content") for m in reversed(value) if isinstance(m, dict)), None)
    return value if isinstance(value, str) else None


# ----------------------------------------------------------------------------------------------------- sameness of problems


def words(text: str) -> list[str]:
    """The words of a problem without case, dollars and punctuation; signs of arithmetic stay."""
    return [w for w in (re.sub(r"[^\w+\-*/^=<>]", "", w) for w in text.casefold().split()) if w]


def digest(text: str) -> str:
    """16 hex digits that hang on the text alone."""
    return blake2b(text.encode(), digest_size=8).hexdigest()


def problem_key(problem: str) -> str:
    """The identity of a problem: the same for two texts that differ in spacing, case, dollars or punctuation alone."""
    return digest("".join(words(problem)))


class Fingerprints:
    """Evaluation problems, to be kept out of training: found again as a whole, or by any 13 words in a row."""

    N = 13

    def __init__(self) -> None:
        self._whole: set[str] = set()
        self._grams: set[int] = set()

    def add(self, problem: str) -> None:
        w = words(problem)
        self._whole.add(digest("".join(w)))
        self._grams.update(self._of(w))

    def overlap(self, problem: str) -> bool:
        """Whether the problem is one of those added, or shares 13 words in a row with one."""
        w = words(problem)
        return digest("".join(w)) in self._whole or not self._grams.isdisjoint(self._of(w))

    def _of(self, w: list[str]) -> list[int]:
        return [int(digest(" ".join(w[i : i + self.N])), 16) for i in range(len(w) - self.N + 1)]
