"""The real vLLM as servers on a CPU: two of them, weights in place over HTTP and gloo, kills and hangs, training to the end."""

import copy
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from fakes import CopyTask, copy_run, make_checkpoint
from transformers import AutoModelForCausalLM
from vllm_cases import GREEDY, SAMPLED, assert_answers_as, named, requests, shake

pytest.importorskip("vllm", reason="needs vLLM: make test-integration has an environment with it")

from amft_fast.config import ModelConfig, VllmConfig
from amft_fast.errors import UserError
from amft_fast.interfaces import Request, Sampling
from amft_fast.model.policy import load_model
from amft_fast.rollout import vllm
from amft_fast.rollout.transformers import TransformersEngine
from amft_fast.rollout.vllm.groups import group_requests
from amft_fast.rollout.vllm.http_target import HttpTarget
from amft_fast.rollout.vllm.setup import Setup
from amft_fast.rollout.vllm.weight_sync import TransferError
from amft_fast.run import launch

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
SMALL = {"bucket_bytes": 4096, "kv_cache_bytes": 16 << 20, "max_num_seqs": 64}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """Two servers with a tied model; test_vllm_offline.py has the untied one."""
    folder = make_checkpoint(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cfg = VllmConfig(
        mode="server",
        num_servers=2,
        call_timeout_s=20,
        health_every_s=0.5,
        health_timeout_s=5,
        generate_timeout_s=120,
        **SMALL,
    )
    setup = Setup(cfg, model, str(folder), torch.device("cpu"), folder, weights=lambda: named(model))
    engine = vllm.make(setup)
    engine.sync(named(model), 0)
    yield model, engine
    engine.close()


def check(model, engine, version, n=12):
    got = assert_answers_as(engine, model, requests(n))
    assert {c.weight_version for c in got} == {version}
    assert {m.target.weight_version() for m in engine.fleet if m.trouble is None} == {str(version)}


def test_after_each_of_several_syncs_both_servers_draw_as_the_trainer(fleet):
    model, engine = fleet
    for version in range(1, 4):
        shake(model, version)
        engine.sync(named(model), version)
        check(model, engine, version)
        for m in engine.fleet:  # each of them alone as well
            group = group_requests(requests(3))[0]
            (want,) = TransformersEngine(model).generate(requests(3)[:1], GREEDY)
            assert m.target.generate(group, GREEDY)[0].token_ids == want.token_ids


def test_a_server_samples_as_the_engine_in_the_trainers_process_would(fleet):
    """The stream of a sample is its seed's, whichever server draws it and whatever else is drawn."""
    _, engine = fleet
    asked = requests(24)
    everything = [c.token_ids for c in engine.generate(asked, SAMPLED)]
    assert [c.token_ids for c in engine.generate(asked[8:16], SAMPLED)] == everything[8:16]
    assert len(set(map(tuple, everything))) > 12


def test_the_routes_are_shut_without_the_key(fleet):
    _, engine = fleet
    stranger = HttpTarget(engine.fleet[0].target.name, None, 5, 5)
    assert stranger.alive(5) == "ok"
    for call in (stranger.pause, stranger.weight_version, stranger.missing, stranger.start_weight_update):
        with pytest.raises(UserError, match="refuses the API key"):
            call()


def test_an_incomplete_sync_is_refused_and_the_next_whole_one_heals(fleet):
    model, engine = fleet
    shake(model, 50)
    with pytest.raises(UserError, match=r"expected model\.layers\.0\.mlp\.up_proj"):
        engine.sync([x for x in named(model) if "layers.0.mlp.up_proj" not in x[0]], 10)
    engine.sync(named(model), 11)
    assert [m.restarts for m in engine.fleet] == [0, 0], "nobody had to be started again"
    check(model, engine, 11)


def test_killed_in_mid_sync_and_in_mid_rollout(fleet):
    model, engine = fleet
    shake(model, 60)

    def dying():
        for i, item in enumerate(named(model)):
            if i == 12:
                os.killpg(engine.fleet[1].process.process.pid, signal.SIGKILL)
            yield item

    engine.sync(dying(), 12)
    assert [m.restarts for m in engine.fleet] == [0, 1], "the other one went on with the same process"
    check(model, engine, 12)

    victim = engine.fleet[0].process.process.pid
    threading.Timer(0.3, lambda: os.killpg(victim, signal.SIGKILL)).start()
    asked = [r for k in range(40) for r in requests(12, length=200)]
    deadline = time.monotonic() + 120
    while engine.fleet[0].trouble is None and engine.fleet[0].restarts == 0 and time.monotonic() < deadline:
        got = engine.generate(asked, GREEDY)
    want = TransformersEngine(model).generate(requests(12, length=200), GREEDY)
    assert [c.token_ids for c in got] == [c.token_ids for c in want] * 40
    check(model, engine, 12)
    assert engine.health() == "ok" and engine.fleet[0].restarts == 1


def test_a_stopped_server_is_found_and_replaced(fleet):
    model, engine = fleet
    os.killpg(engine.fleet[1].process.process.pid, signal.SIGSTOP)
    before = engine.fleet[1].restarts
    check(model, engine, 12, n=60)
    check(model, engine, 12)
    assert engine.fleet[1].restarts == before + 1 and engine.health() == "ok"


# -------------------------------------------------------------------------------------------------------- in flight


def scored(model, completion, prompt):
    """Log-probs of the completion's tokens by the model, each after those before it."""
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    with torch.no_grad():
        logprobs = (model(ids).logits[0, len(prompt) - 1 : -1].double() / FLIGHT.temperature).log_softmax(-1)
    return logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()


FLIGHT = Sampling(1.0)  # nothing ends an answer before its length


@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])
def test_answers_go_on_under_new_weights_and_say_which_drew_each_token(tmp_path, recompute):
    """Eight answers of 1,500 tokens by a server, two syncs under them, the first of which breaks off and is made again."""
    folder = make_checkpoint(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.max_position_embeddings = 2048  # the server is told
    models = {0: model, 1: copy.deepcopy(model), 2: copy.deepcopy(model)}
    for version in (1, 2):
        shake(models[version], version)
    # On a busy machine the server may be late in saying that it is well: it is not to be started again for that.
    patience = {"call_timeout_s": 120, "health_timeout_s": 60, "generate_timeout_s": 300}
    cfg = VllmConfig(mode="server", num_servers=1, **patience, **SMALL)
    said = []
    setup = Setup(
        cfg,
        model,
        str(folder),
        torch.device("cpu"),
        tmp_path,
        in_flight=True,
        recompute_kv=recompute,
        say=said.append,
    )
    engine = vllm.make(setup)
    try:
        engine.sync(named(model), 0)
        box, prompt = [], (2, 5, 3)
        asked = [Request(prompt, 1000, 1500) for _ in range(8)]
        thread = threading.Thread(target=lambda: box.append(engine.generate(asked, FLIGHT)))
        thread.start()
        time.sleep(0.5)
        sync = engine.weight_sync.send

        def broken(targets, tensors, version):
            engine.weight_sync.send = sync
            list(tensors)  # read to their end, as a transfer does
            raise TransferError("broken off on purpose")

        engine.weight_sync.send = broken
        engine.sync(named(models[1]), 1)
        engine.sync(named(models[2]), 2)
        under_way = thread.is_alive()
        thread.join()
        assert under_way and len(box) == 1 and engine.fleet[0].restarts == 0, said
        spans = 0
        for c in box[0]:
            versions = [v for v, count in c.versions for _ in range(count)]
            assert len(versions) == len(c.token_ids) == 1500 and c.weight_version == versions[0] == 0
            by = {v: scored(models[v], c, prompt) for v in set(versions)}
            for place, (version, logprob) in enumerate(zip(versions, c.logprobs)):
                if recompute or version == 0:  # else keys and values before it are of other weights
                    assert logprob == pytest.approx(by[version][place], abs=2e-3)
            spans += len(c.versions) > 1
        assert spans == 8
        fresh = engine.generate(requests(12), GREEDY)
        want = TransformersEngine(models[2]).generate(requests(12), GREEDY)
        assert [c.token_ids for c in fresh] == [c.token_ids for c in want], (
            "no keys of old weights are left for new answers"
        )
        assert {c.versions for c in fresh} == {((2, len(c.token_ids)),) for c in fresh}
    finally:
        engine.close()


# --------------------------------------------------------------------------------------------------------- training


SERVED = (
    *("--train.method", "rl", "--train.steps", "6", "--rollout.num_generations", "4", "--eval.num_samples", "2"),
    *("--rollout.engine", "vllm", "--rollout.vllm.mode", "server", "--rollout.vllm.kv_cache_bytes", str(16 << 20)),
    *("--rollout.vllm.call_timeout_s", "20"),
)


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_rollouts_ahead_are_one_step_old_and_the_engine_agrees_with_the_trainer(tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    assert launch.train(copy_run(tmp_path / "run", folder, *SERVED, "--rollout.async_steps", "1"), task=CopyTask()) == 0
    steps = records(tmp_path / "run")
    assert [r["staleness_max"] for r in steps] == [0, 1, 1, 1, 1, 1]
    assert steps[0]["mismatch_max"] < 1e-3, "drawn with the very weights that it is trained on"
    assert all(r["mismatch_ess"] > 0.3 for r in steps)


def test_training_in_flight(tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    flags = ("--rollout.async_steps", "2", "--rollout.in_flight", "true")
    assert launch.train(copy_run(tmp_path / "run", folder, *SERVED, *flags), task=CopyTask()) == 0
    steps = records(tmp_path / "run")
    assert [r["staleness_max"] for r in steps][:2] == [0, 1] and all(r["staleness_max"] <= 2 for r in steps)
    assert all(r["mismatch_ess"] > 0.3 for r in steps)


def test_a_mixture_of_experts_answers_as_the_trainers(tmp_path):
    """Experts come one by one; after a sync vLLM's CPU kernel must read them in its own order, and the router is a new one."""
    folder = make_checkpoint(tmp_path, hidden=32, experts=6, expert_width=32)
    model = load_model(ModelConfig(path=str(folder)), torch.device("cpu"))
    cfg = VllmConfig(mode="server", call_timeout_s=60, **SMALL)
    engine = vllm.make(Setup(cfg, model, str(folder), torch.device("cpu"), folder))
    try:
        for version in range(3):
            shake(model, version)
            engine.sync(named(model), version)
            assert_answers_as(engine, model, requests(6))
    finally:
        engine.close()
