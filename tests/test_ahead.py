"""Runs whose rollout engine has weights of its own: rollouts ahead, their age, exact resume, engines that fail for good."""

import copy
import json
import signal

import pytest
from fakes import CopyTask
from runs import lines, without_times

from amft_fast import config_file
from amft_fast.errors import RolloutFailure, UserError
from amft_fast.interfaces import Sample, Turn
from amft_fast.rollout.ahead import Ahead
from amft_fast.rollout.transformers import TransformersEngine
from amft_fast.run import build, launch


class RemoteEngine:
    """The embedded engine on a copy of the model, as a server has one; fails where it is told to."""

    def __init__(self, model, fail_generate_at=None, fail_sync_at=None, stop_generate_at=None):
        self.model, self.inner = copy.deepcopy(model), None
        self.inner = TransformersEngine(self.model)
        self.fail_generate_at, self.fail_sync_at, self.calls = fail_generate_at, fail_sync_at, []
        self.stop_generate_at = stop_generate_at

    def generate(self, requests, sampling):
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


AHEAD = ("--rollout.async_steps", "1")


def test_with_0_steps_ahead_rollouts_are_of_the_weights_trained_on_and_the_engine_rests_between(
    tmp_path, checkpoint_folder, monkeypatch
):
    engine = train(monkeypatch, tmp_path, checkpoint_folder)
    steps = records(tmp_path)[1:]
    assert all(r["mismatch_max"] < 1e-4 and "staleness" not in r for r in steps)
    assert engine.calls == [x for t in range(1, 8) for x in ("rest", t)] + ["close"]
    assert config_file.load(tmp_path / "config.toml").objective.tis_cap == 2.0, "on by default with this engine"


def test_with_1_step_ahead_rollouts_are_one_update_old_and_importance_weights_say_so(
    tmp_path, checkpoint_folder, monkeypatch
):
    train(monkeypatch, tmp_path, checkpoint_folder, *AHEAD)
    steps = records(tmp_path)[1:]
    assert [r["staleness"] for r in steps] == [0, 1, 1, 1, 1, 1]
    assert steps[0]["mismatch_max"] < 1e-4
    # old is the trainer's before the update, so its ratio is 1; behavior is that of the weights before, so it differs.
    assert all(r["mismatch_mean"] > 1e-4 and r["mismatch_ess"] < 1 for r in steps[1:])
    assert all(r["ratio_max"] == pytest.approx(1, abs=1e-5) for r in steps)


def test_a_resumed_run_with_rollouts_ahead_goes_on_bit_for_bit(tmp_path, checkpoint_folder, monkeypatch):
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


@pytest.mark.parametrize("flags", [(), AHEAD], ids=["on policy", "ahead"])
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
        assert [r["staleness"] for r in got[1:]].count(0) == 2


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
    assert [r["staleness"] for r in got[1:]] == [0, 1, 1, 0, 1, 1], "drawn again, with newer weights"
    assert [r["mu"] for r in got[:5]] == [r["mu"] for r in want[:5]], "the controller has seen step 3"


def test_a_mismatch_over_the_threshold_is_said_once_and_not_at_each_step(
    tmp_path, checkpoint_folder, monkeypatch, capsys
):
    monkeypatch.setattr(RemoteEngine, "sync", lambda self, named, version: setattr(self.inner, "version", version))
    train(monkeypatch, tmp_path, checkpoint_folder, "--rollout.mismatch_warn", "0.001")
    out = capsys.readouterr().out
    assert out.count("rollout engine and trainer differ by") == 1 and "rollout.mismatch_warn" in out


def test_rollouts_ahead_stay_until_they_are_dropped_and_survive_a_checkpoint():
    ahead = Ahead()
    assert ahead.result() is None and ahead.state_dict() is None
    sample = Sample(
        [1], [2], [1], [-0.5], 3, "stop", "p", 0, turns=[Turn(1, 1.0)], info={"success": True}, success=True
    )
    ahead.start(lambda: [sample])
    state = json.loads(json.dumps(ahead.state_dict()))
    assert ahead.result() == ahead.result() == [sample], "they stay until they are dropped"
    ahead.drop()
    assert ahead.result() is None
    other = Ahead()
    other.load_state_dict(state)
    assert other.result() == [sample]

    def fail():
        raise RolloutFailure("gone")

    ahead.start(fail)
    with pytest.raises(RolloutFailure, match="gone"):
        ahead.wait()
    assert ahead.result() is None, "and then it holds nothing"


def test_rollouts_ahead_need_servers():
    with pytest.raises(UserError, match=r"async_steps 1 needs engine 'vllm' and vllm\.mode 'server'"):
        config_file.load(None, ["--rollout.async_steps", "1"])
