"""As a new user would: the package from a wheel, a folder outside the repository, the commands of the docs."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.integration
# The sizes of a run of seconds, as flags.
SIZES = {
    "run.threads": 1,
    "train.steps": 2,
    "train.prompts_per_step": 4,
    "train.demos_per_step": 4,
    "rollout.num_generations": 4,
    "rollout.max_new_tokens": 8,
    "meta.prompts": 4,
    "eval.every": 0,
    "eval.max_prompts": 8,
    "eval.num_samples": 2,
}
SHORT = [f"--{name}={value}" for name, value in SIZES.items()]


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """The folder that a wheel of the tree as it stands is installed into. The libraries of csrc are left out: torch serves."""
    base = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split() or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    for name in names:
        if name.startswith(("amft_fast/", "kernels/", "csrc/")) or "/" not in name:
            (base / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, base / "tree" / name)
    pip, quiet = [sys.executable, "-m", "pip"], ["-q", "--disable-pip-version-check", "--no-deps"]
    env = {**os.environ, "AMFT_NO_EXT": "1"}
    build = [*pip, "wheel", *quiet, "--no-build-isolation", "-w", str(base), str(base / "tree")]
    subprocess.run(build, check=True, env=env, cwd=base)
    (wheel,) = base.glob("amft_fast-*.whl")
    subprocess.run([*pip, "install", *quiet, "--target", str(base / "site"), str(wheel)], check=True, cwd=base)
    return base / "site"


@pytest.fixture
def user(installed, tmp_path):
    """Runs a command line in the user's folder; returns what it printed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    env |= {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}

    def run(*words):
        program = {"amft-fast": [sys.executable, str(installed / "bin" / "amft-fast")], "python": [sys.executable]}
        command = [*program[words[0]], *words[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    where = run("python", "-c", "import amft_fast, amft_kernels; print(amft_fast.__file__, *amft_kernels.__path__)")
    # Behind them an editable installation of this environment may have its own folder of kernels, which comes last.
    assert [str(installed) in path for path in where.split()[:2]] == [True, True], where
    shutil.copytree(ROOT / "configs" / "demo_base", tmp_path / "model")
    return run


def largest(count):
    """Rows on the demo's words: which of three numbers is the largest?"""
    rng = random.Random(0)
    triples = [rng.sample(range(1, 14), 3) for _ in range(count)]
    return [
        {"prompt": "numbers " + " ".join(map(str, t)), "answer": str(max(t)), "response": str(max(t))} for t in triples
    ]


def write_rows(folder):
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in largest(200)))


CONFIG = """
model.path = "model"
train = { method = "amft", steps = 25, lr = 5e-4, prompts_per_step = 16, demos_per_step = 16 }
rollout = { num_generations = 8, max_new_tokens = 4 }
meta.prompts = 16
eval.every = 0
run.threads = 1
[task]
name = "data"
data = { train = ["my.jsonl"], rewards = ["my_rewards.py:exact"] }
"""
REWARD = """
def exact(completions, answer):
    return [float(c.strip() == a) for c, a in zip(completions, answer)]
"""


def test_a_reward_of_ones_own_on_ones_own_rows_in_under_20_lines(user, tmp_path):
    """And it learns: rows that it was not trained on go from none right to most."""
    assert len((CONFIG + REWARD).split("\n")) < 20
    write_rows(tmp_path)
    (tmp_path / "c.toml").write_text(CONFIG)
    (tmp_path / "my_rewards.py").write_text(REWARD)
    user("amft-fast", "train", "c.toml")
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    before, after = (summary[at]["test"]["sampled"] for at in ("start", "end"))
    assert before < 0.1 and after > 0.6, (before, after)


def test_a_task_of_several_turns_from_a_file(user, tmp_path, checkpoint_folder):
    """The example of docs/tasks.md, as it stands there."""
    page = (ROOT / "docs" / "tasks.md").read_text()
    (tmp_path / "my_task.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    (tmp_path / "c.toml").write_text("")
    named = ["--task.name", "my_task.py:Sort", "--task.options.max_turns", "3", "--train.method", "fixed"]
    user("amft-fast", "train", "c.toml", "--model.path", str(checkpoint_folder), *named, *SHORT)
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert summary["task"] == "my_task.py:Sort" and "placed" in summary["end"]["ood"]
    samples = (tmp_path / "runs" / "run" / "samples.jsonl").read_text()
    assert "again" in samples, "a policy that knows nothing is sent back"


def test_countdown_of_reasoning_gym_with_amft(user, tmp_path):
    pytest.importorskip("reasoning_gym", reason="make test-integration installs it")
    (tmp_path / "c.toml").write_text("")
    named = ["--task.name", "reasoning_gym:countdown", "--model.path", str(ROOT / "configs" / "math_base")]
    named += ["--model.max_position_embeddings", "1024"]
    sizes = ["--task.gym.train_size=16", "--task.gym.val_size=6", "--task.gym.test_size=4", "--train.method=amft"]
    said = user("amft-fast", "train", "c.toml", *named, *sizes, *SHORT)
    assert "16 train, 6 val, 4 test; 16 training ones with a demonstration" in said
    metrics = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and all(m["mu"] in (0, 1) for m in metrics)


def test_init_train_watch_export_and_plain_transformers(user, tmp_path):
    write_rows(tmp_path)
    said = user("amft-fast", "init", "c.toml", "--model", "model", "--data", "my.jsonl", "--gpus", "0", *SHORT)
    assert "start with: amft-fast train c.toml" in said
    user("amft-fast", "train", "c.toml", "--dry-run")
    assert "numbers" in user("amft-fast", "data", "c.toml")
    user("amft-fast", "train", "c.toml")
    assert "finished after 2/2 steps" in user("amft-fast", "watch", "runs/c")
    user("amft-fast", "export", "runs/c", "--out", "mine", "--dtype", "fp32")
    (tmp_path / "use.py").write_text(
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "tokenizer, model = AutoTokenizer.from_pretrained('mine'), AutoModelForCausalLM.from_pretrained('mine')\n"
        "chat = [{'role': 'user', 'content': 'numbers 7 12 9'}]\n"
        "asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "answer = model.generate(**asked, max_new_tokens=8, do_sample=False)\n"
        "print(answer[0].tolist())\n"
        "assert 'amft_fast' not in sys.modules\n"
    )
    assert len(json.loads(user("python", "use.py").splitlines()[-1])) > 6
