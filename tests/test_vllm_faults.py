"""Servers that die, hang, lie and come back, without vLLM: real processes, real HTTP, real gloo, a stand-in for the model."""

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fakes import make_checkpoint
from transformers import AutoModelForCausalLM
from vllm_server_fake import tokens

from amft_fast.config import VllmConfig
from amft_fast.errors import RolloutFailure, UserError
from amft_fast.interfaces import Request, Sampling
from amft_fast.rollout import vllm
from amft_fast.rollout.vllm import fleet as vllm_fleet
from amft_fast.rollout.vllm import server as vllm_server
from amft_fast.rollout.vllm import weight_sync as ws
from amft_fast.rollout.vllm.head_padding import CPU_MULTIPLE, padding_for
from amft_fast.rollout.vllm.setup import Setup

pytestmark = pytest.mark.integration
FAKE = Path(__file__).parent / "vllm_server_fake.py"
SAMPLING = Sampling(1.0, stop_token_ids=(1,))
VOCABULARY = 14


class Pid:
    """A server that is no child of this process, as `ServerProcess` handles its child."""

    def __init__(self, pid):
        self.pid = pid

    def poll(self):
        return None if running(self.pid) else 3

    def wait(self, timeout):
        while running(self.pid):
            time.sleep(0.01)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self.wait(5)


class FakeProcess(vllm_server.ServerProcess):
    """A server process that runs the stand-in."""

    zygote = None

    def start(self):
        self.stop()
        self.start_at(vllm_server.free_port(self.host))

    def start_at(self, port):
        self.port = port
        FakeProcess.zygote.stdin.write(f"{port} {VOCABULARY}\n")
        FakeProcess.zygote.stdin.flush()
        self.process = Pid(int(FakeProcess.zygote.stdout.readline()))


@pytest.fixture(scope="module", autouse=True)
def zygote():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(FAKE)], **pipes) as process:
        FakeProcess.zygote = process
        yield
        process.stdin.close()


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def make(model, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_fleet, "ServerProcess", FakeProcess)
    made, said = [], []

    def make(servers=2, weights=True, in_flight=False, recompute_kv=False, **settings):
        cfg = {
            "mode": "server", "num_servers": servers, "bucket_bytes": 2048, "call_timeout_s": 4.0, "generate_timeout_s": 30.0,
            "health_every_s": 0.2, "health_timeout_s": 1.0, "start_timeout_s": 60.0, **settings,
        }  # fmt: skip
        source = (lambda: named(model)) if weights else None
        setup = Setup(
            VllmConfig(**cfg),
            model,
            model.name_or_path,
            torch.device("cpu"),
            tmp_path,
            weights=source,
            say=lambda s: said.append(s),
            in_flight=in_flight,
            recompute_kv=recompute_kv,
        )
        engine = vllm.make(setup)
        made.append(engine)
        engine.sync(named(model), 0)
        engine.said = said
        return engine

    yield make
    for engine in made:
        engine.close()


def named(model):
    return ((n, p.detach()) for n, p in model.named_parameters())


def fault(engine, number, **kind):
    engine.fleet[number].target.request("POST", "/fault", kind)


def requests(groups=6, n=3):
    return [Request((2, 5 + g % 8, 3 + g), 100 * g + i, 5) for g in range(groups) for i in range(n)]


def expected(model, asked, n=3):
    """What the stand-in draws with the weights of `model`."""
    weights = float(sum(t.double().sum() for _, t in ws.Wire(model, padding(model)).stream(named(model))))
    return [
        tokens(list(r.prompt_ids), asked[i - i % n].seed, i % n, weights, r.max_new_tokens, VOCABULARY)
        for i, r in enumerate(asked)
    ]


def padding(model):
    return padding_for(model.config, CPU_MULTIPLE)


def check(engine, model, version, groups=6):
    """Every sample there, once, in order, and of the right weights."""
    asked = requests(groups)
    got = engine.generate(asked, SAMPLING)
    assert [c.token_ids for c in got] == expected(model, asked)
    assert {c.weight_version for c in got} == {version}


def test_two_servers_one_of_which_dies_in_mid_rollout(make, model):
    engine = make()
    check(engine, model, 0)
    fault(engine, 1, die_after=2, slow=0.02)
    fault(engine, 0, slow=0.02)
    check(engine, model, 0, groups=20)
    check(engine, model, 0)  # brought back with the present weights
    assert engine.health() == "ok" and engine.fleet[1].target.weight_version() == "0"
    assert [m.restarts for m in engine.fleet] == [0, 1]
    assert any("vLLM server 1" in s and "failed" in s for s in engine.said)


