"""What surrounds a vLLM server, without vLLM: the key, the watch on the parent, the command line; and HTTP's answers."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import LlamaConfig

from amft_fast.config import VllmConfig
from amft_fast.errors import UserError
from amft_fast.interfaces import Request, Sampling
from amft_fast.rollout.vllm import server as vllm_server
from amft_fast.rollout.vllm import setup as vllm_setup
from amft_fast.rollout.vllm.groups import EngineError, check, group_requests, sampling_settings
from amft_fast.rollout.vllm.http_target import HttpTarget
from amft_fast.rollout.vllm.setup import check_lengths


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_child_ends_with_its_parent_also_after_a_crash():
    """A parent that is killed with no chance to clean up; its server's whole group goes with it."""
    child = (
        "import subprocess, sys, time, os\n"
        "from amft_fast.rollout.vllm.server import watch_parent\n"
        "watch_parent(int(sys.argv[1]), 0.05)\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(os.getpid(), p.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = (
        "import subprocess, sys, os, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())], start_new_session=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    pids = [int(p) for p in process.stdout.readline().split()]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and any(running(p) for p in pids):
        time.sleep(0.05)
    assert len(pids) == 2 and not any(running(p) for p in pids)


def test_the_key_guards_every_route_but_health(monkeypatch):
    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def status(path, header=None):
        sent = []
        headers = [(b"authorization", header.encode())] if header else []
        guard = vllm_server.KeyGuard(inner)

        async def send(message):
            sent.append(message)

        asyncio.run(guard({"type": "http", "path": path, "headers": headers}, None, send))
        return sent[0]["status"]

    monkeypatch.setenv(vllm_server.KEY_VARIABLE, "secret")
    for path in ("/pause", "/collective_rpc", "/v1/completions", "/update_weights", "/healthz"):
        assert status(path) == 401 and status(path, "Bearer wrong") == 401 and status(path, "Bearer secret") == 200
    assert status("/health") == 200
    monkeypatch.delenv(vllm_server.KEY_VARIABLE)
    assert status("/pause") == 200


def test_settings_as_the_command_line_has_them():
    flags = vllm_server.as_flags(
        {"max_model_len": None, "enforce_eager": True, "a_b": 3, "hf": {"x": 1}, "sleep": False}
    )
    assert flags == ["--enforce-eager", "--a-b", "3", "--hf", '{"x": 1}', "--no-sleep"]


def test_groups_are_neighbours_with_one_prompt_and_bound():
    a, b = (1, 2), (3,)
    asked = [Request(a, 10, 5), Request(a, 77, 5), Request(a, 78, 6), Request(b, 2**64 - 1, 5), Request(a, 11, 5)]
    groups = group_requests(asked)
    assert [g.members for g in groups] == [(0, 1), (2,), (3,), (4,)]
    assert groups[0].seed == 10 and 0 <= groups[2].seed < 2**62, "sample i of a group takes int64 seed + i"
    settings = sampling_settings(groups[0], Sampling(0.7, stop_token_ids=(9,)))
    assert settings["n"] == 2 and settings["ignore_eos"] and settings["stop_token_ids"] == [9]
    assert sampling_settings(groups[0], Sampling(0.0))["n"] == 1, "greedy answers of a group are one answer"


def test_answers_are_cut_to_what_the_engine_holds():
    groups = group_requests([Request((1,) * 7, 0, 5)])
    assert check_lengths(groups, 10)[0].max_new_tokens == 3 and check_lengths(groups, 100)[0].max_new_tokens == 5
    with pytest.raises(UserError, match="max_model_len 7 leaves no room"):
        check_lengths(groups, 7)


@pytest.mark.parametrize(
    "ids, logprobs, reason",
    [
        ([], [], "stop"), ([1, 99], [-1, -1], "stop"), ([1, -1], [-1, -1], "stop"), ([True], [-1.0], "stop"),
        ([1, 2], [-1.0], "stop"), ([1], [None], "stop"), ([1], [float("nan")], "stop"), ([1], [0.5], "stop"),
        ([1] * 6, [-1.0] * 6, "length"), (None, None, "stop"), ([1], [-1.0], "abort"), ("12", [-1.0, -1.0], "stop"),
    ],
)  # fmt: skip
def test_what_could_not_be_trained_on_is_garbage(ids, logprobs, reason):
    (group,) = group_requests([Request((1,), 0, 5)])
    assert check([1, 2], [-0.5, 1e-6], "stop", group, 10) == ([1, 2], [-0.5, 0.0], "stop")
    with pytest.raises(EngineError, match="garbage"):
        check(ids, logprobs, reason, group, 10)


def test_bad_addresses_and_an_open_host_without_a_key_are_refused():
    with pytest.raises(UserError, match="expected http://HOST:PORT, got 'https://x'"):
        HttpTarget("https://x", None, 1, 1)
    assert HttpTarget("127.0.0.1:81", None, 1, 1).port == 81
    with pytest.raises(ValueError, match="opens the servers' development routes to a network"):
        VllmConfig(host="0.0.0.0")
    assert VllmConfig(host="0.0.0.0", api_key_env="KEY").host == "0.0.0.0"
    with pytest.raises(ValueError, match="one set per server, got 1 for 2"):
        VllmConfig(num_servers=2, devices=["0"])
    dead = HttpTarget(f"http://127.0.0.1:{vllm_server.free_port('127.0.0.1')}", None, 1, 1)
    assert "refused" in dead.alive(1)


@pytest.mark.parametrize(
    ("longest", "cache", "fits"),
    [
        (8192, 830_472_192, 8192),  # SmolLM2-135M: 46 KB a token, and two sequences of its whole context
        (1024, 256 << 20, 1024),
        (131072, 2 << 30, 42366),  # one such sequence would need 6 GB
    ],
)
def test_a_cpu_s_cache_holds_a_sequence_of_the_model(longest, cache, fits):
    sizes = {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**sizes, max_position_embeddings=longest)
    found = vllm_setup._kv_cache(VllmConfig(), True, config, 4, None)
    assert found == {"kv_cache_memory_bytes": cache, "max_model_len": fits}
    assert 1.1 * 2 * 30 * 3 * 64 * 4 * fits <= cache
    given = vllm_setup._kv_cache(VllmConfig(kv_cache_bytes=1 << 20, max_model_len=64), True, config, 4, None)
    assert given == {"kv_cache_memory_bytes": 1 << 20, "max_model_len": 64}
    assert vllm_setup._kv_cache(VllmConfig(), False, config, 4, None) == {"max_model_len": None}
