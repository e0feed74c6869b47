"""Rows, layouts, splits, decontamination, tallies."""

import json
import re
import subprocess
import sys

import pytest

from amft_fast import cli, config_file
from amft_fast.config import MathConfig
from amft_fast.errors import UserError
from amft_fast.tasks.math.benchmarks import Benchmark, pick, read_benchmarks
from amft_fast.tasks.math.data import Limits, Store, load
from amft_fast.tasks.math.layouts import read_row, recognise
from amft_fast.tasks.math.sameness import Fingerprints, problem_key
from amft_fast.tasks.math.sources import BadRow, Source
from amft_fast.tasks.math.task import BenchmarkTask, MathTask, Prompting

CHAT = [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is 6 times 7?"}]
CHOICES = "What is it?\n\nA) one\nB) two"
LAYOUT_ROWS = {
    "verl": (
        {
            "prompt": CHAT,
            "reward_model": {"ground_truth": "42"},
            "target": [{"role": "assistant", "content": "It is 42."}],
        },
        ("What is 6 times 7?", "42", "It is 42.", "Think.", False),
    ),
    "gsm8k": (
        {"question": "Six sevens?", "answer": "6*7 = <<6*7=42>>42.\n#### 42"},
        ("Six sevens?", "42", "6*7 = 42.\nThe answer is \\boxed{42}.", None, False),
    ),
    "math": (
        {"problem": "Find it.", "solution": "So $\\boxed{\\frac{1}{2}}$."},
        ("Find it.", "\\frac{1}{2}", "So $\\boxed{\\frac{1}{2}}$.", None, False),
    ),
    "arc": (
        {"question": "What is it?", "choices": {"text": ["one", "two"], "label": ["1", "2"]}, "answerKey": "2"},
        (CHOICES, "B", None, None, True),
    ),
    "mmlu": (
        {"question": "What is it?", "options": ["one", "two"], "answer": "B"},
        (CHOICES, "B", None, None, True),
    ),
    "plain": ({"prompt": "P?", "response": "R", "answer": 27.0}, ("P?", "27", "R", None, False)),
}


@pytest.mark.parametrize("name", LAYOUT_ROWS)
def test_layouts_are_recognised_by_themselves(name):
    row, want = LAYOUT_ROWS[name]
    assert recognise(row) == name
    read = read_row(row)
    assert (read.problem, read.answer, read.response, read.system, read.choices) == want and read.history == ()


def test_gpqa_options_are_shuffled_by_the_question_alone():
    letters = set()
    for i in range(40):
        row = {
            "Question": f"Which {i}?",
            "Correct Answer": "right",
            **{f"Incorrect Answer {k}": f"no{k}" for k in (1, 2, 3)},
        }
        read = read_row(row)
        assert read == read_row(dict(reversed(row.items()))) and read.choices
        assert f"{read.answer}) right" in read.problem
        letters.add(read.answer)
    assert letters == set("ABCD")


def test_chat_with_choices_in_its_text_is_a_multiple_choice():
    row = {"prompt": [{"role": "user", "content": CHOICES}], "reward_model": {"ground_truth": "B"}}
    assert read_row(row).choices
    assert not read_row(LAYOUT_ROWS["verl"][0]).choices


def test_any_other_layout_is_mapped():
    row = {"q": {"text": "What?"}, "gold": 4, "demo": "It is 4."}
    assert recognise(row) is None
    read = read_row(row, {"problem": "q.text", "answer": "gold", "response": "demo"})
    assert (read.problem, read.answer, read.response) == ("What?", "4", "It is 4.")
    with pytest.raises(BadRow, match="no column 'gold'"):
        read_row({"q": {"text": "x"}}, {"problem": "q.text", "answer": "gold"})
    with pytest.raises(BadRow, match="are of no known layout"):
        read_row(row)
    with pytest.raises(UserError, match="columns must map problem and answer"):
        read_row(row, {"problem": "q"})


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_unusable_rows_are_counted_and_named_with_file_and_row(tmp_path):
    good = {"prompt": "How many legs have three cats?", "response": "12", "answer": "12"}
    rows = [
        good,
        "{not json",
        '["a", "list"]',
        {"prompt": "", "answer": "5"},
        {"prompt": "No answer here", "answer": ""},
        {"prompt": "word " * 5000, "answer": "5"},
        {"prompt": "how many  legs have three CATS?", "answer": "12"},
        {"prompt": "Long demo", "response": "word " * 50_000, "answer": "1"},
        {"prompt": "Wrong demo", "response": "so \\boxed{2}", "answer": "1"},
        {"prompt": "Empty demo", "response": "  ", "answer": "1"},
        {"prompt": {"no": "text"}, "answer": "1"},
        {"prompt": "Bad answer", "answer": None},
    ]
    path, store = write(tmp_path / "rows.jsonl", rows), Store()
    tally = load("data", [Source(path)], lambda key: store)
    assert tally.rows == 12 and tally.kept == 4 == len(store) and tally.demos == 1
    assert {k.split(" (")[0]: n for k, n in tally.counts.items()} == {
        "malformed": 4,
        "empty": 2,
        "over-long problem": 1,
        "duplicate": 1,
        "over-long demonstration": 1,
        "demonstration with another answer": 1,
        "empty demonstration": 1,
    }
    text = "\n".join(tally.lines())
    for place in (
        "rows.jsonl:2: no JSON",
        "rows.jsonl:3: no JSON object but list",
        "rows.jsonl:4: no problem",
        "rows.jsonl:7",
    ):
        assert place in text, text
    assert store[0].problem == good["prompt"] and store[0].response == "12"
    assert [p.problem for p in store][1:] == ["Long demo", "Wrong demo", "Empty demo"]


def test_lengths_are_counted_by_the_tokenizer_that_is_given(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a b c d", "answer": "1"}, {"prompt": "a b", "answer": "1"}])
    store = Store()
    limits = Limits(3, 3, lambda texts: [len(t.split()) for t in texts])
    assert load("data", [Source(path)], lambda key: store, limits=limits).kept == 1 and store[0].problem == "a b"


def test_a_file_without_a_usable_row_is_an_error_that_says_what_was_looked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x"}, "{"])
    with pytest.raises(
        UserError, match=r"no usable row among the 2 of .*a.jsonl \(2 malformed\); looked for one of the layouts"
    ):
        load("data", [Source(path)], lambda key: Store())
    with pytest.raises(UserError, match=r"looked for the columns q \(problem\), a \(answer\)"):
        load("data", [Source(path)], lambda key: Store(), columns={"problem": "q", "answer": "a"})
    with pytest.raises(UserError, match="no data file"):
        load("data", [Source(str(tmp_path / "missing.jsonl"))], lambda key: Store())
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"b.parquet' (cannot be read as Parquet|takes pyarrow)"):
        load("data", [Source(str(tmp_path / "b.parquet"))], lambda key: Store())
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(UserError, match="must hold a JSON list"):
        load("data", [Source(str(tmp_path / "c.json"))], lambda key: Store())


def test_parquet_is_read_as_jsonl_is(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(600)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", rows)
    stores = []
    for name in ("a.parquet", "a.jsonl"):
        stores.append(Store())
        load("data", [Source(str(tmp_path / name))], lambda key: stores[-1])
    assert list(stores[0]) == list(stores[1]) and len(stores[0]) == 600


def test_a_dataset_is_streamed_by_name(tmp_path):
    """A folder stands for the hub: datasets reads both alike."""
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        write(folder / f"{split}.jsonl", [{"question": f"{split} {i}?", "answer": f"{i}"} for i in range(3)])
    for text, split, want in ((str(folder), "test", "test"), (f"{folder}@train", "test", "train")):
        rows = list(Source(text, split).rows())
        assert [row["question"] for _, row in rows] == [f"{want} {i}?" for i in range(3)]
        assert rows[1][0] == f"{text}:2"
    with pytest.raises(UserError, match="is a folder that datasets cannot read: "):
        list(Source(f"{folder}@nosplit").rows())


# ------------------------------------------------------------------------------------------------------------------ splits


def numbered(tmp_path, n, name="train.jsonl", start=0):
    rows = [
        {"prompt": f"What is {i} plus {i}?", "response": f"\\boxed{{{2 * i}}}", "answer": str(2 * i)}
        for i in range(start, n)
    ]
    return write(tmp_path / name, rows)


def test_splits_hang_on_the_text_of_a_problem_alone(tmp_path):
    small = MathTask(MathConfig(train=[numbered(tmp_path, 500)], val_share=0.2, test_share=0.1))
    large = MathTask(MathConfig(train=[numbered(tmp_path, 900, "more.jsonl", 200)], val_share=0.2, test_share=0.1))
    of = [{item.id: split for split in task.splits for item in task.prompts(split)} for task in (small, large)]
    both = of[0].keys() & of[1].keys()
    assert len(both) == 300 and all(of[0][i] == of[1][i] for i in both)
    assert 60 < len(small.prompts("val")) < 140 and 20 < len(small.prompts("test")) < 80
    assert sum(len(small.prompts(s)) for s in small.splits) == 500
    assert small.splits == ("train", "val", "test")
    with pytest.raises(ValueError, match="split must be one of train, val, test, got 'ood'"):
        small.prompts("ood")


def test_prompts_and_demos_are_sized_and_indexable(tmp_path):
    task = MathTask(MathConfig(train=[numbered(tmp_path, 50)], val_share=0.2))
    prompts, demos = task.prompts("train"), task.demos("train")
    assert (
        len(prompts) == len(demos) == len(list(prompts)) and len(prompts[3:7]) == 4 and prompts[-1] == list(prompts)[-1]
    )
    assert [d.id for d in demos] == [p.id for p in prompts]
    assert demos[0].messages == tuple(task.start(prompts[0]).messages)
    assert demos[0].response.startswith("\\boxed{")


def test_training_problems_that_stand_in_an_evaluation_set_are_dropped_and_counted(tmp_path):
    planted = (
        "A farmer has some sheep and some hens and he counts forty heads and one hundred legs in all; how many hens?"
    )
    long = "It is told that on a hill a farmer has some sheep and some hens and he counts forty heads and more. Why?"
    bench = write(
        tmp_path / "bench.jsonl", [{"problem": planted, "answer": "30"}, {"problem": "What is 2+2?", "answer": "4"}]
    )
    rows = [
        {"prompt": planted.upper().replace(";", " ,"), "answer": "30"},  # the same but for case and punctuation
        {"prompt": long, "answer": "1"},  # 13 words in a row
        {"prompt": "what is $2 + 2$", "answer": "4"},
        {"prompt": "What is 2-2?", "answer": "0"},
        {"prompt": "A farmer has some sheep and some hens. How many hens?", "answer": "3"},
    ]
    task = MathTask(
        MathConfig(
            train=[write(tmp_path / "train.jsonl", rows)],
            benchmarks=[bench],
            benchmarks_file="configs/benchmarks.toml",
            val_share=0,
        )
    )
    assert task.splits[-1] == "bench" and len(task.prompts("bench")) == 2
    assert [p.data.problem for p in task.prompts("train")] == [rows[3]["prompt"], rows[4]["prompt"]]
    assert task.tallies[-1].counts == {"also in an evaluation set": 3}
    only = MathTask(
        MathConfig(
            train=[str(tmp_path / "train.jsonl")], decontaminate=[bench], benchmarks_file="configs/benchmarks.toml"
        )
    )
    said = "\n".join(only.prepare())
    assert only.tallies[-1].counts == {"also in an evaluation set": 3} and only.splits == ("train", "val", "test")
    assert "problems that are in an evaluation set too, left out, by set: bench 3" in said


def test_the_overlap_with_each_benchmark_is_counted_and_may_be_kept(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"problem": f"What is {i} plus 1?", "answer": str(i + 1)} for i in range(5)])
    b = write(tmp_path / "b.jsonl", [{"problem": f"What is {i} plus 1?", "answer": str(i + 1)} for i in range(3, 20)])
    c = write(tmp_path / "c.jsonl", [{"problem": "What is 7 times 8?", "answer": "56"}])
    sets = {"train": [a], "benchmarks": [b, f"other={c}"], "benchmarks_file": "", "val_share": 0}
    task = MathTask(MathConfig(**sets))
    assert "left out, by set: b 2, other 0" in "\n".join(task.prepare()) and len(task.prompts("train")) == 3
    kept = MathTask(MathConfig(**sets, drop_overlap=False))
    said = "\n".join(kept.prepare())
    assert "kept, as task.math.drop_overlap is false, by set: b 2, other 0" in said and len(kept.prompts("train")) == 5


def test_problems_alone_are_enough_to_be_kept_out_of_training(tmp_path):
    train = write(tmp_path / "a.jsonl", [{"problem": f"What is {i} plus 1?", "answer": str(i + 1)} for i in range(5)])
    for row in ({"question": "What is 2 plus 1?"}, {"problem": "What is 2 plus 1?", "answer": None}):
        hidden = write(tmp_path / "hidden.jsonl", [row])
        task = MathTask(MathConfig(train=[train], decontaminate=[hidden], benchmarks_file="", val_share=0))
        said = "\n".join(task.prepare())
        assert "benchmark hidden: 1 rows, 1 problems used" in said and "left out, by set: hidden 1" in said
        with pytest.raises(UserError, match="benchmark hidden: no usable row"):
            MathTask(MathConfig(train=[train], benchmarks=[hidden], benchmarks_file="")).prepare()


def test_rows_without_a_gold_are_shown_but_not_asked(tmp_path):
    rows = [{"prompt": f"Why {i}?", "completion": "So."} for i in range(40)]
    rows += [{"prompt": f"What is {i}?", "completion": f"\\boxed{{{i}}}"} for i in range(40)]
    task = MathTask(MathConfig(train=[write(tmp_path / "a.jsonl", rows)], val_share=0.3))
    said = "\n".join(task.prepare())
    assert "80 rows, 80 problems used, 80 with a demonstration, 40 without a gold answer" in said
    assert sum(len(task.prompts(s)) for s in task.splits) == 40 and sum(len(task.demos(s)) for s in task.splits) == 80


def test_a_prompt_of_several_turns_keeps_them(tmp_path):
    turns = [{"role": r, "content": c} for r, c in (("user", "1+1?"), ("assistant", "2"), ("user", "And 2+2?"))]
    task = MathTask(MathConfig(train=[write(tmp_path / "a.jsonl", [{"prompt": turns, "answer": "4"}])], val_share=0))
    messages = task.start(task.prompts("train")[0]).messages
    assert [m.role for m in messages] == ["system", "user", "assistant", "user"]
    assert [m.content for m in messages[1:]] == ["1+1?", "2", "And 2+2?"]


def test_twelve_words_in_a_row_are_no_overlap():
    words = [f"w{i}" for i in range(40)]
    f = Fingerprints()
    f.add(" ".join(words))
    assert f.overlap("x " + " ".join(words[10:23]) + " y") and not f.overlap("x " + " ".join(words[10:22]) + " y")
    assert problem_key("What is $1+2$?") == problem_key("what is 1 + 2") != problem_key("what is 1 - 2")


# ------------------------------------------------------------------------------------------------------ prompts, benchmarks


def test_the_system_prompt_is_ours_and_replaceable(tmp_path):
    verl = LAYOUT_ROWS["verl"][0]
    path = write(tmp_path / "a.jsonl", [verl])
    for options, want in (
        ({}, "\\boxed{}"),
        ({"thinking": True}, "</think>"),
        ({"system_prompt": "Mine."}, "Mine."),
        ({"keep_system": True}, "Think."),
    ):
        task = MathTask(MathConfig(train=[path], val_share=0, **options))
        first, second = task.start(task.prompts("train")[0]).messages
        assert (first.role, second.role) == ("system", "user") and want in first.content
    task = MathTask(MathConfig(train=[path], val_share=0, system_prompt=""))
    assert [m.role for m in task.start(task.prompts("train")[0]).messages] == ["user"]


def test_episodes_are_judged_together_and_apart_alike(tmp_path):
    rows = [{"prompt": "x?", "answer": "x+1"}, LAYOUT_ROWS["arc"][0], {"prompt": "y?", "answer": "3"}]
    task = MathTask(MathConfig(train=[write(tmp_path / "a.jsonl", rows)], val_share=0, format_weight=0.25))
    items = list(task.prompts("train"))
    texts = ["so \\boxed{x + 1}", "the answer is B", "\\boxed{4}"]
    together = task.step_all([task.start(i) for i in items], texts)
    assert together == [task.start(i).step(t) for i, t in zip(items, texts)]
    assert [r.reward for r in together] == [1.25, 1.0, 0.25]
    assert [r.info["success"] for r in together] == [True, True, False] and all(r.done for r in together)
    assert [r.info["format"] for r in together] == [1.0, 0.0, 1.0]


def test_benchmarks_by_name_file_and_override(tmp_path):
    known = read_benchmarks("configs/benchmarks.toml")
    assert known["aime24"].samples == 32 and known["math500"].samples == 1
    assert {"aime25", "amc23", "minerva", "olympiad", "arc_c", "gpqa_diamond", "mmlu_pro"} <= set(known)
    a, b, c = pick(known, ["aime24", "amc23=my/file.jsonl", "other/set.jsonl"])
    assert (a.source, a.samples) == ("HuggingFaceH4/aime_2024@train", 32)
    assert (b.name, b.source, b.samples, b.keep) == ("amc23", "my/file.jsonl", 32, {})
    assert (c.name, c.samples) == ("set", 1)
    with pytest.raises(UserError, match="no benchmark 'aime23': known are aime24"):
        pick(known, ["aime23"])
    with pytest.raises(UserError, match="'aime24' is asked for twice"):
        pick(known, ["aime24", "aime24=x.jsonl"])
    path = tmp_path / "b.toml"
    for text, said in (
        ("[a]\nsorce = 'x'", r"\[a\]"),
        ("a = 1", r"\[a\]"),
        ("[a", "not valid TOML"),
        ("[a]\nsource='x'\nsamples=0", "samples"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            read_benchmarks(path)
    with pytest.raises(UserError, match="no benchmarks file"):
        read_benchmarks(tmp_path / "none.toml")
    for name in ("val=x.jsonl", "a/b=x.jsonl", "x" * 300 + "=x.jsonl", "../x=y/z"):
        with pytest.raises(UserError, match="the name becomes a split and a file"):
            pick(known, [name])


def test_benchmarks_that_bring_their_own_file_need_no_benchmarks_file(tmp_path, monkeypatch, capsys):
    """Outside the repository there is none, and its default name must not be asked for."""
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "b.jsonl", [{"problem": "What is 2+2?", "answer": "4"}])
    train = numbered(tmp_path, 20)
    for name in (f"x={file}", file, "b.jsonl"):
        task = MathTask(MathConfig(train=[train], benchmarks=[name], benchmarks_file="benchmarks.toml"))
        assert len(task.prompts("x" if "=" in name else "b")) == 1
    with pytest.raises(UserError, match=r"no benchmarks file 'benchmarks.toml'"):
        MathTask(MathConfig(train=[train], benchmarks=["aime24"], benchmarks_file="benchmarks.toml"))
    (tmp_path / "c.toml").write_text(
        f'[task]\nname = "math"\n[task.math]\ntrain = ["*.jsonl"]\nbenchmarks = ["x={file}"]\n'
    )
    assert cli.main(["train", "c.toml", "--dry-run"]) == 0
    assert "benchmark x: " in capsys.readouterr().err


def test_globs_and_names_are_looked_up_beside_the_config_file(tmp_path):
    numbered(tmp_path, 5)
    (tmp_path / "c.toml").write_text('[task.math]\ntrain = ["*.jsonl", "none*.jsonl", "x/y"]\n')
    found = config_file.load(tmp_path / "c.toml").task.math.train
    assert found == [f"{tmp_path.resolve()}/*.jsonl", "none*.jsonl", "x/y"]
    (tmp_path / "c.toml").write_text(f'[task.math]\ntrain = ["{"x" * 300}.jsonl"]\n')
    with pytest.raises(UserError, match=r"task\.math\.train: is too long for a path: .* 255 between slashes"):
        config_file.load(tmp_path / "c.toml")


def test_one_benchmark_out_of_a_file_of_several(tmp_path):
    rows = [{"problem": f"{kind} {i}?", "answer": str(i), "kind": kind} for kind in ("a", "b") for i in range(5)]
    path = write(tmp_path / "all.jsonl", [*rows, *rows])
    task = BenchmarkTask(Benchmark(name="b", source=path, keep={"kind": "b"}), Prompting(""))
    assert [i.data.problem for i in task.prompts("test")] == [f"b {i}?" for i in range(5)]
    assert task.tally.counts == {"duplicate": 5}
    with pytest.raises(UserError, match="none had the values asked for"):
        BenchmarkTask(Benchmark(name="c", source=path, keep={"kind": "c"}), Prompting(""))


def test_everything_of_the_task_imports_without_the_extras(tmp_path):
    code = (
        "import sys\nfor m in ('datasets', 'pyarrow', 'mpmath', 'torch'): sys.modules[m] = None\n"
        "import amft_fast.tasks.math.pool, amft_fast.tasks.math.task, amft_fast.tasks.math.worker\n"
        "from amft_fast.tasks.math.sources import Source\nfrom amft_fast.errors import UserError\n"
        "for text in sys.argv[1:]:\n"
        "    try: next(Source(text).rows())\n"
        "    except UserError as e: print(e)\n"
    )
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    (tmp_path / "x.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    names = ["some/dataset", str(tmp_path / "x.parquet"), str(tmp_path / "x.jsonl.zst")]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    takes = re.findall(r"takes (\w+): pip install 'amft-fast\[math\]'", done.stdout)
    assert takes == ["datasets", "pyarrow", "pyarrow"], done.stdout
