"""eval --benchmarks: figures, files, resuming, the command; and what a dry run looks at."""

import itertools
import json
from pathlib import Path

import pytest
from fakes import make_checkpoint
from transformers import AutoTokenizer

from amft_fast import cli, config_file
from amft_fast.errors import UserError
from amft_fast.interfaces import Completion
from amft_fast.rollout.encoder import Encoder
from amft_fast.run import preflight
from amft_fast.run.evaluate import pass_at_k
from amft_fast.study import benchmarks
from amft_fast.study.benchmarks import Answers, Settings, aligned, evaluate, figures, table
from amft_fast.tasks.math.benchmarks import Benchmark

ROOT = Path(__file__).resolve().parent.parent


def test_results_are_replaced_whole_or_not_at_all(tmp_path, file_limit):
    benchmarks.write_results(tmp_path, Settings("before"), {})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert sorted(before) == ["results.html", "results.json", "results.md"]
    with file_limit(50), pytest.raises(UserError, match=r"results\.json cannot be written: File too large"):
        benchmarks.write_results(tmp_path, Settings("after"), {})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_answer():
    for n in range(1, 8):
        for correct in range(n + 1):
            answers = [i < correct for i in range(n)]
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(answers, k))
                assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_figures_by_hand():
    def row(right, tokens=10, truncated=False, answer="1"):
        return {"right": right, "tokens": tokens, "truncated": truncated, "answer": answer}

    rows = {"a": [row(True), row(True), row(False, 30, True, None), row(True)], "b": [row(False)] * 4}
    f = figures(Answers(Benchmark(name="x", source="y"), 4, rows))
    assert f["problems"] == 2 and f["samples"] == 4 and f["mean"] == 3 / 8
    # Rates 3/4 and 0 about their mean 3/8: variance 2 (3/8)^2 / 1, over two problems.
    assert f["stderr"] == pytest.approx(3 / 8)
    assert f["pass_at"] == {1: 3 / 8, 2: 0.5, 4: 0.5}
    assert f["tokens"] == 100 / 8 and f["truncated"] == 1 / 8 == f["no_answer"]
    lines = aligned(table({"x": f, "y": f})).splitlines()
    assert lines[1].split() == ["x", "2", "4", "37.5", "37.5", "50.0", "12", "12.5", "12.5"]
    assert lines[-1].split() == ["mean", "37.5", "26.5"]


class Parrot:
    """Answers each request with a word by its seed; stops for good after `limit` calls."""

    def __init__(self, encoder, limit=10**9):
        self.encoder, self.limit, self.asked = encoder, limit, []

    def generate(self, requests, sampling):
        if len(self.asked) >= self.limit:
            raise InterruptedError
        self.asked.append(len(requests))
        out = []
        for r in requests:
            ids = self.encoder.response("yes" if r.seed % 2 else "no")
            out.append(Completion(ids, [0.0] * len(ids), "stop", 0))
        return out


@pytest.fixture(scope="module")
def encoder(checkpoint_folder):
    return Encoder(AutoTokenizer.from_pretrained(checkpoint_folder))


@pytest.fixture
def benchmark(tmp_path):
    path = tmp_path / "words.jsonl"
    rows = [{"problem": f"{a} {b}", "answer": "\\text{yes}"} for a in "abcde" for b in "abcde"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Benchmark(name="words", source=str(path), samples=4)


@pytest.fixture
def bare_words(monkeypatch):
    """The answer is the whole response: the test tokenizer has no box."""
    for name in ("tasks.math.reward.final_answer", "tasks.math.task.extract", "study.benchmarks.extract"):
        monkeypatch.setattr(f"amft_fast.{name}", lambda text: text.strip() or None)


SETTINGS = Settings("model", system_prompt="", max_new_tokens=8)


@pytest.mark.usefixtures("bare_words")
def test_what_was_broken_off_is_gone_on_with(encoder, benchmark, tmp_path):
    def run(engine, out, settings=SETTINGS, at_once=20):
        return evaluate(engine, encoder, [benchmark], settings, tmp_path / out, at_once, lambda text: None)

    whole = Parrot(encoder)
    want = run(whole, "whole")
    assert whole.asked == [20] * 5 and 0.2 < want["words"]["mean"] < 0.8

    with pytest.raises(InterruptedError):
        run(Parrot(encoder, limit=2), "parts")
    file = tmp_path / "parts" / "words.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + 40
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:30])  # a crash in the middle of a line
    rest = Parrot(encoder)
    assert run(rest, "parts") == want
    assert sum(rest.asked) == 100 - 36  # the problem with the broken line is drawn anew, all others are kept
    rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    other = [json.loads(line) for line in (tmp_path / "whole" / "words.jsonl").read_text().splitlines()[1:]]
    assert sorted(rows, key=str) == sorted(other, key=str) and len(rows) == 100
    again = Parrot(encoder)
    assert run(again, "parts") == want and again.asked == []
    assert run(Parrot(encoder), "small", at_once=4) == want  # how many at once changes nothing
    with pytest.raises(UserError, match=r"other settings \(temperature\): take another --out"):
        run(Parrot(encoder), "parts", Settings("model", system_prompt="", max_new_tokens=8, temperature=1.0))


