"""What training on mathematics needs of the loop: reading ahead, buckets, dynamic sampling, judging at once, rope_theta, and
configs/math_tiny.toml from end to end."""

import json
import threading
from pathlib import Path

import pytest
import torch
from fakes import CopyTask, ScriptedEngine, make_checkpoint

from amft_fast import cli, config_file
from amft_fast.config import ModelConfig
from amft_fast.data.loader import Loader
from amft_fast.data.stream import Stream
from amft_fast.errors import UserError
from amft_fast.interfaces import Completion, Item, Request, Sample, Sampling
from amft_fast.model.policy import load_model
from amft_fast.rollout import episodes
from amft_fast.rollout.buckets import Bucketed, buckets
from amft_fast.rollout.dynamic import draw_with_spread
from amft_fast.rollout.encoder import Encoder
from amft_fast.rollout.vllm.setup import changed_positions
from amft_fast.tasks.math import tiny as math_tiny

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------------------------ reading ahead


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_resume_in_mid_epoch_sees_each_row_exactly_once(workers):
    """Two epochs and a bit of 50 rows by 8, stopped and begun anew at every checkpoint: the order is that of one go."""
    whole = Stream(50, 3, "demos").take(112)
    seen, position = [], 0
    while len(seen) < 112:
        loader = Loader(Stream(50, 3, "demos"), lambda i: i, workers)  # a new process, as it were
        loader.stream.position = position
        for _ in range(2):
            seen += loader.take(8)
        position = loader.stream.position
        loader.close()
    assert seen == whole
    for epoch in range(2):
        assert sorted(seen[50 * epoch : 50 * (epoch + 1)]) == list(range(50))


def test_rows_are_made_ahead_by_other_threads_and_the_position_does_not_count_them():
    names = set()

    def make(i):
        names.add(threading.current_thread().name)
        return i * i

    loader = Loader(Stream(100, 0, "demos"), make, 2)
    assert loader.take(10) == [i * i for i in Stream(100, 0, "demos").take(10)]
    assert loader.stream.position == 10 and len(loader._ahead) == 10
    loader.stream.position = 5  # a step that was broken off is done again
    assert loader.take(10) == [i * i for i in Stream(100, 0, "demos").take(15)[5:]]
    assert not any(name.startswith("Main") for name in names)
    loader.close()


def test_a_row_that_cannot_be_made_is_an_error_where_it_is_taken():
    def make(i):
        raise ValueError("row 7 is bad")

    for workers in (0, 2):
        with pytest.raises(ValueError, match="row 7 is bad"):
            Loader(Stream(10, 0, "x"), make, workers).take(1)


# ------------------------------------------------------------------------------------------------------------------ buckets


def requests(lengths, new=10):
    return [Request(tuple(range(n)), i, new) for i, n in enumerate(lengths)]


def test_buckets_hold_like_lengths_and_never_more_tokens_than_allowed():
    lengths = [5, 300, 6, 7, 280, 5, 5, 290, 900, 40]
    asked = requests(lengths)
    found = buckets(asked, 700)
    assert sorted(i for b in found for i in b) == list(range(len(lengths)))
    for b in found:
        width = max(lengths[i] for i in b)
        assert len(b) == 1 or len(b) * (width + 10) <= 700
    assert [lengths[i] for i in found[-1]] == [900]
    padding = sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in found)
    assert padding < 0.15 * sum(lengths) < max(lengths) * len(lengths) - sum(lengths)


class Echo:
    """Answers each request with its own seed, and counts what it is asked at once."""

    def __init__(self):
        self.batches, self.synced, self.closed = [], [], False

    def generate(self, asked, sampling):
        self.batches.append(len(asked))
        return [Completion([r.seed], [0.0], "stop", 0) for r in asked]

    def sync(self, named, version):
        self.synced.append(version)

    def health(self):
        return "fine"

    def close(self):
        self.closed = True


def test_bucketed_answers_come_in_the_order_asked_and_the_rest_is_passed_on():
    inner = Echo()
    engine = Bucketed(inner, 120)
    asked = requests([50, 3, 50, 4, 3])
    assert [c.token_ids for c in engine.generate(asked, Sampling())] == [[0], [1], [2], [3], [4]]
    assert len(inner.batches) == 2 and sum(inner.batches) == 5
    replies = []
    engine.converse(asked, Sampling(), lambda i, completion: replies.append((i, completion.token_ids)))
    assert sorted(replies) == [(i, [i]) for i in range(5)]
    engine.sync([], 4)
    engine.close()
    assert inner.synced == [4] and engine.health() == "fine" and inner.closed


