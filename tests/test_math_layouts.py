"""Layouts that people have, golds that are none, and when two problems are one."""

import json

import pytest

from amft_fast.tasks.math.data import Store, load
from amft_fast.tasks.math.layouts import read_row, recognise
from amft_fast.tasks.math.sameness import Fingerprints, problem_key
from amft_fast.tasks.math.sources import BadRow, Source

WORKED = "Seven sixes: $6 \\cdot 7 = \\boxed{42}$."
Q = "What is 6 times 7?"


def chat(*texts, roles=("user", "assistant"), names=("role", "content")):
    return [{names[0]: roles[i % 2], names[1]: text} for i, text in enumerate(texts)]


PARTS = [{"role": "user", "content": [{"type": "text", "text": "What is 6 "}, {"type": "text", "text": "times 7?"}]}]
ROWS = [
    # TRL: messages, prompt and completion (text or chat), prompt and solution
    ("messages", {"messages": chat(Q, WORKED)}, (Q, "42", WORKED)),
    ("messages", {"messages": chat(Q, "It is 42."), "answer": 42}, (Q, "42", "It is 42.")),
    ("messages", {"messages": chat(Q, "It is 42.")}, (Q, None, "It is 42.")),
    ("messages", {"messages": chat(Q), "solution": WORKED}, (Q, "42", WORKED)),
    ("messages", {"messages": json.dumps(chat(Q, WORKED))}, (Q, "42", WORKED)),
    ("plain", {"prompt": Q, "completion": WORKED}, (Q, "42", WORKED)),
    ("plain", {"prompt": Q, "completion": "It is so."}, (Q, None, "It is so.")),
    ("plain", {"prompt": chat(Q), "completion": [{"role": "assistant", "content": WORKED}]}, (Q, "42", WORKED)),
    ("plain", {"prompt": chat(Q), "completion": "It is 42.", "ground_truth": "42"}, (Q, "42", "It is 42.")),
    ("plain", {"prompt": chat(Q), "solution": "$\\boxed{42}$"}, (Q, "42", None)),
    ("plain", {"prompt": chat(Q), "solution": "42"}, (Q, "42", None)),
    ("plain", {"prompt": chat(Q), "solution": "\\frac{84}{2}"}, (Q, "\\frac{84}{2}", None)),
    ("plain", {"prompt": Q, "solution": WORKED}, (Q, "42", WORKED)),
    ("plain", {"prompt": Q, "solution": "We count on fingers and toes."}, (Q, None, "We count on fingers and toes.")),
    ("plain", {"prompt": PARTS, "answer": "42"}, (Q, "42", None)),
    # Alpaca and ShareGPT
    (
        "alpaca",
        {"instruction": "Multiply.", "input": "6 and 7", "output": WORKED},
        ("Multiply.\n\n6 and 7", "42", WORKED),
    ),
    ("alpaca", {"instruction": Q, "input": "", "output": WORKED, "text": "Below is"}, (Q, "42", WORKED)),
    (
        "messages",
        {"conversations": chat(Q, WORKED, roles=("human", "gpt"), names=("from", "value"))},
        (Q, "42", WORKED),
    ),
    # verl, with what pandas and JSON Lines make of it
    ("verl", {"prompt": chat(Q), "reward_model": '{"style": "rule", "ground_truth": "42"}'}, (Q, "42", None)),
    ("verl", {"prompt": json.dumps(chat(Q)), "reward_model": {"ground_truth": '["42"]'}}, (Q, "42", None)),
    ("verl", {"prompt": chat(Q), "reward_model": {"ground_truth": ["42"]}, "answer": None}, (Q, "42", None)),
    # worked steps in an answer column; other people's column names; capitals
    (
        "plain",
        {"problem": Q, "answer": "6*7 is <<6*7=42>>42\n#### 42"},
        (Q, "42", "6*7 is 42\nThe answer is \\boxed{42}."),
    ),
    ("plain", {"problem": Q, "answer": "#### 42"}, (Q, "42", None)),
    ("math", {"Problem": Q, "Solution": WORKED, "Answer": 42}, (Q, "42", WORKED)),
    ("plain", {"query": Q, "response": "6*7\n#### 42"}, (Q, "42", "6*7\n#### 42")),
    ("plain", {"problem": Q, "generated_solution": WORKED, "expected_answer": "42"}, (Q, "42", WORKED)),
    ("plain", {"question": Q, "solution": [WORKED], "final_answer": ["42"]}, (Q, "42", WORKED)),
    # nulls beside what is there
    ("plain", {"problem": Q, "solution": None, "answer": "42"}, (Q, "42", None)),
    ("plain", {"problem": None, "question": Q, "answer": "42", "response": None}, (Q, "42", None)),
    ("math", {"problem": Q, "solution": WORKED, "answer": None}, (Q, "42", WORKED)),
]


