"""Sampling and the multi-turn driver."""

import numpy as np
import pytest
import torch
from fakes import CopyTask, ScriptedEngine, make_checkpoint
from transformers import AutoModelForCausalLM

from amft_fast.data.stream import sample_seed
from amft_fast.interfaces import Message, Request, Sampling
from amft_fast.rollout import decoder, episodes
from amft_fast.rollout.forward import cache_name
from amft_fast.rollout.sampling import sample_tokens, uniform
from amft_fast.rollout.transformers import TransformersEngine

pytestmark = pytest.mark.cpu_isa

STOP = Sampling(stop_token_ids=(1,))


def requests(n, length=12):
    prompts = [(2, 5, 3), (2, 6, 7, 8, 3), (2, 9, 3)]
    return [Request(prompts[i % 3], 1000 + i, length) for i in range(n)]


def test_uniforms_are_uniform_and_distinct():
    u = uniform(np.arange(200, dtype=np.uint64)[:, None], np.arange(100))
    assert (u >= 0).all() and (u < 1).all() and len(np.unique(u)) == u.size
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.03


def test_sampled_frequencies_are_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    n = 40_000
    u = torch.from_numpy(uniform(np.arange(n, dtype=np.uint64), np.array(0)))
    for temperature in (1.0, 0.5):
        tokens, logp, entropy = sample_tokens(logits.expand(n, -1), u, Sampling(temperature))
        p = (logits[0] / temperature).softmax(-1)
        counts = torch.bincount(tokens, minlength=4) / n
        assert (counts - p).abs().max() < 4 * (p * (1 - p) / n).sqrt().max()
        torch.testing.assert_close(logp, p.log()[tokens])
        torch.testing.assert_close(entropy, torch.special.entr(p).sum().expand(n))


def test_edges_of_the_uniform_stay_in_the_support():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    tokens, logp, _ = sample_tokens(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), Sampling(1.0))
    assert tokens.tolist() == [1, 2] and torch.isfinite(logp).all()


def test_the_nucleus_for_evaluation():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(1000, -1)
    u = torch.from_numpy(uniform(np.arange(1000, dtype=np.uint64), np.array(0)))
    p = logits[0].softmax(-1)
    assert set(sample_tokens(logits, u, Sampling(1.0, top_p=float(p[0]) - 1e-4))[0].tolist()) == {0}
    assert set(sample_tokens(logits, u, Sampling(1.0, top_p=float(p[0]) + 1e-4))[0].tolist()) == {0, 1}


def test_a_sample_does_not_depend_on_its_neighbours(model):
    many = TransformersEngine(model).generate(requests(10), STOP)
    for max_batch in (1, 3):
        few = TransformersEngine(model, max_batch=max_batch).generate(requests(10), STOP)
        assert [c.token_ids for c in few] == [c.token_ids for c in many]
        for a, b in zip(few, many):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    alone = TransformersEngine(model).generate(requests(10)[4:5], STOP)
    assert alone[0].token_ids == many[4].token_ids
    assert len({tuple(c.token_ids) for c in many}) > 5  # different seeds, different samples


