"""Runs whose rollout engine has weights of its own: rollouts ahead, their age, exact resume, engines that fail for good."""

import copy
import json
import signal
import threading
import time
from concurrent import futures
from concurrent.futures import Future

import pytest
from drawing import Drawing
from fakes import CopyTask
from runs import lines, without_times

from amft_fast import config_file
from amft_fast.errors import RolloutFailure, UserError
from amft_fast.interfaces import Completion, Sample, Turn
from amft_fast.rollout.ahead import Ahead
from amft_fast.rollout.transformers import TransformersEngine
from amft_fast.run import build, launch


class RemoteEngine:
    """The embedded engine on a copy of the model, as a server has one; fails where it is told to. It is given weights only
    while nothing is drawn."""

    def __init__(self, model, fail_generate_at=None, fail_sync_at=None, stop_generate_at=None):
        self.one, self.drawing = threading.Lock(), 0
        self.model, self.inner = copy.deepcopy(model), None
        self.inner = TransformersEngine(self.model)
        self.fail_generate_at, self.fail_sync_at, self.calls = fail_generate_at, fail_sync_at, []
        self.stop_generate_at = stop_generate_at

    def generate(self, requests, sampling):
        self.drawing += 1
        try:
            with self.one:
                return self._generate(requests, sampling)
        finally:
            self.drawing -= 1

    def _generate(self, requests, sampling):
        if self.inner.version == self.fail_generate_at:
            self.fail_generate_at = None
            raise RolloutFailure("no vLLM server is left: it is gone")
        if self.inner.version == self.stop_generate_at:
            signal.raise_signal(signal.SIGTERM)
            raise InterruptedError("stopped while sampling")
        return self.inner.generate(requests, sampling)

    def sync(self, named_tensors, version):
        if version == self.fail_sync_at:
            self.fail_sync_at = None
            raise RolloutFailure("no vLLM server could be given the weights: it is gone")
        assert not self.drawing
        own = dict(self.model.named_parameters())
        for name, tensor in named_tensors:
            own[name].data.copy_(tensor)
        self.inner.version = version
        self.calls.append(version)

    def rest(self):
        self.calls.append("rest")

    def health(self):
        return "ok"

    def close(self):
        self.calls.append("close")


def train(monkeypatch, folder, model, *flags, resume=False, code=0, **faults):
    """A run of six steps with a `RemoteEngine`, which is returned; it ends with the exit code `code`."""
    base = [
        *("--run.dir", str(folder), "--model.path", str(model), "--train.steps", "6", "--train.warmup_steps", "1"),
        *("--train.lr", "0.01", "--train.prompts_per_step", "3", "--train.demos_per_step", "3", "--run.threads", "1"),
        *("--rollout.num_generations", "4", "--rollout.max_new_tokens", "4", "--log.to", "[]"),
        *("--eval.every", "0", "--eval.splits", '["test"]', "--eval.num_samples", "1", "--checkpoint.every", "3"),
        *("--train.method", "fixed", "--checkpoint.keep_best", "false"),
        *("--checkpoint.export", "false", "--rollout.engine", "vllm", "--rollout.vllm.mode", "server", *flags),
    ]
    engines = []

    def make(cfg, model, *rest):
        engines.append(RemoteEngine(model, **faults))
        return engines[-1]

    monkeypatch.setattr(build, "make_rollouts", make)
    assert launch.train(config_file.load(None, base), resume, CopyTask()) == code
    return engines[-1]


def records(folder):
    return without_times(lines(folder))


def ahead(depth):
    return ("--rollout.async_steps", str(depth))


AHEAD = ahead(1)


def test_with_0_steps_ahead_rollouts_are_of_the_weights_trained_on_and_the_engine_rests_between(
    tmp_path, checkpoint_folder, monkeypatch
):
    engine = train(monkeypatch, tmp_path, checkpoint_folder)
    steps = records(tmp_path)[1:]
    assert all(r["mismatch_max"] < 1e-4 and "staleness_max" not in r for r in steps)
    assert engine.calls == [x for t in range(1, 8) for x in ("rest", t)] + ["close"]
    assert config_file.load(tmp_path / "config.toml").objective.tis_cap == 2.0, "on by default with this engine"


def test_with_1_step_ahead_rollouts_are_one_update_old_and_importance_weights_say_so(
    tmp_path, checkpoint_folder, monkeypatch
):
    train(monkeypatch, tmp_path, checkpoint_folder, *AHEAD)
    steps = records(tmp_path)[1:]
    assert [r["staleness_max"] for r in steps] == [0, 1, 1, 1, 1, 1]
    assert steps[0]["mismatch_max"] < 1e-4
    # old is the trainer's before the update, so its ratio is 1; behavior is that of the weights before, so it differs.
    assert all(r["mismatch_mean"] > 1e-4 and r["mismatch_ess"] < 1 for r in steps[1:])
    assert all(r["ratio_max"] == pytest.approx(1, abs=1e-5) for r in steps)


