"""Trackers: what they are told, that a resumed run goes on in the same one, and that none can end a run.

TensorBoard is tested in each suite; wandb, trackio and mlflow, offline, in `make test-integration`, which installs them.
"""

import json
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fakes import CopyTask
from runs import cfg_for, lines, train

from amft_fast import cli, config_file
from amft_fast.errors import UserError
from amft_fast.run import launch, trackers
from amft_fast.run.folder import take_folder

ROOT = Path(__file__).parent.parent


class Fake:
    """Remembers what it was told; raises, or waits for an event, in the methods that are named."""

    def __init__(self, told, bad=(), error=None, wait=None):
        self.told, self.bad, self.wait = told, bad, wait
        self.error = error or RuntimeError("the server is gone\nand more")

    def _do(self, name, *given):
        self.told.append((name, *given))
        if name in self.bad:
            if self.wait is None:
                raise self.error
            self.wait.wait(60)

    def start(self, place):
        self._do("start", place)
        return place.id or f"run-{id(self)}"

    def figures(self, step, figures):
        self._do("figures", step, figures)

    def table(self, step, rows):
        self._do("table", step, rows)

    def finish(self, report, finished):
        self._do("finish", report and report.read_text()[:15], finished)


@pytest.fixture
def fake(monkeypatch):
    """A function that makes `wandb` in log.to a `Fake`; returns the list of what it is told."""

    def make(*bad, **given):
        told = []
        monkeypatch.setitem(trackers.KINDS, "wandb", (lambda: Fake(told, bad, **given), "json"))
        return told

    return make


def tell(one, folder, start=0, finished=True):
    """What a run of two steps from `start` on tells a listener."""
    folder.mkdir(exist_ok=True)
    one.on_start(folder, start)
    one.on_eval({"step": start - 1, "at": start, "val": {"sampled": 0.5}})
    for step in (start, start + 1):
        one.on_step({"step": step, "loss": 1.0})
        one.on_sample({"step": step, "completion": "a"})
    one.on_end(folder, finished)


def tracked_fake(*bad, say=pytest.fail, **given):
    """A fake tracker as a listener, and what it is told."""
    told = []
    return trackers.Tracked("wandb", Fake(told, bad, **given), config_file.load(None), say), told


# ------------------------------------------------------------------------------------------------------- what they are told


def test_a_tracker_is_told_all_in_order(tmp_path, checkpoint_folder, fake):
    told = fake()
    cfg = cfg_for(tmp_path / "mine", checkpoint_folder, "--log.to", '["wandb", "wandb"]', "--log.project", "words")
    assert train(cfg) == 0
    (_, place), *rest = told
    assert (place.project, place.name, place.step, place.id) == ("words", "mine", 0, None)
    assert place.settings["train.lr"] == 0.01 and place.settings["log.to"] == ["wandb", "wandb"]
    assert rest.pop() == ("finish", "<!doctype html>", True)
    # Evaluations at 0, 2, 4 and 6 stand before the steps of these numbers, completions of every second step after it.
    steps = [
        (what, step, next(iter(given)).partition("/")[0] if what == "figures" else "") for what, step, given in rest
    ]
    order = []
    for step in range(6):
        kept = step >= 2 and step % 2 == 0  # steps of the warm-up have none
        order += (
            [("figures", step, "eval")] * (step % 2 == 0) + [("figures", step, "mu")] + [("table", step, "")] * kept
        )
    assert steps == [*order, ("figures", 6, "eval")]
    written = lines(tmp_path / "mine")
    figures = [given for what, _, given in rest if what == "figures" and "mu" in given]
    assert [f["mu"] for f in figures] == [row["mu"] for row in written]
    assert all("step" not in f and all(type(v) in (int, float) for v in f.values()) for f in figures)
    table = next(given for what, _, given in rest if what == "table")
    samples = [row for row in lines(tmp_path / "mine", "samples.jsonl") if row["step"] == 2]
    assert table == samples and "picture" not in table[0]


def test_rows_of_a_table_have_the_same_columns_and_no_picture():
    one, told = tracked_fake()
    one.on_sample({"step": 3, "completion": "a", "gold": {"x": [1]}, "picture": "data:..."})
    one.on_sample({"step": 3, "completion": "b", "answer": None})
    one.on_step({"step": 4, "loss": 1.0, "phase": "train", "alarms": {"x": "y"}, "kl": None})
    while not one.waiting.empty():
        one.waiting.get()()
    assert told == [
        (
            "table",
            3,
            [
                {"step": 3, "completion": "a", "gold": '{"x": [1]}', "answer": None},
                {"step": 3, "completion": "b", "gold": None, "answer": None},
            ],
        ),
        ("figures", 4, {"loss": 1.0}),
    ]


