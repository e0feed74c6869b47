"""Python: train, evaluate and compare, from any thread and more than once, with functions and objects of one's own."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fakes import CopyTask

import amft_fast
from amft_fast import Config, Run, UserError, config_file, evaluate, train
from amft_fast.api import _config_and_task, compare

SMALL = {
    "run.threads": 1,
    "train": {"steps": 2, "lr": 1e-2, "prompts_per_step": 2, "demos_per_step": 2, "method": "fixed"},
    "rollout": {"num_generations": 2, "max_new_tokens": 2},
    "eval": {"every": 0, "num_samples": 1},
    "log": {"to": [], "samples_every": 1, "progress": False},
    "checkpoint": {"every": 1, "export": False},
}
ROWS = [{"prompt": w, "answer": w, "response": w} for w in ("a", "b", "c", "d", "e", "f", "yes", "no")]


def exact(completions, answer):
    return [float(c.strip() == a) for c, a in zip(completions, answer)]


async def short(completions):
    return [1 / (1 + len(c)) for c in completions]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_package_is_light_until_something_is_asked_of_it():
    code = "import sys, amft_fast; heavy = {'torch', 'pydantic', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'tran'"):
        _ = amft_fast.tran


def test_a_run_with_functions_and_rows_twice_and_outside_the_main_thread(here, checkpoint_folder):
    pytest.importorskip("pandas")
    told = {"step": [], "eval": [], "checkpoint": [], "end": []}

    class Callback:
        def on_end(self, folder, finished):
            told["end"].append((folder, finished))

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    runs = []

    def go(**more):
        given = SMALL | {"task.data.weights": [1.0, 0.5]} | more
        runs.append(train(str(checkpoint_folder), ROWS, [exact, short], **given))

    go(
        on_step=told["step"].append,
        on_eval=told["eval"].append,
        on_checkpoint=told["checkpoint"].append,
        callbacks=[Callback()],
    )
    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    first, second = runs
    assert [r.path for r in runs] == [Path("runs/run"), Path("runs/run-2")] and first.code == second.code == 0
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert isinstance(first, Run) and first.summary["task"] == "data" and first.summary["end"] == second.summary["end"]
    assert list(first.metrics["step"]) == [0, 1]
    parts = first.metrics["task/exact"] + 0.5 * first.metrics["task/short"]
    assert list(first.metrics["reward"]) == pytest.approx(list(parts))
    assert {"at", "test/sampled", "test/exact"} <= set(first.evals.columns) and first.samples
    assert [r["step"] for r in told["step"]] == [0, 1] and len(told["eval"]) == 2
    assert [p.name for p in told["checkpoint"]] == ["step-000001", "step-000002"]
    assert told["end"] == [(Path("runs/run"), True)]
    page = first.report()
    assert page.path.exists() and "&lt;html" in page._repr_html_() and page._repr_html_().startswith("<iframe srcdoc=")


def test_a_task_of_ones_own_as_an_object(here, checkpoint_folder):
    run = train(str(checkpoint_folder), task=CopyTask(), **SMALL | {"run.dir": "mine"})
    assert run.path == Path("mine") and run.summary["task"] == "CopyTask"
    figures = evaluate(str(checkpoint_folder), task=CopyTask(), **{"eval.splits": ["val"], **SMALL})
    assert figures.keys() == {"val"} and figures["val"]["sampled"] == run.summary["start"]["val"]["sampled"]


def test_an_exception_of_a_callback_reaches_the_caller(here, checkpoint_folder):
    def stop(record):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        train(str(checkpoint_folder), task=CopyTask(), on_step=stop, **SMALL)


def test_settings_by_dots_sections_files_and_configs(here):
    (here / "c.toml").write_text('[train]\nlr = 0.5\nsteps = 7\n[run]\ndir = "there"\n')
    cfg = config_file.from_settings("c.toml", {"train": {"steps": 3}, "train.method": "rl"})
    assert (cfg.train.lr, cfg.train.steps, cfg.train.method, cfg.run.dir) == (0.5, 3, "rl", "there")
    over = config_file.from_settings(Config(train={"lr": 0.25}), {"controller.mu_init": 0.3})
    assert (over.train.lr, over.controller.mu_init) == (0.25, 0.3)
    (here / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    cfg, task = _config_and_task("c.toml", None, Path("my.jsonl"), "length", None, {}, fresh=True)
    assert task is None and (cfg.task.name, cfg.task.data.train, cfg.task.data.rewards) == (
        "data",
        ["my.jsonl"],
        ["length"],
    )
    assert cfg.run.dir == "there"
    cfg, task = _config_and_task(None, None, "my.jsonl", ["length", exact], None, {}, fresh=True)
    assert [r.name for r in task.rewards] == ["length", "exact"] and cfg.run.dir == "runs/run"


MISTAKES = [
    (dict(**{"train.lrr": 1}), "unknown setting train.lrr; did you mean train.lr?"),
    ({"train": {"lr": "fast"}}, "settings: train.lr: input should be a valid number"),
    ({"data": 3}, "data must be a file, files, rows or a dataset, got int"),
    ({"data": [{"prompt": "x"}, 3], "rewards": [exact]}, "data[1] must be a row, a dict of columns, got int"),
    ({"data": [], "rewards": [exact]}, "data holds no rows"),
    ({"data": ROWS}, "rewards must name at least one reward"),
    ({"data": ROWS, "rewards": [exact, exact]}, "rewards must have names of their own"),
    (
        dict(data=ROWS, rewards=[exact], **{"task.data.weights": [1, 2]}),
        "weights must be one for each of the 1 rewards, got 2",
    ),
    ({"data": ROWS, "task": CopyTask()}, "task: give a task of your own, or data and rewards, not both"),
    ({"config": "gone.toml"}, "no config file 'gone.toml'"),
]


@pytest.mark.parametrize(("given", "said"), MISTAKES, ids=[m[1][:30] for m in MISTAKES])
def test_mistakes_are_user_errors(here, given, said):
    with pytest.raises(UserError) as error:
        train(**given)
    assert said in str(error.value)


def test_frames_of_data_and_datasets_are_rows():
    """The real libraries: a DataFrame, and datasets of both kinds, as they come and after a map."""
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    plain = datasets.Dataset.from_list(ROWS)
    mapped = plain.map(lambda row: {"answer": row["answer"] + "!"}, load_from_cache_file=False)
    for data in (pandas.DataFrame(ROWS), iter(ROWS), plain, plain.to_iterable_dataset(), mapped):
        _, task = _config_and_task(None, None, data, [exact], None, {}, fresh=False)
        items = [item for split in task.splits for item in task.prompts(split)]
        end = "!" if data is mapped else ""
        assert sorted(i.data.columns["answer"] for i in items) == sorted(row["answer"] + end for row in ROWS)
        assert len(task.demos("train")) == len(task.prompts("train")) > 0
    both = datasets.DatasetDict(train=plain, test=plain)
    with pytest.raises(UserError, match="data must be one split or a list of rows, got a DatasetDict of train, test"):
        _config_and_task(None, None, both, [exact], None, {}, fresh=False)


def test_a_dataset_trains(here, checkpoint_folder):
    datasets = pytest.importorskip("datasets")
    run = train(str(checkpoint_folder), datasets.Dataset.from_list(ROWS), [exact], **SMALL)
    assert run.summary["end"]["test"]["prompts"] == 1 and [s["step"] for s in run.samples][-1] == 1


@pytest.mark.integration
def test_compare_runs_its_methods_in_processes(here, checkpoint_folder):
    (here / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    more = {
        "model.path": str(checkpoint_folder),
        "task.name": "data",
        "task.data.train": ["my.jsonl"],
        "task.data.rewards": ["length"],
    }
    found = []
    thread = threading.Thread(
        target=lambda: found.append(compare(Config(), ["rl", "fixed:0.2"], seeds=1, budget=60, **SMALL | more))
    )
    thread.start()
    thread.join()
    assert {"rl", "fixed:0.2"} <= set(json.dumps(found[0]).replace('"', " ").split())
    with pytest.raises(UserError, match="unknown method"):
        compare(Config(), ["rll"])
