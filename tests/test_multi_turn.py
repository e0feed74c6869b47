"""Several turns: the KV cache kept between them, what carries loss, and what each turn is credited with."""

import numpy as np
import pytest
import torch
from fakes import CopyTask
from runs import lines, without_times

from amft_fast import config_file, objective
from amft_fast.advantages import group_advantages, turn_advantages
from amft_fast.config import AdvantageConfig, ObjectiveConfig
from amft_fast.data.batch import micro_batches
from amft_fast.interfaces import Demo, Message, Request, Sample, Sampling, Turn
from amft_fast.model.policy import Policy
from amft_fast.rollout import decoder, episodes
from amft_fast.rollout.decoder import Decoder
from amft_fast.rollout.forward import ForwardReader
from amft_fast.rollout.transformers import TransformersEngine
from amft_fast.run import checkpoint, launch

pytestmark = pytest.mark.cpu_isa

STOP = (1,)


@pytest.fixture(params=["decoder", "forward"])
def reader(request, monkeypatch):
    """Both ways in which the engine reads."""
    if request.param == "forward":
        monkeypatch.setattr(decoder, "FAMILIES", ())
    return request.param


class OnlyCompletes:
    """An engine without conversations of its own."""

    def __init__(self, engine):
        self.generate = engine.generate


def draw(engine, encoder, turns, temperature=1.0, n=4, max_new_tokens=5):
    task = CopyTask(max_turns=turns)
    sampling = Sampling(temperature, stop_token_ids=STOP)
    settings = {"num_generations": n, "max_new_tokens": max_new_tokens, "seed_parts": (3,)}
    return episodes.run(engine, task, task.prompts("train"), encoder, sampling, **settings)


# ---------------------------------------------------------------------------------------------------------- conversations


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("max_batch", [512, 3])
def test_kept_caches_give_what_reading_everything_anew_gives(model, encoder, reader, temperature, max_batch):
    kept = draw(TransformersEngine(model, max_batch=max_batch), encoder, 4, temperature)
    anew = draw(OnlyCompletes(TransformersEngine(model)), encoder, 4, temperature)
    assert len({len(s.turns) for s in kept}) > 1  # episodes of different length, side by side
    for a, b in zip(kept, anew, strict=True):
        assert a.response_ids == b.response_ids and a.loss_mask == b.loss_mask and a.turns == b.turns
        np.testing.assert_allclose(a.behavior_logprobs, b.behavior_logprobs, atol=2e-5)
        assert (a.reward, a.success, a.text, a.finish_reason) == (b.reward, b.success, b.text, b.finish_reason)


def test_logprobs_of_later_turns_are_those_of_a_plain_forward(model, encoder, reader):
    for s in draw(TransformersEngine(model), encoder, 3):
        ids = torch.tensor([s.prompt_ids + s.response_ids])
        logp = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        own = torch.tensor(s.loss_mask, dtype=torch.bool)
        got = torch.tensor(s.behavior_logprobs)
        torch.testing.assert_close(got[own], logp[len(s.prompt_ids) - 1 :][own], atol=2e-5, rtol=1e-4)
        assert (got[~own] == 0).all()
        entropies = torch.special.entr(model(ids).logits[0, :-1].double().softmax(-1)).sum(-1)[len(s.prompt_ids) - 1 :]
        assert abs(s.entropy - entropies[own].sum()) < 1e-4 * len(got)


def test_every_token_is_read_once(model, encoder, reader, monkeypatch):
    engine, read = TransformersEngine(model), []
    engine.explain()  # compares the two readers, which reads tokens
    kind, name = (Decoder, "run") if reader == "decoder" else (ForwardReader, "_forward")
    whole = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, ids, *a: (read.append(ids.numel()), whole(self, ids, *a))[1])
    samples = draw(engine, encoder, 4)
    prompts = len({tuple(s.prompt_ids) for s in samples}) * len(samples[0].prompt_ids)
    # Of each response all but the last token: nothing follows it.
    assert sum(read) == prompts + sum(len(s.response_ids) - 1 for s in samples)


def test_a_conversation_does_not_wait_for_anothers_turn(model, reader):
    """The short one answers three times before the long one has ended its first turn."""
    told = []

    def reply(i, completion):
        told.append((i, len(completion.token_ids)))
        if i == 1 or told.count((0, 2)) == 3:
            return None
        known = asked[0].prompt_ids + tuple(completion.token_ids) + (2, 8, 3)
        asked[0] = Request(known, 50 + len(told), 2)
        return asked[0]

    asked = [Request((2, 5, 3), 7, 2), Request((2, 6, 3), 8, 60)]
    TransformersEngine(model).converse(asked, Sampling(), reply)
    assert told == [(0, 2)] * 3 + [(1, 60)]


