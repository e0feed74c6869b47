"""Experts that a rollout engine tells: training passes send tokens there, with the weights that their routers give them."""

import base64
import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes import make_checkpoint
from rounding import rounding
from sequences import assert_same, gradients, imitate, mixed
from transformers import AutoModelForCausalLM

from amft_fast import config_file, objective
from amft_fast.config import ObjectiveConfig
from amft_fast.data.batch import micro_batches
from amft_fast.errors import UserError
from amft_fast.interfaces import Completion, Request, Sample, Sampling
from amft_fast.model import attention
from amft_fast.model.layers import checkpoint_layers
from amft_fast.model.policy import Policy
from amft_fast.rollout import ahead, episodes
from amft_fast.rollout.vllm.groups import EngineError, group_requests
from amft_fast.rollout.vllm.http_target import HttpTarget
from amft_fast.rollout.vllm.offline_target import OfflineTarget

SAME = rounding(sum(len(s.ids) for s in mixed()) + 32)
E, K, LAYERS = 6, 2, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("mixture"), experts=E)


def make_policy(folder):
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="amft_packed")
    return Policy(model, ObjectiveConfig())


def told(ids, at):
    """Experts by lot, the same wherever the same tokens come before; −1, the router's own choice, at every third place."""
    rng = np.random.default_rng([at + 1, *(int(i) for i in ids[: at + 1])])
    return rng.permuted(np.tile(np.arange(E), (LAYERS, 1)), axis=1)[:, :K] if at % 3 else np.full((LAYERS, K), -1)


def with_experts(sequences):
    """The last token's are not known, as of what an engine drew."""
    return [replace(s, experts=np.array([told(s.ids, t) for t in range(len(s.ids) - 1)], np.int16)) for s in sequences]


def plain_gradients(folder, sequences):
    """One by one through transformers' loop in fp64, with routers whose choice is overwritten token by token."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    now = {}
    for layer, block in enumerate(model.model.layers):
        gate = block.mlp.gate

        def forward(hidden, gate=gate, layer=layer):
            logits = F.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
            rows, weights = [], []
            for t, scores in enumerate(logits):
                given = now["experts"][t, layer].tolist() if t < len(now["experts"]) else [-1]
                chosen = scores.topk(K).indices.tolist() if given[0] < 0 else given
                shares = torch.stack(
                    [scores[e] for e in chosen]
                ).exp()  # the softmax's sum goes with the renormalisation
                rows.append(torch.tensor(chosen))
                weights.append(shares / shares.sum())
            return logits, torch.stack(weights), torch.stack(rows)

        gate.forward = forward
    for s in sequences:
        now["experts"] = s.experts
        imitate(model, s)
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(("packed", "max_tokens"), [(True, 10**6), (True, 40), (False, 10**6)])
def test_gradients_are_those_of_routers_that_are_told(folder, packed, max_tokens):
    """Packed rows with prompts in common among them."""
    sequences = with_experts(mixed())
    want = plain_gradients(folder, sequences)
    assert_same(gradients(make_policy(folder), sequences, max_tokens, packed), want, SAME)
    own = gradients(make_policy(folder), mixed())
    far = max(float((own[n] - want[n]).norm() / want[n].norm()) for n in want if want[n].norm())
    assert far > 0.1, "they were sent elsewhere"


def test_layers_that_are_computed_again_send_their_tokens_to_the_same_experts(folder):
    sequences, policy = with_experts(mixed()), make_policy(folder)
    want = gradients(policy, sequences)
    checkpoint_layers(policy.model, False)
    assert_same(gradients(policy, sequences), want, SAME)


def test_what_the_routers_chose_themselves_changes_nothing(folder):
    policy = make_policy(folder)
    batch = micro_batches(mixed(), 10**6, True)[0]
    seen = []
    hooks = [r.register_forward_hook(lambda m, i, out: seen.append(out[2])) for r in policy.routing.routers]
    want = policy(batch)
    for hook in hooks:
        hook.remove()
    got = policy(replace(batch, experts=torch.stack(seen, dim=1)))
    assert torch.equal(got.logprobs, want.logprobs) and torch.equal(got.loss, want.loss)


def test_a_pass_without_them_and_the_reference_choose_for_themselves(folder):
    policy = make_policy(folder)
    alone, told_ = (micro_batches(s, 10**6, True)[0] for s in (mixed(), with_experts(mixed())))
    want = policy.logprobs(alone).logprobs
    assert not torch.equal(policy.logprobs(told_).logprobs, want)
    assert torch.equal(policy.logprobs(alone).logprobs, want)
    reference = make_policy(folder).model
    assert torch.equal(policy.logprobs(told_, reference).logprobs, policy.logprobs(alone, reference).logprobs)


# ------------------------------------------------------------------------------------------------ from engine to update


def routed(tokens, start=0):
    return (start + np.arange(tokens * LAYERS * K).reshape(tokens, LAYERS, K)) % E


def test_turns_add_up_what_is_known_of_each_token():
    """The second turn's engine has read the first again; what drew the first is what counts."""
    sample = Sample([2, 5], [], [], [], 0, "", "a", 0)
    episodes._note_experts(sample, Completion([6, 7], [-1, -1], "stop", 0, experts=routed(3)))
    sample.turns.append(None)
    episodes._note_experts(sample, Completion([8], [-1], "stop", 0, experts=routed(6, 1)))
    assert np.array_equal(sample.experts, np.concatenate([routed(3), routed(6, 1)[3:]]))
    episodes._note_experts(sample, Completion([8], [-1], "stop", 0))
    assert sample.experts is None, "a turn of which nothing is known"