def test_logprobs_are_those_of_a_plain_forward_at_the_temperature(model):
    sampling = Sampling(0.7, stop_token_ids=(1,))
    for r, c in zip(requests(6), TransformersEngine(model).generate(requests(6), sampling)):
        ids = torch.tensor([[*r.prompt_ids, *c.token_ids]])
        logp = (model(ids).logits[0, :-1] / 0.7).log_softmax(-1)[len(r.prompt_ids) - 1 :]
        want = logp.gather(-1, torch.tensor(c.token_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(c.logprobs), want.detach(), atol=1e-5, rtol=1e-4)
        assert c.finish_reason == ("stop" if c.token_ids[-1] == 1 else "length")
        assert 1 not in c.token_ids[:-1] and len(c.token_ids) <= 12


@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_cache_goes_by_the_name_that_transformers_gives_it(model, monkeypatch):
    """`past_key_values` became `cache` in 5.24, which warns of the old name."""

    class Older(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None, **rest):
            raise NotImplementedError

    assert cache_name(Older()) == "past_key_values"
    monkeypatch.setattr(decoder, "FAMILIES", ())  # the own loop has a cache of its own
    assert len(TransformersEngine(model).generate(requests(2), STOP)) == 2


def test_greedy_equals_transformers_generate(model):
    got = TransformersEngine(model).generate(requests(3), Sampling(0.0, stop_token_ids=(1,)))
    for r, c in zip(requests(3), got):
        ids = torch.tensor([r.prompt_ids])
        want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert c.token_ids == want[0, len(r.prompt_ids) :].tolist()


def test_each_request_has_its_own_length_bound(model):
    asked = [Request((2, 5, 3), i, n) for i, n in enumerate((1, 4, 9))]
    got = TransformersEngine(model).generate(asked, Sampling())
    assert [len(c.token_ids) for c in got] == [1, 4, 9]


def test_asked_to_stop_between_tokens(model):
    engine = TransformersEngine(model, should_stop=lambda: True)
    with pytest.raises(InterruptedError):
        engine.generate(requests(2), STOP)


def test_seed_depends_on_every_part():
    parts = [
        (0, "train", 3, "p", 1, 0),
        (1, "train", 3, "p", 1, 0),
        (0, "train", 31, "p", 1, 0),
        (0, "train", 3, "p", 2, 0),
    ]
    assert len({sample_seed(*p) for p in parts}) == 4
    assert sample_seed("a", "b") != episodes.sample_seed("ab")


def run(engine, encoder, task, n=1):
    return episodes.run(
        engine, task, task.prompts("train")[:2], encoder, STOP, num_generations=n, max_new_tokens=5, seed_parts=(0,)
    )


def test_multi_turn_appends_the_verifiers_message_with_mask_0(encoder):
    # Word "a" is token 5. First answers: wrong (b, stopped), wrong without stopping; then right, right.
    engine = ScriptedEngine([[6, 1], [7, 7], [5, 1], [6, 1]])
    first, second = run(engine, encoder, CopyTask(max_turns=3))
    again = encoder.tokenizer.convert_tokens_to_ids(["<user>", "again", "<answer>"])
    assert first.response_ids == [6, 1, *again, 5, 1]
    assert first.loss_mask == [1, 1, 0, 0, 0, 1, 1]
    assert first.behavior_logprobs == [-0.5, -0.5, 0.0, 0.0, 0.0, -0.5, -0.5]
    # An answer cut off by its length is closed for it before the verifier speaks, outside the loss.
    assert second.response_ids == [7, 7, 1, *again, 6, 1] and second.loss_mask == [1, 1, 0, 0, 0, 0, 1, 1]
    assert [t.end for t in first.turns] == [2, 7] and [t.reward for t in first.turns] == [0.0, 1.0]
    assert first.success and first.reward == 1.0 and first.weight_version == 7
    # The second turn continues the very tokens of the first.
    assert list(engine.asked[2].prompt_ids) == first.prompt_ids + [6, 1, *again]


def test_turns_are_bounded_and_one_turn_is_single_turn(encoder):
    wrong = ScriptedEngine([[9, 1]] * 6)
    assert [len(s.turns) for s in run(wrong, encoder, CopyTask(max_turns=3))] == [3, 3]
    one = run(ScriptedEngine([[9, 1]] * 2), encoder, CopyTask(max_turns=1))
    assert all(s.loss_mask == [1, 1] and len(s.turns) == 1 for s in one)


def test_group_ids_and_streams_of_a_group(encoder):
    engine = ScriptedEngine([[5, 1]] * 6)
    samples = run(engine, encoder, CopyTask(), n=3)
    assert [s.group_id for s in samples] == [0, 0, 0, 1, 1, 1]
    assert len({r.seed for r in engine.asked}) == 6


def test_feedback_tokens_equal_the_chat_templates(encoder):
    tokenizer = encoder.tokenizer
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "again"},
    ]
    whole = tokenizer(
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), add_special_tokens=False
    )
    pieces = encoder.prompt([Message("user", "a")]) + [6, 1] + encoder.feedback(Message("user", "again"), stopped=True)
    assert pieces == whole["input_ids"]


def test_sync_is_free_but_moves_the_version(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path, seed=1))
    engine = TransformersEngine(model)

    def never():
        raise AssertionError("the embedded engine must not gather weights")
        yield

    engine.sync(never(), 5)
    assert engine.generate(requests(1), STOP)[0].weight_version == 5
