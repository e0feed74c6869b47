"""`make bench-gpu`: its schedule with fake timings, its processes with parts that hang, crash and write half, and a rehearsal
in a bare copy of the tree."""

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # bench is not part of the package

from bench import first_gpu, gpu, step  # noqa: E402


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def fake_run(clock, takes, seen):
    """A part takes what `takes` says, or all of its limit when that is less."""

    def run(part, folder, limit_s, partial):
        seconds = min(takes(part), limit_s)
        partial(gpu.Outcome(part.name, seconds=seconds / 2))
        clock.now += seconds
        seen.append((part.name, limit_s, seconds))
        return gpu.Outcome(part.name, 0 if seconds < limit_s else None, seconds, limit_s)

    return run


@pytest.mark.parametrize("budget", [gpu.BUDGET_S, *first_gpu.BUDGETS_S.values()])
@pytest.mark.parametrize("schedule", gpu.SCHEDULES)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_schedule_fits_whatever_its_parts_take(schedule, budget, seed):
    import random

    random_ = random.Random(seed)
    clock, seen, notes = Clock(), [], []
    run = fake_run(clock, lambda part: random_.choice([1, part.least_s, part.most_s, 10_000]), seen)
    done = gpu.run_all(gpu.SCHEDULES[schedule], budget, run, lambda found: notes.append(len(found)), clock)
    assert clock.now <= budget - gpu.WRITING_S < 600
    assert [name for name, *_ in seen] == list(gpu.SCHEDULES[schedule]), "every part had its turn"
    assert all(limit >= gpu.PARTS[name].least_s for name, limit, _ in seen)
    assert len(done) == len(seen) and notes == sorted(notes) and len(notes) == 2 * len(done)


def test_the_schedule_of_all_fits_a_gpus_likely_timings():
    """17 s to build, a minute of tests, and so on (docs/performance.md): nothing is cut off."""
    likely = {"build": 20, "machine": 15, "head-core": 50, "tests": 90, "step-1.5b": 110, "head": 120, "probe": 15}
    likely |= {"pieces": 35, "rollout": 60}
    clock, seen = Clock(), []
    gpu.run_all(gpu.SCHEDULES["all"], gpu.BUDGET_S, fake_run(clock, lambda p: likely[p.name], seen), len, clock)
    assert all(took < limit for _, limit, took in seen), seen


def test_a_budget_that_is_spent_names_what_was_left_out():
    clock, seen = Clock(), []
    done = gpu.run_all(("probe", "pieces"), 12.0, fake_run(clock, lambda p: 1, seen), len, clock)
    assert not seen or seen[0][0] == "pieces"
    assert "no time was left" in done[0].note and done[0].red


# ------------------------------------------------------------------------------------------------------------- processes

HANGS = "import json, pathlib, sys, time; pathlib.Path(sys.argv[1], 'a.json').write_text('[1]'); print('begun'); time.sleep(99)"
CRASHES = "import os; print('before'); os.abort()"
HALF = "import pathlib, sys; pathlib.Path(sys.argv[1], 'b.json').write_text('[1, '); sys.exit(3)"
GOOD = "import pathlib, sys; [pathlib.Path(sys.argv[1], name).write_text('# c') for name in ('c.md', 'p.png')]"


@pytest.fixture
def parts(monkeypatch):
    found = {}
    for name, code in (("hangs", HANGS), ("crashes", CRASHES), ("half", HALF), ("good", GOOD)):
        command = ("-c", code, "{out}")
        found[name] = gpu.Part(name, command, 1, 6 if name == "hangs" else 60, command, ("test_x.py",))
    found["tests"] = gpu.Part(
        "tests", (), 1, 60, ("-c", "print('FAILED tests/test_x.py::a - no'); raise SystemExit(1)")
    )
    monkeypatch.setattr(gpu, "PARTS", found)
    monkeypatch.setattr(gpu, "facts_of", lambda *_: {"device": "none", "commit": "c0ffee", "time": "now"})
    return found