@pytest.mark.parametrize(("layout", "row", "want"), ROWS)
def test_layouts(layout, row, want):
    read = read_row(row)
    assert recognise(row) == layout and (read.problem, read.answer, read.response) == want


@pytest.mark.parametrize("answer", [1, "B", "1"])
def test_mmlu_has_its_options_under_two_names_and_its_answer_in_two_forms(answer):
    name = "options" if answer == "B" else "choices"
    if answer == "1":
        with pytest.raises(BadRow, match="answer must be a letter or an index, got '1'"):
            read_row({"question": "Which?", name: ["one", "two"], "answer": answer})
        return
    read = read_row({"question": "Which?", name: ["one", "two"], "answer": answer})
    assert (read.problem, read.answer, read.choices) == ("Which?\n\nA) one\nB) two", "B", True)


def test_earlier_turns_of_a_prompt_are_kept():
    turns = [{"role": "system", "content": "Be brief."}, *chat("1+1?", "2", Q, WORKED)]
    read = read_row({"messages": turns})
    assert (read.problem, read.response, read.system) == (Q, WORKED, "Be brief.")
    assert read.history == (("user", "1+1?"), ("assistant", "2"))
    assert read_row({"prompt": turns[:-1], "answer": 42}).history == read.history
    # The same last question behind another first one is another problem.
    assert read.asked != read_row({"messages": chat("1+2?", "3", Q, WORKED)}).asked


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"problem": None, "answer": "1"}, "columns answer (problem null) are of no known layout"),
        ({"problem": "P", "answer": None}, "columns problem (answer null) are of no known layout"),
        ({"problem": "P", "answer": float("nan")}, "the answer must be a finite number, got nan"),
        ({"problem": "P", "answer": float("-inf")}, "the answer must be a finite number, got -inf"),
        ({"problem": "P", "answer": [1, None]}, "the answer must be a text or a number, got None"),
        ({"problem": "P", "answer": True}, "the answer must be a text or a number, got True"),
        ({"problem": "P", "answer": {"a": [[[[1]]]]}}, "the answer must be a text or a number, got {'a': [[[...]]]}"),
        ({"problem": 5, "answer": "1"}, "the prompt must be a text or a list of messages, got 5"),
        ({"problem": "P\ud800", "answer": "1"}, "the problem holds half a surrogate pair"),
        ({"problem": "P", "answer": "1", "response": 7}, "the demonstration must be a text, got 7"),
        ({"messages": []}, "the prompt must end with a user's message, got 0 turns"),
        ({"messages": chat("a", "b")[1:]}, "got 0 turns"),
        ({"prompt": chat("a", "b"), "answer": "1"}, "the prompt must end with a user's message, got 2 turns"),
        ({"prompt": chat("a", "b", roles=("user", "user")), "answer": "1"}, "turn 2 is of user"),
        ({"messages": chat("a", "b", roles=("user", "tool"))}, "a message of role 'tool'"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"}, "a part of type 'image'"),
        (
            {"prompt": [{"role": "user", "content": None}], "answer": "1"},
            "a message's content must be a text, got None",
        ),
        (
            {"question": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"},
            "is none of the labels",
        ),
    ],
)
def test_rows_that_are_no_problem_say_why(row, said):
    with pytest.raises(BadRow) as e:
        read_row(row)
    assert said in str(e.value), str(e.value)


