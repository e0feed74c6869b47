"""deploy/: what the files ask for is there; the SLURM script on stand-ins for SLURM's commands, and on SLURM itself."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from runs import lines

from amft_fast import cli, config_file

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"

# Writes down its arguments; srun of the servers ends at once, and so does the trainer, with the exit code asked for.
STAND_IN = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" >> "$CALLS"; printf '\\n' >> "$CALLS"
[ "${0##*/} $1" != "scontrol show" ] || printf 'n%s\\n' 1 2 3
[[ "${0##*/}" != srun || "$*" != *amft_fast\\ train* ]] || exit ${CODE:-0}
"""


def slurm_script(folder, *args, **env):
    """The calls that the script makes, each a list, on three nodes of two tasks."""
    for name in ("srun", "scontrol", "curl"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    calls = folder / "calls"
    here = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_JOB_NODELIST": "n[1-3]"}
    here |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "2", **env}
    done = subprocess.run(["bash", DEPLOY / "slurm.sh", *args], env=here, capture_output=True, text=True)
    made = [line.strip("\0").split("\0") for line in calls.read_text().split("\0\n") if line]
    return done, made


def test_the_slurm_script_gives_the_last_nodes_to_vllm_and_the_others_to_the_trainer(tmp_path):
    args = ["configs/demo.toml", "--train.steps", "3"]
    done, calls = slurm_script(tmp_path, *args, VLLM_NODES="1", VLLM_MODEL="some/model")
    assert done.returncode == 0, done.stderr
    servers, trainer = sorted((c for c in calls if c[0] == "srun"), key=lambda c: "train" in c)
    assert "--nodelist=n3" in servers and "--ntasks=2" in servers and "some/model" in servers
    assert "--nodelist=n1,n2" in trainer and "--nodes=2" in trainer and "--ntasks=4" in trainer
    asked = trainer[trainer.index("train") + 1 :]
    resume = asked.index("--resume")
    cfg = config_file.load(ROOT / asked[0], asked[1:resume] + asked[resume + 2 :])
    assert cfg.rollout.vllm.urls == ["http://n3:8000", "http://n3:8001"] and cfg.rollout.vllm.host == "n1"
    assert cfg.engine.kind == "deepspeed" and cfg.train.steps == 3 and asked[resume + 1] == cli.AUTO


@pytest.mark.parametrize(
    ("code", "restarts", "again"), [("0", "0", False), ("1", "3", True), ("1", "20", False), ("2", "0", False)]
)
def test_a_job_is_queued_again_after_a_death_and_not_after_a_mistake(tmp_path, code, restarts, again):
    done, calls = slurm_script(tmp_path, "configs/demo.toml", CODE=code, SLURM_RESTART_COUNT=restarts)
    assert done.returncode == int(code)
    assert (["scontrol", "requeue", "7"] in calls) == again
    assert "--nodelist=n1,n2,n3" in next(c for c in calls if c[0] == "srun")


def test_the_kubernetes_job_is_one_that_the_commands_know():
    service, job = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    command, args = container["command"], container["args"]
    given = dict(pairwise(command))
    assert int(given["--nnodes"]) == spec["parallelism"] == spec["completions"]
    assert int(given["--nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    host = f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert given["--rdzv-endpoint"].split(":")[0] == host and service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    parsed, flags = cli.build_parser().parse_known_args([a for a in args if a not in ("--engine.kind", "deepspeed")])
    assert parsed.command == "train" and parsed.resume == cli.AUTO and not flags
    assert config_file.load(None, ["--engine.kind", args[args.index("--engine.kind") + 1]])


def test_the_image_asks_for_extras_that_there_are():
    text = (DEPLOY / "Dockerfile").read_text()
    extras = re.search(r"amft-fast\[([a-z,]+)\]", text)[1].split(",")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) <= set(known) and {"deepspeed", "vllm"} <= set(extras)
    assert 'ENTRYPOINT ["amft-fast"]' in text


# ---------------------------------------------------------------------------------------------------------- SLURM itself

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@pytest.fixture
def slurm():
    """The environment of a cluster of this machine alone, in a folder whose path is short enough for munge's socket."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if os.geteuid() or missing:
        pytest.skip("needs root, and slurmctld, slurmd and munge of Debian")
    pytest.importorskip("deepspeed")
    with tempfile.TemporaryDirectory() as name:
        folder, host = Path(name), os.uname().nodename.split(".")[0]
        for part in ("state", "spool", "munge"):
            (folder / part).mkdir(mode=0o700)
        (folder / "munge" / "key").write_bytes(os.urandom(1024))
        (folder / "munge" / "key").chmod(0o400)
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host))
        files = {f"--{x}-file": folder / "munge" / x for x in ("key", "pid", "log", "seed")}
        files["--socket"] = folder / "munge" / "socket"
        conf = str(folder / "slurm.conf")
        starts = [
            ["munged", "--force", *(f"{k}={v}" for k, v in files.items())],
            ["slurmctld", "-i", "-f", conf],
            ["slurmd", "-f", conf, "-N", host],
        ]
        env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"SLURM_CONF": conf}
        try:
            for command in starts:
                subprocess.run(command, env=env, check=True, capture_output=True, timeout=60)
            yield env
        finally:
            for pid in (folder / "slurmd.pid", folder / "slurmctld.pid", folder / "munge" / "pid"):
                if pid.exists():
                    os.kill(int(pid.read_text()), signal.SIGTERM)
            time.sleep(2)


@pytest.mark.integration
@pytest.mark.timeout(900)
def test_a_slurm_job_of_two_tasks_of_which_one_is_killed_is_queued_again_and_goes_on(slurm, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    settings = [
        *("--train.steps", "10", "--train.prompts_per_step", "4", "--train.demos_per_step", "4", "--run.threads", "1"),
        *("--rollout.num_generations", "4", "--rollout.max_new_tokens", "12", "--log.to", "[]", "--eval.every", "0"),
        *("--eval.at_start", "false", "--eval.max_prompts", "2", "--eval.num_samples", "1", "--checkpoint.every", "2"),
        *("--checkpoint.keep_best", "false", "--checkpoint.export", "false", "--train.method", "fixed"),
        *("--engine.zero_stage", "2", "--run.device", "cpu", "--run.dir", str(run)),
    ]
    submit = ["sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=2", f"--output={log}", DEPLOY / "slurm.sh"]
    env = slurm | {"PYTHON": sys.executable}
    done = subprocess.run([*submit, "configs/demo.toml", *settings], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    job, killed = done.stdout.strip(), False
    show = ["scontrol", "show", "job", job]
    end = time.monotonic() + 800
    while time.monotonic() < end and not (run / "summary.json").exists():
        if not killed and (run / "checkpoints" / "step-000002").exists():
            found = subprocess.run(["pgrep", "-f", f"amft_fast train.*{run}"], capture_output=True, text=True).stdout
            ranks = [int(p) for p in found.split() if _rank(p) == "1"]
            os.kill(ranks[0], signal.SIGKILL)
            killed = True
        time.sleep(0.02)
    said = log.read_text() if log.exists() else ""
    state = subprocess.run(show, env=slurm, capture_output=True, text=True).stdout
    assert killed and (run / "summary.json").exists(), said + state
    assert "queued again" in said and "resumed from" in said and "Restarts=1" in state, said + state
    assert [r["step"] for r in lines(run)] == list(range(10))


def _rank(pid):
    """The RANK that a process was started with."""
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((x.removeprefix(b"RANK=").decode() for x in environ if x.startswith(b"RANK=")), None)