@pytest.mark.parametrize(
    ("depth", "ages", "sent"),
    [(2, [0, 1, 2, 1, 2, 1], [1, 3, 5, 6, 7]), (8, [0, 1, 2, 3, 4, 5], [1, 6, 7])],
)
def test_none_is_trained_on_that_is_older_than_the_depth_and_prompts_keep_their_order(
    tmp_path, checkpoint_folder, monkeypatch, depth, ages, sent
):
    engine = train(monkeypatch, tmp_path, checkpoint_folder, *ahead(depth), "--log.samples_every", "1")
    assert [r["staleness_max"] for r in records(tmp_path)[1:]] == ages, (
        "a round is begun when the last one has been taken"
    )
    assert engine.calls == [*sent, "close"], "and weights come when nothing is drawn"
    train(monkeypatch, tmp_path / "now", checkpoint_folder, "--log.samples_every", "1")
    asked = [[(r["step"], r["prompt"]) for r in lines(f, "samples.jsonl")] for f in (tmp_path, tmp_path / "now")]
    assert asked[0] == asked[1]


@pytest.mark.parametrize("depth", [1, 3])
def test_a_resumed_run_with_rollouts_ahead_goes_on_bit_for_bit(tmp_path, checkpoint_folder, monkeypatch, depth):
    AHEAD = ahead(depth)
    train(monkeypatch, tmp_path / "whole", checkpoint_folder, *AHEAD)
    train(monkeypatch, tmp_path / "parts", checkpoint_folder, *AHEAD)
    for saved in sorted((tmp_path / "parts" / "checkpoints").glob("step-*"))[1:]:
        for file in saved.iterdir():
            file.unlink()
        saved.rmdir()
    kept = sorted(p.name for p in (tmp_path / "parts" / "checkpoints").glob("step-*"))
    assert len(kept) == 1 and kept[0] < "step-000007"
    train(monkeypatch, tmp_path / "parts", checkpoint_folder, *AHEAD, resume=True)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")


@pytest.mark.parametrize("flags", [(), AHEAD, ahead(2)], ids=["on policy", "ahead", "two ahead"])
@pytest.mark.parametrize("fault", ["fail_generate_at", "fail_sync_at"])
def test_an_engine_that_fails_for_good_saves_and_stops_and_resume_loses_nothing(
    tmp_path, checkpoint_folder, monkeypatch, flags, fault
):
    train(monkeypatch, tmp_path / "whole", checkpoint_folder, *flags)
    with pytest.raises(UserError, match=r"it is gone; the state is saved in .*step-00000\d, go on with --resume"):
        train(monkeypatch, tmp_path / "parts", checkpoint_folder, *flags, **{fault: 5})
    seen = records(tmp_path / "parts")
    assert [r["step"] for r in seen] == list(range(len(seen))) and len(seen) in (5, 6)
    train(monkeypatch, tmp_path / "parts", checkpoint_folder, *flags, resume=True)
    got, want = records(tmp_path / "parts"), records(tmp_path / "whole")
    assert [r["step"] for r in got] == [r["step"] for r in want]
    if not flags or fault == "fail_sync_at":
        assert got == want
    else:  # what was in flight is drawn again, with newer weights: younger, of the same prompts
        assert [r["staleness_max"] for r in got[1:]].count(0) == 2


def test_a_stop_while_rollouts_are_drawn_ahead_leaves_the_step_that_was_trained_meanwhile(
    tmp_path, checkpoint_folder, monkeypatch
):
    flags = (*AHEAD, "--train.method", "amft_no_meta", "--controller.window", "1", "--controller.eta_entropy", "0.1")
    train(monkeypatch, tmp_path / "whole", checkpoint_folder, *flags)
    train(monkeypatch, tmp_path / "parts", checkpoint_folder, *flags, code=143, stop_generate_at=3)
    want, seen = records(tmp_path / "whole"), records(tmp_path / "parts")
    assert [r["step"] for r in seen] == [0, 1, 2, 3] and seen == want[:4]
    train(monkeypatch, tmp_path / "parts", checkpoint_folder, *flags, resume=True)
    got = records(tmp_path / "parts")
    assert got[:4] == seen and [r["step"] for r in got] == [r["step"] for r in want]
    assert [r["staleness_max"] for r in got[1:]] == [0, 1, 1, 0, 1, 1], "drawn again, with newer weights"
    assert [r["mu"] for r in got[:5]] == [r["mu"] for r in want[:5]], "the controller has seen step 3"