def test_the_only_server_dies_in_mid_rollout_and_is_given_its_weights_again(make, model):
    engine = make(servers=1)
    engine.sync(named(model), 5)
    fault(engine, 0, die_after=3, slow=0.02)
    check(engine, model, 5, groups=12)
    assert engine.fleet[0].restarts == 1


def test_a_hung_server_is_found_by_its_health_and_replaced(make, model):
    engine = make(generate_timeout_s=3600.0)  # of a request: who waited for it would wait longer than this test may
    for number in (0, 1):
        fault(engine, number, slow=0.1)
    threading.Timer(0.15, lambda: os.kill(engine.fleet[0].process.process.pid, signal.SIGSTOP)).start()
    check(engine, model, 0, groups=40)
    check(engine, model, 0)
    assert engine.fleet[0].restarts == 1 and engine.health() == "ok"


@pytest.mark.parametrize("kind", ["token", "logprob", "count", "shape", "label", "json"])
def test_garbage_is_not_taken_and_its_server_is_replaced(make, model, kind):
    engine = make(servers=1)
    fault(engine, 0, garbage=kind)
    check(engine, model, 0)
    assert engine.fleet[0].restarts == 1 and "garbage" in " ".join(engine.said)


def test_a_server_with_other_weights_than_it_was_given_draws_nothing_that_counts(make, model):
    engine = make()
    engine.fleet[0].target.request("POST", "/start_weight_update")
    engine.fleet[0].target.request("POST", "/finish_weight_update", {"weight_version": "41"})
    check(engine, model, 0)  # the other one draws what it was asked for
    check(engine, model, 0)
    assert engine.fleet[0].restarts == 1 and "weights of version 41 instead of 0" in " ".join(engine.said)


@pytest.mark.parametrize("weights", [True, False], ids=["asked again", "from the copy"])
def test_a_server_that_dies_in_mid_sync(make, model, weights):
    engine = make(weights=weights)
    fault(engine, 1, die_at_bucket=2)
    engine.sync(named(model), 1)
    assert engine.fleet[1].restarts == 1 and engine.fleet[0].restarts == 0
    assert [m.target.weight_version() for m in engine.fleet] == ["1", "1"]
    check(engine, model, 1)
    engine.sync(named(model), 2)
    check(engine, model, 2)


def test_a_server_that_hangs_in_mid_sync(make, model):
    engine = make()
    os.kill(engine.fleet[0].process.process.pid, signal.SIGSTOP)
    engine.sync(named(model), 1)
    assert engine.fleet[0].restarts == 1
    check(engine, model, 1)


def test_retries_and_restarts_are_bounded_and_end_with_a_sentence(make, model):
    engine = make(servers=1, max_restarts=1, max_retries=5)
    os.kill(engine.fleet[0].process.process.pid, signal.SIGKILL)
    check(engine, model, 0)
    os.kill(engine.fleet[0].process.process.pid, signal.SIGKILL)
    with pytest.raises(RolloutFailure, match="no vLLM server is left: vLLM server 0"):
        engine.generate(requests(), SAMPLING)
    with pytest.raises(RolloutFailure, match="no vLLM server could be given the weights of version 1"):
        engine.sync(named(model), 1)
    lying = make(servers=1, max_restarts=9, max_retries=1)

    def lie():
        for m in lying.fleet:
            if m.trouble is None:
                m.target.request("POST", "/fault", {"garbage": "token"})

    lie()
    revive = lying._revive
    lying._revive = lambda: (revive(), lie())[0]
    with pytest.raises(RolloutFailure, match="could not be drawn in 2 rounds"):
        lying.generate(requests(), SAMPLING)


def test_a_found_server_that_dies_is_left_out_and_taken_back_when_it_is_there_again(make, model, tmp_path):
    own = [FakeProcess({}, host="127.0.0.1", log=tmp_path / f"{i}.log", api_key=None) for i in (0, 1)]
    for p in own:
        p.start()
    while not all(vllm_fleet.HttpTarget(p.url, None, 1, 1).alive(1) == "ok" for p in own):
        time.sleep(0.05)
    engine = make(urls=[p.url for p in own])
    check(engine, model, 0)
    port = own[1].port
    own[1].stop()
    check(engine, model, 0)
    assert "vLLM server 1" in engine.health()
    engine.sync(named(model), 1)
    check(engine, model, 1)
    own[1].start_at(port)
    while vllm_fleet.HttpTarget(own[1].url, None, 1, 1).alive(1) != "ok":
        time.sleep(0.05)
    engine.sync(named(model), 2)
    assert engine.health() == "ok" and engine.fleet[1].target.weight_version() == "2"
    check(engine, model, 2)
    for p in own:
        p.stop()