def test_a_resumed_run_goes_on_with_its_id_and_one_anew_gets_another(tmp_path, checkpoint_folder):
    given = []

    def places(start):
        one, told = tracked_fake()
        tell(one, tmp_path, start)
        place = told[0][1]
        given.append(json.loads((tmp_path / trackers.IDS).read_text())["wandb"])
        return place.id, place.step

    assert places(0) == (None, 0) and places(6) == (given[0], 6)
    (tmp_path / trackers.IDS).write_text("[damaged")
    assert places(7) == (None, 7) and places(8) == (given[2], 8)
    cfg = cfg_for(tmp_path, checkpoint_folder)
    take_folder(cfg, resume=True)
    assert (tmp_path / trackers.IDS).exists()
    take_folder(cfg, resume=False)
    assert not (tmp_path / trackers.IDS).exists()


def test_a_stopped_run_is_told_so(tmp_path, checkpoint_folder, fake):
    told = fake()
    cfg = cfg_for(tmp_path / "run", checkpoint_folder, "--log.to", '["wandb"]')

    def stop(record):
        raise LookupError("mine")

    listener = type("Listener", (), {"on_step": staticmethod(stop)})()
    with pytest.raises(LookupError):
        launch.train(cfg, False, CopyTask(), [listener])
    assert told[-1] == ("finish", "<!doctype html>", False)


# ------------------------------------------------------------------------------------------------------ what goes wrong


FAILURES = [RuntimeError("the server is gone\nand more"), OSError(28, "No space left on device"), LookupError()]
SAID = ("RuntimeError: the server is gone", "OSError: No space left on device", "LookupError")


@pytest.mark.parametrize("where", ["start", "figures", "table", "finish"])
@pytest.mark.parametrize(("error", "why"), zip(FAILURES, SAID))
def test_a_tracker_that_fails_is_said_once_and_only_closed(tmp_path, where, error, why):
    said = []
    one, told = tracked_fake(where, say=said.append, error=error)
    tell(one, tmp_path)
    assert said == [f"wandb (log.to) is told nothing more of this run, which goes on without it: {why}"]
    names = [name for name, *_ in told]
    assert names[names.index(where) + 1 :] == ["finish"]


def test_a_tracker_that_fails_ends_no_run(tmp_path, checkpoint_folder, fake, capfd):
    fake("figures")
    cfg = cfg_for(tmp_path / "run", checkpoint_folder, "--log.to", '["wandb", "tensorboard"]')
    assert train(cfg) == 0
    out, err = capfd.readouterr()
    assert (out + err).count("(log.to)") == 1 and "Traceback" not in out + err
    assert len(lines(tmp_path / "run")) == 6 and (tmp_path / "run" / "summary.json").exists()
    assert len(board(tmp_path / "run")[0]["mu"]) == 6, "the others go on"


def test_a_tracker_that_hangs_holds_no_run_up(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "START_SECONDS", 0.01)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.01)
    go_on, said = threading.Event(), []
    one, told = tracked_fake("start", say=said.append, wait=go_on)
    tell(one, tmp_path)
    assert len(said) == 2 and "wandb (log.to) has not started after" in said[0]
    assert "has not taken everything in after" in said[1] and [name for name, *_ in told] == ["start"]
    go_on.set()
    one.thread.join(60)
    assert not one.thread.is_alive() and len(said) == 2


def test_a_tracker_that_falls_behind_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "MOST_WAITING", 3)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.01)
    go_on, said = threading.Event(), []
    one, _ = tracked_fake("figures", say=said.append, wait=go_on)
    tell(one, tmp_path)
    assert len(said) == 1 and said[0].endswith("it is 3 records behind")
    go_on.set()
    one.thread.join(60)
    assert not one.thread.is_alive() and len(said) == 1


def test_a_missing_package_is_told_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers.KINDS, "mlflow", (trackers.Mlflow, "no_such_package"))
    config = tmp_path / "c.toml"
    config.write_text('run = { dir = "r" }\nlog = { to = ["mlflow"] }\nmodel = { path = "nowhere" }\n')
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--dry-run"]):
        assert cli.main(["train", str(config), *more]) == 2
        assert (
            "log.to: mlflow needs a package that is not installed: pip install 'amft-fast[trackers]', or leave it out"
            in capsys.readouterr().err
        )
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_settings_of_trackers(tmp_path):
    with pytest.raises(
        UserError, match=r"log\.to: input should be 'tensorboard', 'wandb', 'trackio' or 'mlflow', got 'wanbd'"
    ):
        config_file.load(None, ["--log.to", "wanbd"])
    assert config_file.load(None, ["--log.to", "wandb,mlflow"]).log.to == ["wandb", "mlflow"]
    assert config_file.load(None).log.to == ["tensorboard"]
    old = tmp_path / "config.toml"  # of a run from before log.to
    for text, to in (("true", ["tensorboard"]), ("false", [])):
        old.write_text(f"[log]\ntensorboard = {text}\n")
        assert config_file.load(old).log.to == to