# --------------------------------------------------------------------------------------------------------- dynamic sampling


def fake_draw(rewards_of, log=None):
    """Two samples for each item; `rewards_of(item id, round)` gives their rewards."""

    def draw(items, redraw):
        out = []
        for g, item in enumerate(items):
            rewards = rewards_of(item.id, redraw)
            out += [Sample([1], [2, 3], [1, 1], [0.0, 0.0], 0, "stop", item.id, g, reward=r) for r in rewards]
        if log is not None:
            log.append((redraw, [item.id for item in items]))
        return out

    return draw


def taker():
    numbers = iter(range(1000))
    return lambda n: [Item(str(next(numbers)), None) for _ in range(n)]


def test_flat_groups_are_replaced_by_the_next_prompts():
    log = []
    draw = fake_draw(lambda name, _: (0.0, 1.0) if int(name) % 2 else (1.0, 1.0), log)
    samples, figures = draw_with_spread(draw, taker(), 4, 5)
    assert [s.prompt_id for s in samples] == ["5", "5", "1", "1", "7", "7", "3", "3"] or len(samples) == 8
    assert [s.group_id for s in samples] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(int(s.prompt_id) % 2 for s in samples)
    assert figures["dynamic/flat_first"] == 0.5 and figures["dynamic/flat"] == 0.0
    dropped = figures["dynamic/replaced"]
    assert dropped == sum(len(ids) for redraw, ids in log if redraw) and figures["dynamic/tokens"] == 4 * dropped
    assert figures["dynamic/redraws"] == log[-1][0]


def test_replacing_ends_at_its_bound_and_keeps_the_number_of_groups():
    log = []
    samples, figures = draw_with_spread(fake_draw(lambda *_: (0.0, 0.0), log), taker(), 3, 2)
    assert len(samples) == 6 and [redraw for redraw, _ in log] == [0, 1, 2]
    assert figures["dynamic/flat"] == 1.0 and figures["dynamic/replaced"] == 6.0
    samples, figures = draw_with_spread(fake_draw(lambda *_: (0.0, 1.0)), taker(), 3, 2)
    assert figures == {f"dynamic/{k}": 0.0 for k in ("flat_first", "flat", "replaced", "redraws", "tokens")}


# --------------------------------------------------------------------------------------------------------- judging at once


