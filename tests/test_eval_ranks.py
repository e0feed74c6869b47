"""amft-fast eval in several processes (gloo, CPU): the same files as one process writes."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from runs import wait_until

from amft_fast.engine.world import World
from amft_fast.errors import UserError

ROOT = Path(__file__).parent.parent
TASK = [
    *("configs/demo.toml", "--model", "configs/demo_base", "--eval.max_prompts", "5", "--eval.num_samples", "2"),
    *("--rollout.max_new_tokens", "16", "--eval.splits", '["val", "ood"]', "--run.device", "cpu", "--run.threads", "1"),
]
BENCHMARK = [
    *("configs/math_base", "--benchmarks", "sample", "--limit", "5", "--samples", "3", "--max-new-tokens", "24"),
    *("--rollout.max_batch", "4", "--run.device", "cpu", "--run.threads", "1"),
]


def evaluate(out, *args, processes=1, stdout=subprocess.PIPE):
    """`amft-fast eval` as torchrun starts it, or without a launcher."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    many = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    command = [sys.executable, *(many if processes > 1 else ()), "-m", "amft_fast", "eval", *args, "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=stdout, stderr=subprocess.STDOUT, text=True)


def finish(process, code=0):
    out = process.communicate(timeout=300)[0]
    assert process.returncode == code, out[-4000:]
    return out


def test_only_rank_0_does_what_is_its_own_and_its_mistake_is_everybody_s():
    def fail():
        raise UserError("no room")

    assert World().on_main(lambda: 3) == 3
    with pytest.raises(UserError, match="no room"):
        World().on_main(fail)


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_three_processes_write_the_task_s_figures_of_one(tmp_path):
    alone = finish(evaluate(tmp_path / "1.json", *TASK))
    out = finish(evaluate(tmp_path / "3.json", *TASK, processes=3))
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "3.json").read_bytes()
    results = json.loads((tmp_path / "3.json").read_text())["results"]
    assert set(results) == {"val", "ood"} and 0 < results["val"]["sampled"] < 1
    table = alone[alone.index("split  ") :]
    assert table in out and out.count("evaluating val") == 1, "rank 0 alone speaks"


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_three_processes_write_a_benchmark_s_files_of_one_and_go_on_with_theirs(tmp_path):
    """max_batch 4 and three answers a problem: one process asks for one problem at a time, three for four."""
    finish(evaluate(tmp_path / "1", *BENCHMARK))
    out = finish(evaluate(tmp_path / "3", *BENCHMARK, processes=3))
    names = sorted(p.name for p in (tmp_path / "1").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "3").iterdir()) and "sample.jsonl" in names
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name
    assert out.count("results: ") == 1
    file = tmp_path / "3" / "sample.jsonl"
    rows = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(rows[:5]))  # the head, a whole problem, one answer of the next
    out = finish(evaluate(tmp_path / "3", *BENCHMARK, processes=2))
    assert "going on, 1 of 5 problems are answered" in out
    assert file.read_bytes() == b"".join(rows)
    other = evaluate(tmp_path / "3", *BENCHMARK, "--temperature", "0.9", processes=2)
    out = other.communicate(timeout=300)[0]
    assert other.returncode and "holds answers drawn with other settings (temperature)" in out


@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGTERM, "stopped; not evaluated: val, ood"), (signal.SIGKILL, "has died in the middle")],
)
def test_an_evaluation_that_is_stopped_or_killed_ends_at_once_with_a_sentence(tmp_path, number, said):
    log = tmp_path / "log"
    many = [*TASK, "--eval.max_prompts", "400", "--eval.num_samples", "64"]
    with log.open("w") as file:
        process = evaluate(tmp_path / "out.json", *many, processes=2, stdout=file)
        wait_until(lambda: "evaluating val" in log.read_text(), process, 120)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process.pid if number == signal.SIGTERM else int(workers[-1]), number)
        assert process.wait(timeout=60)
    assert said in log.read_text()