# -------------------------------------------------------------------------------------------------------- in flight


def drawn_under(engine, asked, *syncs):
    """What is drawn while other threads give the weights of `syncs`, each 1.5 s after the one before."""
    box = []
    thread = threading.Thread(target=lambda: box.append(engine.generate(asked, SAMPLING)))
    thread.start()
    for sync in syncs:
        time.sleep(1.5)
        assert thread.is_alive(), "nothing waits for the answers"
        sync()
    thread.join()
    return box[0]


def changed(model):
    """The same model with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.125)
    return other


def check_spans(got, asked, by_version):
    """Each token is the one that the weights of its version draw, whatever drew those before it."""
    whole = {version: expected(model, asked) for version, model in by_version.items()}
    for i, c in enumerate(got):
        versions = [v for v, count in c.versions for _ in range(count)]
        assert c.token_ids == [whole[v][i][place] for place, v in enumerate(versions)]
        assert c.weight_version == versions[0] and len(c.logprobs) == len(versions)


@pytest.mark.parametrize("recompute", [False, True])
def test_weights_that_change_in_the_midst_of_answers(make, model, recompute):
    """Six groups of three over two servers, five tokens each: all under way when the weights come, and again."""
    engine = make(in_flight=True, recompute_kv=recompute)
    for number in (0, 1):
        fault(engine, number, slow=5.0)
    models = {0: model, 1: changed(model), 2: changed(changed(model))}
    asked = requests()
    syncs = [lambda v=v: engine.sync(named(models[v]), v) for v in (1, 2)]
    got = drawn_under(engine, asked, *syncs)
    check_spans(got, asked, models)
    assert all(len(c.versions) == 3 for c in got), "each answer carries all three"
    assert engine.health() == "ok" and [m.restarts for m in engine.fleet] == [0, 0]
    how = engine.fleet[0].target.request("GET", "/paused")["paused"]
    assert set(how) == {f"mode=keep&clear_cache={str(recompute).lower()}"}
    assert {c.versions for c in engine.generate(asked, SAMPLING)} == {((2, 5),)}


def test_a_server_that_dies_in_an_update_in_flight_loses_no_answer(make, model):
    """Its answers are drawn again, by the weights of then; those of the other one wait for whole weights and go on."""
    engine = make(in_flight=True, weights=False)
    for number in (0, 1):
        fault(engine, number, slow=5.0, **({"die_at_bucket": 2} if number else {}))
    models, asked = {0: model, 1: changed(model)}, requests()
    got = drawn_under(engine, asked, lambda: engine.sync(named(models[1]), 1))
    check_spans(got, asked, models)
    assert {len(c.versions) for c in got} == {1, 2}, "those of the server that stayed span two versions"
    assert [m.restarts for m in engine.fleet] == [0, 1] and engine.health() == "ok"


def test_an_update_that_is_not_whole_leaves_nothing_to_answer_with(make, model):
    engine = make(in_flight=True)
    with pytest.raises(UserError, match="tensors are missing"):
        engine.sync(list(named(model))[:-1], 1)
    with pytest.raises(RolloutFailure, match="no vLLM server has a whole set of weights"):
        engine.generate(requests(), SAMPLING)
    engine.sync(named(model), 2)
    check(engine, model, 2)


def test_asked_to_stop_while_sampling(make, model):
    engine = make()
    for number in (0, 1):
        fault(engine, number, slow=0.2)
    asked = []
    engine.setup.should_stop = lambda: asked.append(1) or len(asked) > 3
    with pytest.raises(InterruptedError):
        engine.generate(requests(200), SAMPLING)
    assert len(asked) == 4, "it is asked while requests are out, and once it says yes no more of them are waited for"
    engine.setup.should_stop = lambda: False
    check(engine, model, 0)


def test_a_server_that_does_not_start_is_named_with_its_last_words(make, monkeypatch):
    class Broken(FakeProcess):
        def start(self):
            super().start()
            self.process.kill()
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.write_text("ValueError: no such model")

    monkeypatch.setattr(vllm_fleet, "ServerProcess", Broken)
    with pytest.raises(UserError, match=r"vLLM server 0 .* ended with code .*ValueError: no such model"):
        make(servers=1)