class AtOnce(CopyTask):
    """A copy task that is judged all at once, and counts how often."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def step_all(self, going, texts):
        self.calls.append(len(texts))
        return [episode.step(text) for episode, text in zip(going, texts)]


def test_a_task_of_one_turn_may_judge_its_answers_at_once(checkpoint_folder):
    from transformers import AutoTokenizer

    encoder = Encoder(AutoTokenizer.from_pretrained(checkpoint_folder))
    answers = [encoder.response(w) for w in "afbf"]
    out = []
    for task in (CopyTask(), AtOnce()):
        engine = ScriptedEngine([list(ids) for ids in answers])
        items = task.prompts("train")[:2]
        sampling = Sampling(stop_token_ids=(1,))
        common = {"num_generations": 2, "max_new_tokens": 4, "seed_parts": (0,)}
        out.append(episodes.run(engine, task, items, encoder, sampling, **common))
    assert out[0] == out[1] and [s.success for s in out[0]] == [True, False, True, False]
    assert task.calls == [4]


# ---------------------------------------------------------------------------------------------------------------- the model


def test_rope_theta_and_context_replace_the_checkpoints(tmp_path):
    folder = str(make_checkpoint(tmp_path))
    cpu = torch.device("cpu")
    plain = load_model(ModelConfig(path=folder), cpu)
    model = load_model(ModelConfig(path=folder, rope_theta=40000, max_position_embeddings=999), cpu)
    assert plain.config.rope_parameters["rope_theta"] != 40000
    assert model.config.rope_parameters["rope_theta"] == 40000 and model.config.max_position_embeddings == 999
    steps = model.config.head_dim // 2
    torch.testing.assert_close(
        model.model.rotary_emb.inv_freq, 40000.0 ** (-torch.arange(steps, dtype=torch.float) / steps)
    )
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    assert not torch.allclose(plain(ids).logits, model(ids).logits)
    assert changed_positions(plain.config, folder) == {}
    assert changed_positions(model.config, folder) == {
        "rope_parameters": {**plain.config.rope_parameters, "rope_theta": 40000},
        "max_position_embeddings": 999,
    }
    model.save_pretrained(tmp_path / "saved")
    again = load_model(ModelConfig(path=str(tmp_path / "saved")), cpu)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


# ---------------------------------------------------------------------------------------------------------------- configs


def test_paths_of_data_are_looked_up_beside_the_config(tmp_path):
    (tmp_path / "c.toml").write_text(
        '[task]\nname = "math"\n[task.math]\ntrain = ["d.jsonl", "hub/name"]\nbenchmarks = ["a=d.jsonl", "b"]\n'
        'columns = {problem = "q", answer = "a.b"}\n'
    )
    (tmp_path / "d.jsonl").touch()
    cfg = config_file.load(tmp_path / "c.toml", ["--task.math.max_train", "5"])
    math = cfg.task.math
    assert math.train == [str(tmp_path / "d.jsonl"), "hub/name"] and math.max_train == 5
    assert math.benchmarks == [f"a={tmp_path / 'd.jsonl'}", "b"]
    (tmp_path / "again.toml").write_text(config_file.to_toml(cfg))
    assert config_file.load(tmp_path / "again.toml") == cfg
    assert math.columns == {"problem": "q", "answer": "a.b"}


def test_what_ships_for_the_tiny_config_is_what_its_command_makes(tmp_path):
    math_tiny.main(["--out", str(tmp_path)])
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / "math_sample" / name).read_text() == (ROOT / "configs" / "math_sample" / name).read_text()
    from safetensors.torch import load_file

    made, shipped = (load_file(f / "math_base" / "model.safetensors") for f in (tmp_path, ROOT / "configs"))
    assert made.keys() == shipped.keys() and all(torch.equal(made[k], shipped[k]) for k in made)
    size = sum(f.stat().st_size for f in (ROOT / "configs" / "math_base").iterdir())
    assert size < 1 << 20


def test_the_sample_shares_no_problem_between_training_and_evaluation():
    from amft_fast.run.build import make_task

    task = make_task(config_file.load(ROOT / "configs" / "math_tiny.toml").task)
    task.prepare()
    assert task.tallies[-1].counts == {} and len(task.prompts("sample")) == 40
    assert len(task.demos("train")) == len(task.prompts("train")) > 300


TINY = str(ROOT / "configs" / "math_tiny.toml")
FEW = [
    "--train.method=fixed",
    "--eval.max_prompts=8",
    "--eval.schedule_max_prompts=8",
    "--log.to=[]",
    "--train.warmup_steps=4",
]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_tiny_config_trains_from_end_to_end(tmp_path, capsys):
    """Evaluation on the schedule, the best checkpoint by the named metric, the data's tally."""
    assert cli.main(["train", TINY, *FEW, "--run.dir", str(tmp_path), "--run.overwrite=false"]) == 0
    out = capsys.readouterr().out
    assert "training data: 360 rows, 360 problems used, 360 with a demonstration" in out and "report:" in out
    lines, evals = read(tmp_path / "metrics.jsonl"), read(tmp_path / "evals.jsonl")
    assert len(lines) == 10 and {"dynamic/flat", "dynamic/replaced", "success"} <= lines[-1].keys()
    assert [e["at"] for e in evals] == [0, 4, 7, 10] and all({"val", "sample"} <= e.keys() for e in evals)
    assert {"answered", "format", "pass_at_k", "truncated"} <= evals[-1]["sample"].keys()
    assert (tmp_path / "checkpoints" / "best").exists()


@pytest.mark.integration
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path):
    assert cli.main(["train", TINY, *FEW, "--run.dir", str(tmp_path / "whole")]) == 0
    assert cli.main(["train", TINY, *FEW, "--run.dir", str(tmp_path / "parts"), "--train.steps", "3"]) == 0
    assert cli.main(["train", TINY, *FEW, "--resume", str(tmp_path / "parts")]) == 0
    whole, parts = (read(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    for name in ("loss", "mu", "success", "dynamic/replaced"):
        assert [row.get(name) for row in parts] == [row.get(name) for row in whole]


def test_data_mistakes_are_one_sentence(tmp_path, capsys):
    config = str(ROOT / "configs" / "math_tiny.toml")
    for flags, said in (
        (["--task.math.train", '["nothing.jsonl"]'], "no data file 'nothing.jsonl'"),
        (["--task.math.train", "[]"], "task.math: train must name at least one file"),
        (["--task.math.benchmarks", '["aime23"]'], "no benchmark 'aime23'"),
        (["--task.math.val_share", "0.6", "--task.math.test_share", "0.5"], "val_share + test_share must leave"),
    ):
        assert cli.main(["train", config, "--run.dir", str(tmp_path / "r"), *flags]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    with pytest.raises(UserError, match="max_redraws"):
        config_file.load(config, ["--rollout.max_redraws", "0"])