def test_a_sample_keeps_them_in_a_checkpoint_and_gives_them_to_its_sequence():
    sample = Sample([2, 5], [6, 7], [1, 1], [-1.0, -1.0], 0, "stop", "a", 0, experts=routed(3).astype(np.int16))
    again = ahead.sample_of(json.loads(json.dumps(ahead.kept(sample))))
    assert np.array_equal(again.experts, sample.experts) and again.experts.dtype == np.int16
    assert objective.rollout_sequence(again, 1.0).experts is again.experts
    batch = micro_batches([objective.rollout_sequence(again, 1.0), objective.demo_sequence([2], [6, 7, 8])], 100, False)
    assert batch[0].experts.shape == (
        8 if batch[0].input_ids.shape == (2, 4) else batch[0].input_ids.numel(),
        LAYERS,
        K,
    )
    assert (batch[0].experts >= 0).all(-1).all(-1).sum() == 3


def test_an_engine_in_the_trainers_process_is_asked_for_them():
    ids = [6, 7]
    logprobs = [{i: SimpleNamespace(logprob=-1.0)} for i in ids]
    output = SimpleNamespace(
        index=0, token_ids=ids, logprobs=logprobs, finish_reason="length", routed_experts=routed(4)
    )

    class Engine:
        llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=9))

        def generate(self, prompts, params, **_):
            return [SimpleNamespace(outputs=[output], prompt_token_ids=[2, 5])]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **k: k))
        patch.setitem(sys.modules, "vllm.inputs", SimpleNamespace(TokensPrompt=dict))
        groups = group_requests([Request((2, 5), 1, 2)])
        for replay, want in ((True, routed(3)), (False, None)):
            ((got,),) = OfflineTarget(Engine(), 9, replay=replay).generate(groups, Sampling(), 4)
            assert np.array_equal(got.experts, want) if replay else got.experts is None
        output.routed_experts = None
        with pytest.raises(EngineError, match="the experts of 4 tokens are None"):
            OfflineTarget(Engine(), 9, replay=True).generate(groups, Sampling(), 4)


def test_a_server_is_asked_for_them(monkeypatch):
    held = io.BytesIO()
    np.save(held, routed(4).astype(np.uint8))
    choice = {
        "index": 0,
        "token_ids": [6, 7],
        "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -2.0}]},
        "finish_reason": "length",
        "weight_versions": [{"version": "3", "start": 0, "end": 2}],
        "routed_experts": base64.b64encode(held.getvalue()).decode(),
    }
    target = HttpTarget("127.0.0.1:1", None, 1, 1, replay=True)
    monkeypatch.setattr(target, "request", lambda *a, **k: {"choices": [choice]})
    (group,) = group_requests([Request((2, 5), 1, 2)])
    (got,) = target.generate(group, Sampling())
    assert np.array_equal(got.experts, routed(3))
    choice["routed_experts"] = "nonsense"
    with pytest.raises(EngineError, match="the experts of 4 tokens"):
        target.generate(group, Sampling())


def test_where_they_cannot_be_had_one_sentence_says_so(checkpoint_folder, tmp_path):
    from amft_fast.rollout.vllm.setup import Setup

    model = AutoModelForCausalLM.from_pretrained(checkpoint_folder)
    flags = ["--rollout.engine", "vllm", "--rollout.vllm.router_replay", "true"]
    cfg = config_file.load(None, flags)
    setup = Setup(cfg.rollout.vllm, model, str(checkpoint_folder), torch.device("cpu"), tmp_path)
    with pytest.raises(UserError, match="the model has no routers"):
        setup.engine_settings(setup.wire())
    with pytest.raises(UserError, match="is for whole ones"):
        config_file.load(None, [*flags, "--engine.kind", "deepspeed", "--engine.sequence_parallel", "2"])
