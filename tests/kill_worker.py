"""What test_attack_kills.py runs: a training run killed again and again at any moment and resumed, against an undisturbed one.

`python kill_worker.py FOLDER KILLS`. Runs are forked from this process, which has the libraries loaded and trains nothing
itself: so a life costs a second, and most kills hit training, not imports. Prints what it counted as JSON.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from fakes import CopyTask, make_checkpoint
from kill_points import differences
from runs import cfg_for

from amft_fast.errors import UserError
from amft_fast.run.launch import train

FLAGS = [
    *("--train.method", "amft", "--controller.look_prompts", "2", "--meta.num_generations", "4"),
    *("--controller.imitation_share", "0.2", "--controller.confidence", "0"),
    *("--train.steps", "20", "--checkpoint.every", "1", "--checkpoint.keep_last", "1", "--eval.every", "5"),
    *("--eval.schedule_max_prompts", "1", "--eval.max_prompts", "1", "--log.every", "1"),
]


def start(folder: Path, model: Path, resume: bool) -> int:
    """A life of the run, in a process of its own; its output goes to FOLDER.log."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = train(cfg_for(folder, model, *FLAGS), resume=resume, task=CopyTask())
    except UserError as e:
        print(e)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid: int, wait: bool) -> int | None:
    """The exit code of a life (negative: the signal that ended it), or None while it goes on."""
    found, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def rows(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def moment(lot: random.Random, pid: int, metrics: Path) -> int | None:
    """Waits for the moment of a kill: one to three rows on, and then anywhere in a step; or, seldom, anywhere at the start.

    Returns the life's exit code when it ends before.
    """
    if lot.random() < 0.15:
        time.sleep(lot.uniform(0, 2))
        return ended(pid, wait=False)
    last, left = rows(metrics), lot.randint(1, 3)
    while left:
        code = ended(pid, wait=False)
        if code is not None:
            return code
        now = rows(metrics)
        left -= now > last  # at a resume there may be fewer at first
        last = now
        time.sleep(0.002)
    time.sleep(lot.uniform(0, 0.2))
    return ended(pid, wait=False)


def undisturbed(folder: Path, model: Path) -> None:
    assert ended(start(folder, model, resume=False), wait=True) == 0, folder.with_suffix(".log").read_text()


def same(folder: Path, whole: Path) -> None:
    """The run left what the undisturbed one left, bit for bit."""
    log = folder.with_suffix(".log").read_text()
    assert "Traceback" not in log and "passed over" not in log and "damaged" not in log, log[-4000:]
    found = differences(folder, whole)
    assert not found, "\n".join(found)


def main(place: Path, kills: int) -> None:
    torch.set_num_threads(1)
    lot, model = random.Random(0), make_checkpoint(place / "model")
    undisturbed(place / "whole", model)
    counted = {"kills": 0, "after SIGTERM": 0, "with rows": 0, "runs": 0, "lives": 0}
    while counted["kills"] < kills or counted["runs"] < 1:
        folder = place / f"run{counted['runs']}"
        code = None
        while code != 0:
            metrics = folder / "metrics.jsonl"
            pid = start(folder, model, resume=metrics.exists())
            counted["lives"] += 1
            if counted["kills"] < kills:
                code = moment(lot, pid, metrics)
                if code is None:
                    if lot.random() < 0.3:  # the save at a signal is killed too
                        os.kill(pid, signal.SIGTERM)
                        time.sleep(lot.uniform(0, 0.1))
                        counted["after SIGTERM"] += 1
                    os.kill(pid, signal.SIGKILL)
                    counted["kills"] += 1
                    counted["with rows"] += rows(metrics) > 0
                    code = ended(pid, wait=True)
            else:
                code = ended(pid, wait=True)
            fine = (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)  # it may come before it is asked for
            assert code in fine, (code, folder.with_suffix(".log").read_text()[-4000:])
        same(folder, place / "whole")
        counted["runs"] += 1
    print(json.dumps(counted))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