@pytest.mark.usefixtures("bare_words")
def test_results_are_written_for_people_and_for_programs(encoder, benchmark, tmp_path):
    results = evaluate(
        Parrot(encoder),
        encoder,
        [benchmark],
        Settings("<model>", limit=7, samples=2),
        tmp_path / "o",
        8,
        lambda text: None,
    )
    stored = json.loads((tmp_path / "o" / "results.json").read_text())
    assert stored["results"]["words"]["mean"] == results["words"]["mean"] and results["words"]["problems"] == 7
    assert results["words"]["samples"] == 2 and stored["settings"]["limit"] == 7
    text, page = ((tmp_path / "o" / f"results.{e}").read_text() for e in ("md", "html"))
    assert "| words | 7 | 2 |" in text and "| benchmark | k = 1 | k = 2 |" in text
    assert "| words | \\text{yes} | no | wrong |" in text and "Answers beside their golds" in page
    assert "&lt;model&gt;" in page and "<model>" not in page and "words" in page


def test_the_command_from_end_to_end(tmp_path, capsys):
    command = ["eval", str(ROOT / "configs" / "math_base"), "--benchmarks", "sample", "--limit", "6", "--samples", "2"]
    command += ["--max-new-tokens", "12", "--system-prompt", "", "--out", str(tmp_path)]
    command += ["--benchmarks-file", str(ROOT / "configs" / "benchmarks.toml")]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert "avg@n" in first and "sample: 6 of 6 problems" in first
    rows = [json.loads(line) for line in (tmp_path / "sample.jsonl").read_text().splitlines()[1:]]
    assert [(r["sample"], r["tokens"] <= 12) for r in rows] == [(0, True), (1, True)] * 6
    assert cli.main(command) == 0
    again = capsys.readouterr().out
    assert "6 of 6" not in again and again.splitlines()[-2] == first.splitlines()[-2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--benchmarks", "aime23"], "no benchmark 'aime23': known are aime24"),
        (["--benchmarks", "x=nothing.jsonl"], "no data file 'nothing.jsonl'"),
        (["--benchmarks", "sample", "--samples", "0"], "--samples must be at least 1, got 0"),
        (["--benchmarks", "sample", "--temperature", "nan"], "--temperature must be at least 0, got nan"),
        (["--benchmarks", "sample", "--temperature", "1e-300"], "--temperature must be 0 (greedy) or at least 0.0001"),
        (["--benchmarks", "sample", "--top-p", "1.5"], "--top-p must be at most 1, got 1.5"),
        (["--benchmarks", "sample", "--benchmarks-file", "none.toml"], "no benchmarks file 'none.toml'"),
        (["--benchmarks", "sample", "--model.dtyp", "bf16"], "did you mean model.dtype"),
    ],
)
def test_mistakes_of_the_command_are_one_sentence(options, said, tmp_path, capsys):
    command = ["eval", str(ROOT / "configs" / "math_base"), "--out", str(tmp_path / "o"), *options]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1]


def test_a_config_is_no_model(capsys):
    assert cli.main(["eval", "configs/math_tiny.toml", "--benchmarks", "sample"]) == 2
    assert "takes a checkpoint folder or hub name" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- dry runs


@pytest.mark.parametrize("name", ["math_qwen2.5_1.5b", "math_qwen2.5_7b"])
def test_the_real_configs_pass_a_dry_run_without_the_hub(name, capsys, monkeypatch):
    def unreachable(self, kind, name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(preflight.Hub, "_ask", unreachable)
    assert cli.main(["train", str(ROOT / "configs" / f"{name}.toml"), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "rope_theta = 40000" in out and 'name = "math"' in out
    assert "the Hugging Face hub cannot be reached from here (ConnectionError: no route to host)" in err
    assert "model Qwen/Qwen2.5-Math" in err and "dataset Elliott/Openr1-Math-46k-8192" in err


def test_a_dry_run_with_the_hub_says_what_it_does_not_have(monkeypatch):
    cfg = config_file.load(ROOT / "configs" / "math_qwen2.5_1.5b.toml")
    monkeypatch.setattr(preflight.Hub, "_ask", lambda self, kind, name: True)
    lines = preflight.check(cfg)
    assert "training data: dataset: Elliott/Openr1-Math-46k-8192, on the hub" in lines and not any(
        "cannot" in x for x in lines
    )
    monkeypatch.setattr(preflight.Hub, "_ask", lambda self, kind, name: kind == "model")
    with pytest.raises(UserError, match="the Hugging Face hub has none of this name"):
        preflight.check(cfg)


def test_a_dry_run_reads_the_first_rows_of_files(tmp_path, capsys):
    tiny = str(ROOT / "configs" / "math_tiny.toml")
    assert cli.main(["train", tiny, "--dry-run"]) == 0
    assert "train.jsonl, layout plain" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    assert cli.main(["train", tiny, "--dry-run", "--task.math.train", json.dumps([str(tmp_path / "bad.jsonl")])]) == 2
    assert "no usable row among the first 1000 of" in capsys.readouterr().err


def test_a_trained_checkpoint_is_evaluated_with_another_rope(tmp_path, capsys):
    folder = make_checkpoint(tmp_path / "m")
    (tmp_path / "b.jsonl").write_text('{"problem": "a b", "answer": "1"}\n')
    command = ["eval", str(folder), "--benchmarks", f"b={tmp_path / 'b.jsonl'}", "--max-new-tokens", "4"]
    command += ["--model.rope_theta", "40000", "--out", str(tmp_path / "o"), "--rollout.max_batch_tokens", "64"]
    assert cli.main(command) == 0
    head = json.loads((tmp_path / "o" / "b.jsonl").read_text().splitlines()[0])
    assert head["settings"]["rope_theta"] == 40000 and benchmarks.HEAD[3] == "avg@n"