def test_a_reply_that_forgets_what_was_said_is_refused(model):
    with pytest.raises(ValueError, match="must begin with the tokens so far"):
        TransformersEngine(model).converse([Request((2, 5, 3), 7, 2)], Sampling(), lambda i, c: Request((2, 6), 1, 2))


def test_a_sample_does_not_depend_on_its_neighbours_in_later_turns(model, encoder, reader):
    many, few = (draw(TransformersEngine(model), encoder, 3, n=n) for n in (5, 2))
    assert [s.response_ids for s in many[:2]] == [s.response_ids for s in few[:2]]


# ------------------------------------------------------------------------------------------------------------- the loss


def gradients_by_position(policy, sequences):
    """Norm of the loss's gradient at each position's last hidden state, [sequences, longest]."""
    kept = []
    handle = policy.backbone.register_forward_hook(
        lambda m, a, out: (out.last_hidden_state.retain_grad(), kept.append(out))[0]
    )
    (batch,) = micro_batches(sequences, 10**6, packed=False)
    policy(batch).loss.backward()
    handle.remove()
    norms = kept[0].last_hidden_state.grad.norm(dim=-1)
    return {i: norms[row] for row, i in enumerate(batch.members)}


@pytest.mark.parametrize("level", ["trajectory", "turn"])
def test_only_the_policys_own_tokens_carry_loss(model, encoder, level):
    samples = draw(TransformersEngine(model), encoder, 3)
    policy = Policy(model, ObjectiveConfig(entropy_coef=0.1))
    rl = [objective.rollout_sequence(s, 1.0) for s in samples]
    objective.set_advantages(rl, samples, AdvantageConfig(kind="dr_grpo", level=level))
    rl = objective.weigh_rl(rl, 1.0, objective.count_tokens([], rl).rl, policy.objective)
    norms = gradients_by_position(policy, rl)
    masked = 0
    for i, s in enumerate(samples):
        own = np.array([0] * len(s.prompt_ids) + s.loss_mask)
        predicts_own = torch.zeros(len(norms[i]), dtype=torch.bool)
        predicts_own[: len(own) - 1] = torch.from_numpy(own[1:] > 0)
        assert (norms[i][~predicts_own] == 0).all() and (norms[i][predicts_own] > 0).all()
        masked += s.loss_mask.count(0)
    assert masked > 10  # the verifier has spoken


def test_a_demo_of_several_turns_imitates_its_answers_alone(model, encoder):
    demo = Demo("x", (Message("user", "a"),), "b", more=((Message("user", "again"), "a"), (Message("user", "no"), "c")))
    prompt, response, mask, images = encoder.demo(demo)
    assert images == ()
    chat = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 3, ["a", "b", "again", "a", "no", "c"])]
    text = encoder.tokenizer.apply_chat_template(chat, tokenize=False)
    assert prompt + response == encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    words = encoder.tokenizer.convert_ids_to_tokens([t for t, on in zip(response, mask) if on])
    assert words == ["b", "<eos>", "a", "<eos>", "c", "<eos>"]
    seq = objective.demo_sequence(prompt, response, mask)
    norms = gradients_by_position(Policy(model, ObjectiveConfig()), [seq.with_fields(nll_weight=1.0)])[0]
    n = len(seq.ids) - 1
    assert ((norms[:n] > 0).numpy() == seq.trained[1:]).all() and not norms[n:].any() and seq.trained.sum() == 6


# -------------------------------------------------------------------------------------------------------------- credit


def test_turn_advantages_worked_by_hand():
    # Two samples of one prompt: returns from each turn on are (1, 2) and (0), then (−1, 0).
    rewards = [np.array([-1.0, 2.0]), np.array([0.0]), np.array([3.0])]
    states = [["0", "1"], ["0"], ["0"]]
    got = turn_advantages(rewards, states, np.array([5, 5, 6]), "dr_grpo")
    assert [a.tolist() for a in got] == [[0.5, 0.0], [-0.5], [0.0]]  # the second turn and group 6 have no like
    at_once = turn_advantages(rewards, states, np.array([5, 5, 6]), "dr_grpo", gamma=0.0)
    assert [a.tolist() for a in at_once] == [[-0.5, 0.0], [0.5], [0.0]]
    half = turn_advantages(rewards, states, np.array([5, 5, 6]), "rloo", gamma=0.5)
    assert [a.tolist() for a in half] == [[0.0, 0.0], [0.0], [0.0]]