def test_a_mismatch_over_the_threshold_is_said_once_and_not_at_each_step(
    tmp_path, checkpoint_folder, monkeypatch, capsys
):
    monkeypatch.setattr(RemoteEngine, "sync", lambda self, named, version: setattr(self.inner, "version", version))
    train(monkeypatch, tmp_path, checkpoint_folder, "--rollout.mismatch_warn", "0.001")
    out = capsys.readouterr().out
    assert out.count("rollout engine and trainer differ by") == 1 and "rollout.mismatch_warn" in out


def sample(step, group=0):
    return Sample(
        [1], [2], [1], [-0.5], step, "stop", "p", group, turns=[Turn(1, 1.0)], info={"success": True}, success=True
    )


def test_what_was_drawn_ahead_keeps_its_order_and_survives_a_checkpoint():
    ahead, late = Ahead(3), threading.Event()
    ahead.start(4, 10, lambda: late.wait() and [sample(3)])
    ahead.start(5, 13, lambda: [sample(3, 1)])
    futures.wait([ahead.queue[1].drawn])
    assert len(ahead) == 2 and ahead.whole() == 0, "a later step's do not come before"
    late.set()
    ahead.wait()
    assert ahead.whole() == 2 and ahead.first() == ahead.first() == [sample(3)], "they stay until they are taken off"
    other = Ahead(3)
    other.load(json.loads(json.dumps([batch.state_dict() for batch in ahead.queue])))
    assert [(b.step, b.position, b.drawn.result()) for b in other.queue] == [
        (4, 10, [sample(3)]),
        (5, 13, [sample(3, 1)]),
    ]

    def fail():
        raise RolloutFailure("gone")

    ahead.start(6, 16, fail)
    ahead.wait(2)
    with pytest.raises(RolloutFailure, match="gone"):
        ahead.wait()
    ahead.settle()
    assert ahead.whole() == 2 and [b.position for b in ahead.cut(2)] == [16] and len(ahead) == 2


def test_a_step_that_imitates_drops_what_was_drawn_ahead_and_its_prompts_come_again(checkpoint_folder):
    """Or it would be older than the depth, or of weights that were taken back."""
    whole = Drawing(checkpoint_folder, 0)
    want = [whole.step(t)[1] for t in range(8)]
    drawing = Drawing(checkpoint_folder, 3)
    seen = [drawing.step(t) for t in range(3)]
    assert [ages for ages, _ in seen] == [{0}, {1}, {2}]
    for t in range(3, 8):
        assert drawing.step(t, mu=1.0) == (set(), [])
        assert drawing.figures.get("dropped_tokens", 0) == (16 if t == 3 else 0), (
            "of one step of the round: 4 x 2 answers"
        )
        assert drawing.version == t + 1 and not drawing.rollouts.ahead
    seen += [drawing.step(t) for t in range(8, 13)]
    assert [ages for ages, _ in seen[3:]] == [{0}, {1}, {2}, {3}, {1}]
    assert [prompts for _, prompts in seen] == want


def test_what_is_drawn_for_now_waits_for_the_round_and_is_of_the_present_weights(checkpoint_folder):
    drawing = Drawing(checkpoint_folder, 4)
    for t in range(3):
        drawing.step(t)
    assert drawing.version == 0, "in the midst of a round"
    looks = drawing.rollouts.sample(CopyTask().prompts("val"), 1.0, ("held out", 3), 2)
    assert {s.weight_version for s in looks} == {3} and len(drawing.rollouts.ahead) == 2
    assert [drawing.step(t)[0] for t in range(3, 7)] == [{3}, {4}, {1}, {2}], "what was drawn before stays what it was"
    drawing.rollouts.replace()
    assert drawing.version == 7


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_a_resume_with_another_depth_keeps_its_bound(checkpoint_folder, depth):
    """Two steps of a round of three are left: of ages 2 and 3."""
    before = Drawing(checkpoint_folder, 3)
    want = [before.step(t)[1] for t in range(2)]
    state = json.loads(json.dumps(before.rollouts.state_dict()))
    assert [(b["step"], len(b["samples"])) for b in state["ahead"]] == [(2, 8), (3, 8)]
    want += [before.step(t)[1] for t in range(2, 4)]
    after = Drawing(checkpoint_folder, depth)
    after.rollouts.load_state_dict(state, 2)
    assert after.version == 2
    got = [after.step(t) for t in range(2, 4)]
    assert [prompts for _, prompts in got] == want[2:], "no prompt is lost"
    ages = [2, 3] if depth > 3 else [0, min(depth, 1)]
    assert [a for a, _ in got] == [{a} for a in ages]