def test_one_part_never_takes_another_with_it_and_everything_is_written(parts, tmp_path, capsys):
    names = ["hangs", "tests", "crashes", "half", "good"]
    code = gpu.main(["--device", "cpu", "--parts", *names, "--out", str(tmp_path), "--budget", "200"])
    assert code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.json", "gpu.log", "gpu.md"]
    result = json.loads((tmp_path / "gpu.json").read_text())
    by_name = {part["name"]: part for part in result["parts"]}
    assert list(by_name) == names and result["commit"] == "c0ffee"
    assert by_name["hangs"]["results"] == {"a.json": [1]} and "not done after 6 s" in by_name["hangs"]["red"]
    assert by_name["crashes"]["red"] == "exit code -6" and by_name["half"]["red"] == "exit code 3"
    assert by_name["half"]["results"] == {"b.json": "[1, "}, "half a file is kept as text"
    assert not by_name["good"]["red"] and by_name["good"]["results"] == {"c.md": "# c"}
    assert by_name["good"]["red_tests"] == ["tests/test_x.py::a"], "red stands beside the figure, and gates nothing"
    text = (tmp_path / "gpu.md").read_text()
    assert "good: done, **RED: 1 of its tests failed**, tests/test_x.py::a first" in text and "# c" in text
    assert "begun" in (tmp_path / "gpu.log").read_text() and text in capsys.readouterr().out
    assert {p.name for p in gpu.unpack(tmp_path / "gpu.json", tmp_path)} == {"a.json", "b.json", "c.md"}
    assert json.loads((tmp_path / "a.json").read_text()) == [1]


def test_partial_results_are_there_while_a_part_runs(parts, tmp_path):
    told = []
    gpu.run_part("cpu", parts["hangs"], tmp_path, 4.0, lambda outcome: told.append(dict(outcome.results)))
    assert told and {"a.json": [1]} in told


def test_being_told_to_stop_ends_the_part_as_well(tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from bench import gpu\n"
        "sleeps = 'import os, time; print(os.getpid(), flush=True); time.sleep(90)'\n"
        "gpu.PARTS = {'p': gpu.Part('p', (), 1, 90, ('-c', sleeps))}\n"
        "gpu.SCHEDULES['all'] = ('p',)\n"
        "gpu.main(['--device', 'cpu', '--out', sys.argv[2]])\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(ROOT), str(tmp_path)], stderr=subprocess.PIPE)
    path, pid = tmp_path / "gpu.json", None
    for _ in range(600):
        time.sleep(0.2)
        if path.exists():  # written while the part runs
            break
    child.terminate()
    child.wait(60)
    assert child.returncode == 143 and path.exists()
    result = json.loads(path.read_text())
    assert [part["name"] for part in result["parts"]] == ["p"]
    pid = next((int(word) for word in result["parts"][0]["output_tail"].split() if word.isdigit()), None)
    assert pid is None or not Path(f"/proc/{pid}").exists()


def test_without_a_summary_of_the_tests_everything_is_red_beside():
    cut = gpu.Outcome("tests", None, note="not done after 3 s", output="tests/test_y.py ..")
    assert gpu.failed_tests([cut]) == ["tests: not done after 3 s"]
    assert gpu.red_beside("probe", gpu.failed_tests([cut])) == ["tests: not done after 3 s"]
    assert gpu.red_beside("probe", ["tests/test_loss_head_gpu.py::a"]) == []
    assert gpu.failed_tests([gpu.Outcome("tests", 0)]) == gpu.failed_tests([]) == []


def test_parts_name_files_and_benchmarks_that_exist():
    from bench.__main__ import BENCHMARKS

    for part in gpu.PARTS.values():
        for name in part.tests:
            assert (ROOT / "tests" / name).exists(), name
        if part.command[:2] == ("-m", "bench"):
            assert part.command[2] in BENCHMARKS
    assert set(gpu.PARTS) >= {name for names in gpu.SCHEDULES.values() for name in names}


def test_a_part_that_can_stop_by_itself_is_told_when():
    """Killed in the middle of its only shape, the loss head would leave nothing."""
    for name in ("head", "head-core", "head-more"):
        for device in ("cuda", "cpu"):
            command = gpu.command_of(gpu.PARTS[name], device, Path("/tmp/x"), 100.0)
            assert command[command.index("--budget") + 1] == "85" and command[command.index("--out") + 1] == "/tmp/x"


def test_the_marked_tests_are_found():
    command = gpu.tests_command()
    assert command[:5] == ("-m", "pytest", "-q", "-m", "gpu") and "tests/test_multi_tensor.py" in command
    assert "tests/test_loss_head_gpu.py" in command


def test_without_a_gpu_it_refuses(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_three_first_calls(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(gpu, "main", lambda arguments: called.append(arguments) or 0)
    assert first_gpu.main(["why", "OUT"]) == 0 and first_gpu.main(["first", "OUT", "cpu"]) == 0
    assert called == [
        ["why", "--out", "OUT", "--budget", "470.0"],
        ["first", "--out", "OUT", "--budget", "470.0", "--device", "cpu"],
    ]
    assert first_gpu.main(["whatever", "OUT"]) == 2 and len(called) == 2
    assert set(first_gpu.BUDGETS_S) == set(gpu.SCHEDULES) - {"all"} and max(first_gpu.BUDGETS_S.values()) < 540


# ------------------------------------------------------------------------------------------------------------- bare copy

# What a machine with torch has at least: torch, its own needs, triton, numpy, transformers. Not pydantic, not pytest.
THERE = (
    "torch torchgen functorch triton numpy numpy.libs transformers typing_extensions.py sympy mpmath networkx jinja2"
)
THERE += " markupsafe filelock fsspec setuptools _distutils_hack"


def test_a_bare_copy_without_packages_git_or_network_measures(tmp_path):
    copy, packages, out = tmp_path / "tree", tmp_path / "packages", tmp_path / "out"
    for name in ("bench", "kernels", "amft_fast", "csrc", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    packages.mkdir()
    folders = [Path(sysconfig.get_paths()["purelib"]), *map(Path, site.getsitepackages())]
    for name in THERE.split():
        found = next((folder / name for folder in folders if (folder / name).exists()), None)
        if found is not None:
            (packages / name).symlink_to(found)
    assert (packages / "torch").exists() and (packages / "numpy").exists()
    env = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(packages),
        "AMFT_COMMIT": "c0ffee",
        "AMFT_NO_EXT": "1",
    }
    env |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "OMP_NUM_THREADS") if name in os.environ}
    command = [sys.executable, "-S", "-m", "bench", "gpu", "--device", "cpu", "--out", str(out)]
    command += ["--parts", "build", "head", "pieces", "probe", "step-1.5b"]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=280)
    result = json.loads((out / "gpu.json").read_text())
    parts = {part["name"]: part for part in result["parts"]}
    assert done.returncode == 0 and not any(part["red"] for part in parts.values()), (done.stderr, parts)
    assert result["commit"] == "c0ffee" and len(list(out.iterdir())) == 3
    assert "AMFT_NO_EXT is set" in parts["build"]["output_tail"]
    assert parts["step-1.5b"]["note"] == "not on a cpu"
    head = parts["head"]["results"]["loss_head_cpu.json"]
    assert head["commit"] == "c0ffee" and {row["green"] for row in head["shapes"][0]["rows"]} == {True}
    assert parts["pieces"]["results"]["head_pieces_cpu.json"]["products"][0]["ms"] > 0
    assert parts["probe"]["results"]["probe_cpu.json"]["commit"] == "c0ffee"