def test_turns_are_compared_in_the_state_they_were_made_in():
    # The second sample needed two tries at point 0: its third turn is at point 1, as the first sample's second.
    rewards = [np.array([1.0, 1.0]), np.array([-1.0, 1.0, -1.0])]
    states = [["0/0", "1/0"], ["0/0", "0/1", "1/0"]]
    got = turn_advantages(rewards, states, np.array([0, 0]), "dr_grpo", gamma=0.0)
    assert [a.tolist() for a in got] == [[1.0, 1.0], [-1.0, 0.0, -1.0]]


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce++"])
def test_with_one_turn_both_levels_are_the_same(kind):
    rewards, groups = np.array([1.0, 0.0, 0.5, 2.0, 2.0, 0.0]), np.array([0, 0, 0, 1, 1, 1])
    by_turn = turn_advantages([np.array([r]) for r in rewards], [["0"]] * 6, groups, kind)
    np.testing.assert_array_equal(np.concatenate(by_turn), group_advantages(rewards, groups, kind))


def test_single_turn_equals_multi_turn_with_one_turn(model, encoder):
    """The same samples and, at either level, the same sequences to train on."""
    one = draw(TransformersEngine(model), encoder, 1)
    several = draw(TransformersEngine(model), encoder, 3)
    for a, b in zip(one, several):
        assert b.response_ids[: b.turns[0].end] == a.response_ids and a.turns[0] == b.turns[0]
    by_level = []
    for level in ("trajectory", "turn"):
        rl = [objective.rollout_sequence(s, 1.0) for s in one]
        objective.set_advantages(rl, one, AdvantageConfig(level=level))
        by_level.append(np.concatenate([s.fields["advantages"][s.trained] for s in rl]))
    np.testing.assert_array_equal(*by_level)
    assert np.ptp(by_level[0]) > 0


def test_each_turns_tokens_get_its_own_credit():
    def sample(mask, *turns):
        return Sample([2, 5], [6] * len(mask), mask, [-1.0] * len(mask), 0, "stop", "p", 0, [Turn(*t) for t in turns])

    samples = [
        sample([1, 1, 1, 0, 0, 1, 1], (3, 0.0, "a"), (7, 4.0, "b")),
        sample([1, 1], (2, 2.0, "a")),
        sample([1, 1, 0, 1], (2, 0.0, "a"), (4, 0.0, "b")),
    ]
    rl = [objective.rollout_sequence(s, 1.0) for s in samples]
    objective.set_advantages(rl, samples, AdvantageConfig(kind="dr_grpo", level="turn"))
    got = [s.fields["advantages"][s.trained].tolist() for s in rl]
    assert got == [[2.0, 2.0, 2.0, 2.0, 2.0], [0.0, 0.0], [-2.0, -2.0, -2.0]]


# --------------------------------------------------------------------------------------------------------------- resume


SHORT_RUN = """
run = { threads = 1 }
train = { steps = 4, lr = 0.01, prompts_per_step = 4, demos_per_step = 4 }
rollout = { num_generations = 4, max_new_tokens = 4 }
advantage = { level = "turn" }
controller = { window = 3 }
meta = { prompts = 2 }
eval = { every = 0, num_samples = 1 }
log = { to = [] }
checkpoint = { every = 2, keep_last = 9, keep_best = false, export = false }
"""


def test_a_resumed_multi_turn_run_goes_on_bit_for_bit(tmp_path, checkpoint_folder):
    folders = tmp_path / "whole", tmp_path / "cut"

    (tmp_path / "c.toml").write_text(SHORT_RUN)

    def train(folder, resume=False):
        flags = ["--run.dir", str(folder), "--model.path", str(checkpoint_folder), "--train.method", "fixed"]
        cfg = config_file.load(tmp_path / "c.toml", flags)
        assert launch.train(cfg, resume, CopyTask(max_turns=3)) == 0

    def records(folder):
        return without_times(lines(folder))

    for folder in folders:
        train(folder)
    (folders[1] / "checkpoints" / "step-000004" / "state.json").write_text("damaged")
    train(folders[1], resume=True)
    assert records(folders[0]) == records(folders[1])
    assert any(r["turns"] > 1 for r in records(folders[0])) and "task/words" in records(folders[0])[0]
    a, b = (checkpoint.load(f / "checkpoints" / "step-000004")[0] for f in folders)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