# ----------------------------------------------------------------------------------------------------------- TensorBoard


def board(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tb"), size_guidance={"tensors": 0, "scalars": 0})
    read.Reload()
    texts = {
        tag.removesuffix("/text_summary"): {e.step: e.tensor_proto.string_val[0].decode() for e in read.Tensors(tag)}
        for tag in read.Tags()["tensors"]
    }
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}, texts


def test_tensorboard_reads_back(tmp_path, checkpoint_folder):
    folder = tmp_path / "run"
    flags = ("--log.to", '["tensorboard"]', "--checkpoint.every", "4", "--checkpoint.keep_best", "false")
    assert train(cfg_for(folder, checkpoint_folder, *flags)) == 0
    # Resumed from 4, as after a kill: what was there of later steps is purged.
    last = max(folder.glob("checkpoints/step-*"))
    last.rename(tmp_path / "gone")
    assert train(cfg_for(folder, checkpoint_folder, *flags), resume=True) == 0
    scalars, texts = board(folder)
    written = lines(folder)
    assert dict(scalars["mu"]) == pytest.approx({row["step"]: row["mu"] for row in written})
    assert [s for s, _ in scalars["mu"]] == [0, 1, 2, 3, 4, 4, 5], "of what is purged, the resumption's own step stays"
    evals = lines(folder, "evals.jsonl")
    assert scalars["eval/val/sampled"] == [(row["at"], pytest.approx(row["val"]["sampled"])) for row in evals]
    assert "| train.lr | 0.01 |" in texts["settings"][0]
    assert set(texts["samples"]) == {2, 4} and "completion" in texts["samples"][2]
    assert texts["report"] == {6: f"`{(folder / 'report.html').resolve()}`"}


def test_a_cell_of_a_table_breaks_no_table():
    table = trackers.markdown([{"a": "x | y\n# z", "b": "<b>*1*</b>"}])
    assert table.splitlines() == ["| a | b |", "| --- | --- |", r"| x \| y ⏎ \# z | \<b\>\*1\*\</b\> |"]


def test_tensorboard_files_that_cannot_be_written_are_said_once(tmp_path, file_limit, capfd):
    (tmp_path / "tb").write_text("a file where its folder should be")
    said = []
    one, two = (
        trackers.Tracked("tensorboard", trackers.TensorBoard(), config_file.load(None), said.append) for _ in range(2)
    )
    tell(one, tmp_path)
    assert len(said) == 1 and "tensorboard (log.to)" in said[0]
    with file_limit(10):
        tell(two, tmp_path / "other")
    assert len(said) == 2 and "File too large" in said[1]
    assert "Traceback" not in capfd.readouterr().err


# -------------------------------------------------------------------------------------------- the others, really, offline


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run of two steps that is resumed for two more, with all four trackers offline: its folder and the environment."""
    for name in ("wandb", "trackio", "mlflow"):
        pytest.importorskip(name, reason="`make test-integration` installs the extra `trackers`")
    tmp = tmp_path_factory.mktemp("tracked")
    env = os.environ | {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp}/mlflow.db",
    }
    flags = shlex.split(
        "--run.threads 1 --train.method fixed --train.prompts_per_step 2 --train.demos_per_step 2 --checkpoint.every 2 "
        "--rollout.num_generations 2 --eval.every 2 --eval.num_samples 2 --eval.max_prompts 2 --eval.schedule_max_prompts 2 "
        "--log.samples_every 1 --log.samples 2 --checkpoint.export false --log.to tensorboard,wandb,trackio,mlflow"
    )
    base = [sys.executable, "-m", "amft_fast", "train"]
    first = [*base, str(ROOT / "configs" / "demo.toml"), "--run.dir", "run", "--train.steps", "2", *flags]
    for command in (first, [*base, "--resume", "run", "--train.steps", "4"]):
        done = subprocess.run(command, cwd=tmp, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "(log.to)" not in done.stdout, done.stdout + done.stderr
    return tmp / "run", env


def check(mu, sampled, folder):
    """What came of `mu` and `eval/val/sampled`, as (step, value), is what the run wrote; a step never twice."""
    assert mu == [(row["step"], pytest.approx(row["mu"])) for row in lines(folder)]
    evals = lines(folder, "evals.jsonl")
    assert sampled == [(row["at"], pytest.approx(row["val"]["sampled"])) for row in evals]
    assert [row["at"] for row in evals] == [0, 2, 4]


def wandb_records(path):
    """The records of wandb's own file: a log of LevelDB's format (blocks of 32 KiB, pieces with a header of 7 bytes)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole, or the last piece
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