# ------------------------------------------------------------------------------------------------------------------ step


@pytest.mark.parametrize(
    ("shape", "memory", "tokens", "rows"),
    [
        ("1.5b", 84_900_000_000, (10_240, 14_336), (1, 2)),  # 16 k tokens took 81 GB of 84
        ("1.5b", 150_700_000_000, (16_384, 16_384), (2, 4)),
        ("0.5b", 84_900_000_000, (16_384, 16_384), (2, 4)),
    ],
)
def test_a_step_is_cut_to_the_card(shape, memory, tokens, rows):
    got_tokens, got_rows = step.fitting(shape, memory, 4096)
    assert tokens[0] <= got_tokens <= tokens[1] and got_rows == rows


def test_the_arithmetic_of_kept_activations_is_what_was_measured():
    for shape, kilobytes in (("0.5b", 57), ("1.5b", 103)):
        hidden, mlp, *_ = step.SHAPES[shape]
        assert abs((step.KEPT_HIDDEN * hidden + step.KEPT_MLP * mlp) / 1e3 - kilobytes) < 3


class Truth:
    """Work whose true gradient is known."""

    device, dtype = torch.device("cpu"), torch.float32

    def few(self, count):
        return self

    def true_gradients(self):
        return [torch.ones(3)]


def stand_in(gradient=1.0, update=lambda: None):
    """A candidate's class."""
    methods = {"backward": lambda self: None, "update": lambda self: update()}
    return type("StandIn", (), {**methods, "gradients": lambda self: [torch.full((3,), gradient)]})


def measured(made):
    found = [step.Candidate(name, lambda work, kind=kind: kind()) for name, kind in made.items()]
    step.check(found, Truth(), lambda text: None)
    step.measure(found, Truth(), 2, lambda text: None)
    return found


def test_a_candidate_that_runs_out_of_memory_late_is_noted_and_the_others_go_on():
    def late():
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = measured({"transformers, eager loss": stand_in(), "amft-fast": stand_in(update=late), "TRL": stand_in()})
    assert [c.note for c in found] == ["", "does not fit", ""] and [len(c.seconds) for c in found] == [2, 0, 2]


def test_a_candidate_may_be_twice_as_far_off_as_the_eager_loop_and_no_further():
    made = {"amft-fast": stand_in(1.06), "worse": stand_in(1.08), "nan": stand_in(float("nan"))}
    found = measured(made | {"transformers, eager loss": stand_in(1.03)})
    assert [bool(c.seconds) for c in found] == [True, False, False, True]
    assert found[1].note.startswith("RED") and found[2].note.startswith("RED")
