"""`--resume auto` under torchrun: ranks are killed at random moments, and what they leave is the undisturbed run."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import lines, wait_until, without_times

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(__import__("importlib.util").util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]

ROOT = Path(__file__).parent.parent
STEPS = 12
RUN = [
    *("configs/demo.toml", "--train.steps", str(STEPS), "--train.prompts_per_step", "4", "--train.demos_per_step", "4"),
    *("--rollout.num_generations", "4", "--rollout.max_new_tokens", "12", "--log.to", "[]", "--log.samples_every", "1"),
    *("--eval.every", "4", "--eval.max_prompts", "4", "--eval.schedule_max_prompts", "4", "--eval.num_samples", "2"),
    *("--checkpoint.every", "2", "--run.device", "cpu", "--run.threads", "1", "--checkpoint.export", "false"),
    *("--engine.kind", "deepspeed", "--engine.zero_stage", "2", "--meta.prompts", "4", "--meta.num_generations", "4"),
]


def start(folder, log, *launcher):
    """`torchrun ... amft-fast train ... --resume auto`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(port), *launcher, "-m", "amft_fast"]
    command += ["train", *RUN, "--run.dir", str(folder), "--resume", "auto"]
    with log.open("a") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def ranks(launcher):
    """The processes that it has started."""
    try:
        return [int(p) for p in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def figures(folder):
    return without_times(lines(folder)), without_times(lines(folder, "evals.jsonl"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder, log = (tmp_path_factory.mktemp("whole") / n for n in ("run", "log"))
    assert start(folder, log, "--nproc-per-node", "2").wait(500) == 0, log.read_text()[-4000:]
    assert "starting from the beginning" in log.read_text()
    return folder


def rows(folder):
    file = folder / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def test_ranks_killed_at_random_moments_leave_the_undisturbed_run(undisturbed, tmp_path):
    """One while the ranks start, two in the middle of what the run still has to do."""
    seed = random.randrange(1 << 30)
    chance, folder, log = random.Random(seed), tmp_path / "run", tmp_path / "log"
    job = start(folder, log, "--nproc-per-node", "2", "--max-restarts", "3")
    before: set[int] = set()  # ranks of earlier starts
    for kill in range(3):
        wait_until(lambda before=before: len(ranks(job)) == 2 and before.isdisjoint(ranks(job)), job)
        alive = ranks(job)
        if kill == 0:
            time.sleep(chance.uniform(0, 5))
        else:
            moment = chance.randrange(STEPS - 1)
            wait_until(lambda moment=moment: rows(folder) > moment, job)
            time.sleep(chance.uniform(0, 0.2))
        os.kill(chance.choice(alive), signal.SIGKILL)
        before |= set(alive)
    assert job.wait(500) == 0, f"seed {seed}: {log.read_text()[-4000:]}"
    assert figures(folder) == figures(undisturbed), seed
    assert lines(folder, "samples.jsonl") == lines(undisturbed, "samples.jsonl"), seed


def test_a_killed_job_goes_on_at_another_world_size(undisturbed, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    job = start(folder, log, "--nproc-per-node", "2")
    while not (folder / "checkpoints" / "step-000004").exists():
        assert job.poll() is None, log.read_text()[-4000:]
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert len(lines(folder)) < STEPS
    assert start(folder, log, "--nproc-per-node", "3").wait(500) == 0, log.read_text()[-4000:]
    assert "resumed from" in log.read_text()
    texts = [[(r["step"], r["completion"]) for r in lines(f, "samples.jsonl")] for f in (folder, undisturbed)]
    assert texts[0] == texts[1]


def test_damaged_checkpoints_are_not_begun_over(undisturbed, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(undisturbed, folder, symlinks=True)
    for path in (folder / "checkpoints").glob("step-*"):
        (path / "state.json").write_text("damaged")
    assert start(folder, log, "--nproc-per-node", "1").wait(500) != 0
    assert "no checkpoint under" in log.read_text() and lines(folder) == lines(undisturbed)