def test_a_stop_in_the_midst_of_a_round_keeps_what_is_there(checkpoint_folder):
    drawing = Drawing(checkpoint_folder, 3)
    want = [drawing.step(t)[1] for t in range(2)]
    drawing.rollouts.ahead.queue[1].drawn = Future()
    drawing.rollouts.ahead.queue[1].drawn.set_exception(InterruptedError("stopped"))
    state = drawing.rollouts.state_dict()
    assert [b["step"] for b in state["ahead"]] == [2]
    after = Drawing(checkpoint_folder, 3)
    after.rollouts.load_state_dict(state, 2)
    got = [after.step(t) for t in range(2, 5)]
    assert [ages for ages, _ in got] == [{2}, {1}, {2}], "the rest is drawn again, with newer weights"
    whole = Drawing(checkpoint_folder, 0)
    assert want + [prompts for _, prompts in got] == [whole.step(t)[1] for t in range(5)]


class Flying(Drawing):
    """Answers of two tokens: the first at once, the second when they are told to end, by the weights of then. It takes weights
    once all that is ahead has begun."""

    def __init__(self, folder, depth):
        super().__init__(folder, depth, "--rollout.in_flight", "true")
        self.end, self.one, self.begun, self.started = threading.Event(), threading.Lock(), 0, 0
        self.end.set()
        self.start, self.rollouts._start = self.rollouts._start, self.count

    def count(self, step):
        self.started += 1
        self.start(step)

    def sync(self, named, version):
        while self.begun < self.started:
            time.sleep(0.001)
        self.version = version

    def generate(self, requests, sampling):
        first = self.version
        if threading.current_thread() is not threading.main_thread():
            with self.one:
                self.begun += 1
        assert self.end.wait(60)
        runs = ((first, 1), (self.version, 1)) if self.version != first else ((first, 2),)
        return [Completion([5, 1], [-0.5, -0.5], "stop", first, versions=runs) for _ in requests]


def test_in_flight_a_sync_waits_for_nothing_and_the_oldest_token_is_as_old_as_the_depth(checkpoint_folder):
    flying, whole = Flying(checkpoint_folder, 2), Drawing(checkpoint_folder, 0)
    want = [whole.step(t)[1] for t in range(5)]
    got = [flying.step(0)]
    flying.rollouts.ahead.settle()
    flying.end.clear()
    got.append(flying.step(1))
    assert flying.version == 2 and len(flying.rollouts.ahead) == 2, "given while step 3 is drawn"
    state = json.loads(json.dumps(flying.rollouts.state_dict()))
    assert [b["step"] for b in state["ahead"]] == [2], "a checkpoint waits for nothing either"
    got.append(flying.step(2))
    flying.end.set()
    got += [flying.step(t) for t in (3, 4)]
    assert [ages for ages, _ in got] == [{0}, {1}, {2}, {2}, {2}]
    assert [prompts for _, prompts in got] == want, (
        "what was drawn first is not trained on first: steps keep their order"
    )

    after = Flying(checkpoint_folder, 2)
    after.rollouts.load_state_dict(state, 2)
    assert [after.step(t) for t in (2, 3)] == [({2}, want[2]), ({1}, want[3])], "asked again, by the weights of then"


def test_in_flight_looks_wait_until_nothing_is_under_way(checkpoint_folder):
    flying = Flying(checkpoint_folder, 3)
    flying.step(0)
    looks = flying.rollouts.sample(CopyTask().prompts("val"), 1.0, ("held out", 1), 2)
    assert {run for s in looks for run in s.runs} == {(1, 2)} and flying.rollouts.ahead.whole() == 3


def test_in_flight_needs_something_to_be_under_way():
    served = ["--rollout.engine", "vllm", "--rollout.vllm.mode", "server", "--rollout.async_steps", "2"]
    cfg = config_file.load(None, [*served, "--rollout.in_flight", "true", "--rollout.recompute_kv", "true"])
    assert cfg.rollout.in_flight and cfg.rollout.recompute_kv
    with pytest.raises(UserError, match=r"in_flight .* needs async_steps above 0, got 0"):
        config_file.load(None, ["--rollout.in_flight", "true"])
    with pytest.raises(UserError, match=r"recompute_kv .* needs in_flight"):
        config_file.load(None, [*served, "--rollout.recompute_kv", "true"])


def test_rollouts_ahead_need_servers_and_know_a_bound():
    with pytest.raises(UserError, match=r"async_steps: .*less than or equal to 8"):
        config_file.load(None, ["--rollout.async_steps", "9"])
    with pytest.raises(UserError, match=r"async_steps 1 needs engine 'vllm' and vllm\.mode 'server'"):
        config_file.load(None, ["--rollout.async_steps", "1"])