def test_column_maps_reach_into_json_texts_and_may_leave_the_answer_out():
    row = {"q": '{"text": "What?"}', "demo": "It is."}
    read = read_row(row, {"problem": "q.text", "response": "demo"})
    assert (read.problem, read.answer, read.response) == ("What?", None, "It is.")
    with pytest.raises(BadRow, match=r"column 'q' \(the map's problem\) is null"):
        read_row({"q": None, "a": 1}, {"problem": "q", "answer": "a"})
    with pytest.raises(BadRow, match="neither a gold answer nor a demonstration"):
        read_row({"q": "x", "a": None}, {"problem": "q", "answer": "a"})


# --------------------------------------------------------------------------------------------------------------- sameness

APART = [
    ("Compute 1.5+2", "Compute 15+2"),
    ("Solve x ≤ 3", "Solve x ≥ 3"),
    ("Simplify $\\sqrt2$", "Simplify $2$"),
    ("Simplify √2", "Simplify 2"),
    ("Find |x|", "Find x"),
    ("Find the length of (1,2)", "Find the length of [1,2]"),
    ("Express M in kg", "Express m in kg"),
    ("Is $AB = ab$", "Is $ab = AB$"),
    ("What is 5!?", "What is 5?"),
    ("Add 1, 234", "Add 1,234"),
    ("Add 2 3", "Add 23"),
    ("The sum of 3 -2", "The sum of 3-2"),
    ("Find x²", "Find x2"),
    ("What is f'(1)", "What is f(1)"),
    ("Evaluate 10%", "Evaluate 10"),
    ("Evaluate ⌊x⌋", "Evaluate ⌈x⌉"),
    ("Is A ∪ B empty", "Is A ∩ B empty"),
    ("Find 3:4", "Find 34"),
    ("Write $\\{1\\}$", "Write $1$"),
]
TOGETHER = [
    ("What is $1+2$?", "what is  1 + 2"),
    ("How many cats?", "How many\n CATS"),
    ("Let \\(x\\) be 3. Find $x$.", "let $x$ be 3. find \\(x\\)"),
    ("Solve \\[x = 1\\]", "Solve $$x=1$$"),
]


@pytest.mark.parametrize(("a", "b"), APART)
def test_problems_that_differ_are_kept_apart(a, b):
    assert problem_key(a) != problem_key(b)


@pytest.mark.parametrize(("a", "b"), TOGETHER)
def test_problems_that_are_set_otherwise_are_one(a, b):
    assert problem_key(a) == problem_key(b)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_another_gold_for_the_same_problem_is_named_with_both_places(tmp_path):
    rows = [
        {"problem": "What is 1/2 + 1/2?", "answer": "1"},
        {"problem": "what is  1/2+1/2", "answer": "1.0"},
        {"problem": "What is 1/2 + 1/2", "answer": "2"},
        {"problem": "What is 1.5+2?", "answer": "3.5"},
        {"problem": "What is 15+2?", "answer": "17"},
    ]
    path, store = write(tmp_path / "a.jsonl", rows), Store()
    tally = load("data", [Source(path)], lambda key: store)
    assert [p.answer for p in store] == ["1", "3.5", "17"] and [p.place for p in store][1] == f"{path}:4"
    assert tally.counts == {"duplicate": 1, "duplicate with another gold answer (the first is used)": 1}
    assert f"{path}:3: '2' here, '1' at {path}:1" in "\n".join(tally.lines())


def test_rows_without_a_gold_are_demonstrations_alone_and_no_benchmark_takes_them(tmp_path):
    rows = [{"messages": chat(Q, "It is so.")}, {"messages": chat("And 6 times 8?", "So \\boxed{48}.")}]
    path, store = write(tmp_path / "a.jsonl", rows), Store()
    tally = load("data", [Source(path)], lambda key: store)
    assert (tally.kept, tally.demos, list(store.with_answer), list(store.with_demo)) == (2, 2, [1], [0, 1])
    strict = Store()
    tally = load("data", [Source(path)], lambda key: strict, needed="gold")
    assert tally.counts == {"no gold answer": 1} and [p.answer for p in strict] == ["48"]


def test_fingerprints_name_the_sets_that_a_problem_stands_in():
    f = Fingerprints()
    f.add("What is 2+2?", "a")
    f.add("What is 2 + 2", "b")
    f.add("What is 5!", "b")
    assert f.overlap("what is $2+2$") == ["a", "b"] and f.overlap("What is 5!?") == ["b"]
    assert f.overlap("What is 5") == [] and f.overlap("What is 2.2") == []