@pytest.mark.integration
def test_wandb_offline(tracked):
    folder, _ = tracked
    parts = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(parts) == 2, "offline each start has a folder, under one id"
    history, ids, names, artifacts, settings, axis, exits, tables = [], set(), set(), [], {}, set(), [], 0
    for part in parts:
        for record in wandb_records(part):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
                names.add((record.run.project, record.run.display_name))
            elif kind == "history":
                history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
            elif kind == "config":
                settings |= {u.key or "/".join(u.nested_key): json.loads(u.value_json) for u in record.config.update}
            elif kind == "metric":
                axis.add((record.metric.name or record.metric.glob_name, record.metric.step_metric))
            elif kind == "artifact":
                artifacts.append((record.artifact.type, [c.path for c in record.artifact.manifest.contents]))
            elif kind == "exit":
                exits.append(record.exit.exit_code)
        tables += len(list(part.parent.glob("files/media/table/*.table.json")))
    assert ids == {json.loads((folder / trackers.IDS).read_text())["wandb"]} and names == {("amft-fast", "run")}
    pairs = [[(row["step"], row[name]) for row in history if name in row] for name in ("mu", "eval/val/sampled")]
    check(*pairs, folder)
    assert ("*", "step") in axis, "charts over the figure step, not over wandb's own, which cannot go back"
    assert settings["train.method"] == "fixed" and settings["train.steps"] == 4
    assert [a for a in artifacts if a[0] == "report"] == [("report", ["report.html"])] * 2
    assert tables == 4 and exits == [0, 0]


@pytest.mark.integration
def test_trackio_reads_back(tracked):
    folder, env = tracked
    code = """
import json
from trackio import Api
from trackio.sqlite_storage import SQLiteStorage as store
(run,) = Api().runs("amft-fast")
artifacts = store.get_run_artifacts("amft-fast", run.name, run_id=run.id)
print(json.dumps([run.name, run.config, store.get_logs("amft-fast", run.name, run_id=run.id), artifacts], default=str))
"""
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    name, config, logs, artifacts = json.loads(done.stdout.splitlines()[-1])
    assert name == json.loads((folder / trackers.IDS).read_text())["trackio"] and name.startswith("run-")
    check(*([(row["step"], row[n]) for row in logs if n in row] for n in ("mu", "eval/val/sampled")), folder)
    assert config["train.method"] == "fixed"
    tables = {row["step"]: row["samples"]["_value"] for row in logs if "samples" in row}
    kept = lines(folder, "samples.jsonl")
    assert {step: [r["completion"] for r in rows] for step, rows in tables.items()} == {
        step: [r["completion"] for r in kept if r["step"] == step] for step in range(4)
    }
    assert "report" in json.dumps(artifacts)


@pytest.mark.integration
def test_mlflow_reads_back(tracked):
    folder, env = tracked
    from mlflow import MlflowClient

    client = MlflowClient(env["MLFLOW_TRACKING_URI"])
    (run,) = client.search_runs([client.get_experiment_by_name("amft-fast").experiment_id])
    mine = run.info.run_id
    assert mine == json.loads((folder / trackers.IDS).read_text())["mlflow"]
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    pairs = ([(m.step, m.value) for m in client.get_metric_history(mine, name)] for name in ("mu", "eval/val/sampled"))
    check(*pairs, folder)
    assert run.data.params["train.method"] == "fixed" and run.data.params["train.steps"] == "2"
    assert {a.path for a in client.list_artifacts(mine)} == {"config.toml", "report.html", "samples"}
    assert [a.path for a in client.list_artifacts(mine, "samples")] == [f"samples/step-{i:06d}.json" for i in range(4)]
    root = Path(run.info.artifact_uri)
    root = root if root.is_absolute() else folder.parent / root
    assert "steps = 4" in (root / "config.toml").read_text(), "as resumed"
    table = json.loads((root / "samples" / "step-000001.json").read_text())
    kept = [r for r in lines(folder, "samples.jsonl") if r["step"] == 1]
    assert [dict(zip(table["columns"], row))["completion"] for row in table["data"]] == [r["completion"] for r in kept]
    assert (root / "report.html").read_text() == (folder / "report.html").read_text()
