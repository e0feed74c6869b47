"""Each method that mixes imitation and exploration: what enters an update with which weights, against its formula; its
traps."""

import math
from types import SimpleNamespace

import numpy as np
import plain_losses as plain
import pytest
import torch
from fakes import CopyTask, ScriptedEngine, copy_run, make_checkpoint
from runs import steps, taken_up, train, trainer_of
from transformers import AutoModelForCausalLM

from amft_fast import config_file, mixtures, objective
from amft_fast.config import Config, MixtureConfig
from amft_fast.data.batch import micro_batches
from amft_fast.errors import UserError
from amft_fast.interfaces import Item, Sample, Sampling, Turn
from amft_fast.methods import METHODS
from amft_fast.mixtures.base import groups_of
from amft_fast.mixtures.demos import DemoOfPrompt
from amft_fast.model.policy import Policy
from amft_fast.rollout import episodes
from amft_fast.scoring import Scorer

pytestmark = pytest.mark.cpu_isa

DEMOS = {"a": [5, 6, 7, 8, 9, 1], "b": [10, 11, 1], "c": [12, 5, 13, 1]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("mixtures"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")


def prompt_of(name):
    return [2, 5 + "abc".index(name), 3]


def samples(rewards, seed=0):
    """Answers to prompts a, b, c with these rewards, one list a prompt; above 0.5 is right."""
    rng = np.random.default_rng(seed)
    out = []
    for group, earned in enumerate(rewards):
        for reward in earned:
            ids = [int(x) for x in rng.integers(5, 14, int(rng.integers(1, 7)))]
            s = Sample(prompt_of("abc"[group]), ids, [1] * len(ids), [-2.0] * len(ids), 0, "stop", "abc"[group], group)
            s.reward, s.success, s.turns = reward, reward > 0.5, [Turn(len(ids), reward)]
            out.append(s)
    return out


class Ours:
    """A method's update as the trainer makes it, in fp64: `gradients` of the update, and the mixture itself."""

    def __init__(self, model, method, *flags, demos=DEMOS, **cuts):
        base = ["--train.method", method, "--rollout.num_generations", "4", "--advantage.kind", "grpo", *flags]
        self.cfg: Config = config_file.load(None, base)
        self.model, self.cuts = model, {"max_tokens": 10**6, "packed": False, "ranks": 1} | cuts
        shape = (METHODS[method].shaping, self.cfg.mixture.luffy_gamma)
        self.policy = Policy(model, self.cfg.objective, shape=shape)
        self.demos = demos
        self.mixture = mixtures.make(self.cfg, mixtures.Tools(self.demo, self.tokens))

    def demo(self, prompt_id):
        return objective.demo_sequence(prompt_of(prompt_id), self.demos[prompt_id]) if prompt_id in self.demos else None

    def batches(self, sequences):
        most, packed, ranks = self.cuts.values()
        return [b for r in range(ranks) for b in micro_batches(sequences, most, packed, torch.float64, r, ranks)]

    def tokens(self, sequences):
        fake = SimpleNamespace(
            forward_only=lambda copies: [
                SimpleNamespace(members=b.members, counts=b.counts, logprobs=o.logprobs, entropy=o.entropy)
                for b in self.batches(copies)
                if b.members
                for o in [self.policy.logprobs(b)]
            ]
        )
        return Scorer.tokens(fake, sequences)

    def mix(self, drawn, mu=0.0, stream=()):
        rl = [objective.rollout_sequence(s, 1.0) for s in drawn]
        kind = self.mixture.kind
        advantage = self.cfg.advantage.model_copy(update={"kind": kind}) if kind else self.cfg.advantage
        objective.set_advantages(rl, drawn, advantage, 8)
        return self.mixture.mix(list(stream), groups_of(drawn, rl), mu)

    def gradients(self, mix):
        self.model.zero_grad()
        counts = objective.count_tokens(mix.sft, mix.rl)
        sft = objective.weigh_sft(mix.sft, mix.sft_weight, counts.sft)
        rl = objective.weigh_rl(mix.rl, mix.rl_weight, counts, self.cfg.objective)
        for batch in self.batches(sft + rl):
            self.policy(batch).loss.backward()
        return [p.grad.clone() for p in self.model.parameters()]


def held_against(model, ours, wanted):
    model.zero_grad()
    wanted.backward()
    truth = [p.grad.clone() for p in model.parameters()]
    assert max(g.abs().max() for g in truth) > 1e-5
    for a, b in zip(ours, truth):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


def demo_logp(model, name):
    """Log-probs and entropies of a demonstration's answer."""
    logp, entropy = plain.plain_tokens(model, prompt_of(name) + DEMOS[name])
    return logp[2:], entropy[2:]


def answer_logp(model, s):
    logp, entropy = plain.plain_tokens(model, s.prompt_ids + s.response_ids)
    n = len(s.prompt_ids) - 1
    return logp[n:], entropy[n:]


REWARDS = [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]


def test_luffy(model):
    ours, drawn = Ours(model, "luffy"), samples(REWARDS)
    assert ours.mixture.generations == 3
    terms, tokens = 0.0, 0
    for g, name in enumerate("abc"):
        group = drawn[3 * g : 3 * g + 3]
        earned = [*REWARDS[g], 1.0]
        mean = sum(earned) / 4
        for s in group:
            logp, _ = answer_logp(model, s)
            terms, tokens = terms - ((s.reward - mean) * logp).sum(), tokens + len(logp)
        p = demo_logp(model, name)[0].exp()
        terms, tokens = terms - ((1 - mean) * p / (p + 0.1)).sum(), tokens + len(p)
    held_against(model, ours.gradients(ours.mix(drawn)), terms / tokens)


def test_luffy_trap_a_group_that_all_earned_the_same_in_has_no_gradient(model):
    """The authors compute the mask for such groups and do not apply it."""
    ours = Ours(model, "luffy")
    assert not any(g.any() for g in ours.gradients(ours.mix(samples([[1.0, 1.0, 1.0]]))))


def test_luffy_without_a_demonstration_is_the_group_alone(model):
    ours = Ours(model, "luffy", demos={})
    mix = ours.mix(samples([[1.0, 0.0, 0.0]]))
    assert len(mix.rl) == 3 and [s.fields["advantages"][-1] for s in mix.rl] == pytest.approx([2 / 3, -1 / 3, -1 / 3])


def test_srft(model):
    ours, drawn = Ours(model, "srft"), samples(REWARDS)
    demo, rollout, n_demo, n_rollout = 0.0, 0.0, 0, 0
    for g, name in enumerate("abc"):
        logp, entropy = demo_logp(model, name)
        advantage = 1 - (sum(REWARDS[g]) + 1) / 4
        weight = 0.5 * torch.exp(-entropy.mean()).detach()
        demo = demo + (-weight * logp - advantage * logp.exp() / (logp.exp() + 0.1)).sum()
        n_demo += len(logp)
        for s in drawn[3 * g : 3 * g + 3]:
            logp, entropy = answer_logp(model, s)
            rollout = rollout + (-0.1 * entropy.mean().exp().detach() * logp if s.success else logp).sum()
            n_rollout += len(logp)
    held_against(model, ours.gradients(ours.mix(drawn)), demo / n_demo + rollout / n_rollout)


def test_chord_phi(model):
    ours, drawn = Ours(model, "chord_phi"), samples([[1.0, 0.0, 0.0, 0.0]])
    stream = [objective.demo_sequence(prompt_of(n), DEMOS[n]) for n in "bc"]
    logp = torch.cat([demo_logp(model, n)[0] for n in "bc"])
    phi = (logp.exp() * (1 - logp.exp())).detach()
    rl = torch.cat([-s_a * answer_logp(model, s)[0] for s, s_a in zip(drawn, _grpo([1.0, 0, 0, 0]))])
    wanted = 0.1 * (-phi * logp).mean() + 0.9 * rl.mean()
    held_against(model, ours.gradients(ours.mix(drawn, 0.1, stream)), wanted)


def _grpo(rewards):
    r = np.array(rewards)
    return (r - r.mean()) / (r.std() + 1e-6)


@pytest.mark.parametrize(("method", "gate", "weight"), [("hpt", 1, 0.3), ("hpt", 0, 1.0), ("superrl", 0, 1.0)])
def test_gated(model, method, gate, weight):
    flags = ["--mixture.hpt_gate", str(gate), "--mixture.hpt_demo_weight", str(weight)] if method == "hpt" else []
    rewards = [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    ours, drawn = Ours(model, method, *flags), samples(rewards)
    demos, rl = [], []
    for g, name in enumerate("abc"):
        if sum(rewards[g]) <= gate:
            demos.append(demo_logp(model, name)[0])
            continue
        advantages = _grpo(rewards[g]) if method == "superrl" else np.array(rewards[g]) - np.mean(rewards[g])
        rl += [-a * answer_logp(model, s)[0] for s, a in zip(drawn[3 * g : 3 * g + 3], advantages)]
    share = len(demos) / 3
    assert len(demos) == 1 + gate
    wanted = share * weight * -torch.cat(demos).mean() + (1 - share) * torch.cat(rl).mean()
    mix = ours.mix(drawn)
    assert mix.mu == share
    held_against(model, ours.gradients(mix), wanted)


def test_gated_without_a_demonstration_explores(model):
    mix = Ours(model, "hpt", demos={}).mix(samples([[0.0, 0.0]]))
    assert not mix.sft and len(mix.rl) == 2 and mix.rl_weight == 1


def test_relift(model):
    ours = Ours(model, "relift", "--mixture.relift_buffer", "2", "--mixture.relift_entropy", "0.3")
    assert ours.mixture.extra() == [], "no prompt has failed yet: the authors' code ends here"
    ours.mix(samples([[1.0, 0.0]]))
    assert ours.mixture.extra() == []
    ours.mix(samples([[1.0, 0.0], [0.0, 0.0]]))
    mix = ours.mix(samples([[1.0, 0.0], [0.0, 0.0]]))  # again, once is enough
    assert ours.mixture.waiting == ["b"] and len(mix.rl) == 4 and not mix.sft
    ours.mix(samples([[0.0, 0.0]] * 3))
    assert ours.mixture.waiting == ["b", "a", "c"]
    again = Ours(model, "relift", "--mixture.relift_buffer", "2").mixture
    again.load_state_dict(ours.mixture.state_dict())
    assert again.waiting == ["b", "a", "c"]
    (extra,) = ours.mixture.extra()
    assert ours.mixture.waiting == ["c"], "oldest first: the authors take the newest, and old ones wait for ever"
    parts = [demo_logp(model, n) for n in "ba"]
    logp, entropy = (torch.cat([p[i] for p in parts]) for i in (0, 1))
    held_against(model, ours.gradients(extra), -logp.mean() - 0.3 * entropy.mean())


def test_uft(model):
    ours = Ours(model, "uft", "--mixture.uft_hint_weight", "0.2")
    drawn = samples([[1.0, 0.0], [0.0, 1.0]])
    for s in drawn[:2]:  # two tokens of the demonstration, then what was drawn
        s.response_ids, s.hint = [5, 6, *s.response_ids], 2
        s.loss_mask, s.behavior_logprobs = [0, 0, *s.loss_mask], [0.0, 0.0, *s.behavior_logprobs]
    rl = []
    for s, a in zip(drawn, [1, -1, -1, 1]):
        rl.append(-a / (1 + 2e-6) * answer_logp(model, s)[0][s.hint :])
    hint = demo_logp(model, "a")[0][:2]
    held_against(model, ours.gradients(ours.mix(drawn)), -0.2 * hint.mean() + torch.cat(rl).mean())


def test_uft_hints_are_pieces_of_the_demonstration_and_end(model):
    ours = Ours(model, "uft", "--mixture.uft_pieces", "5")
    item, counts = Item("a", None), []
    for progress in (0.0, 0.3, 0.599, 0.6, 0.9):
        ours.mixture.progress = progress
        hints = [ours.mixture.hint(item, 0, step) for step in range(400)]
        assert all(h == DEMOS["a"][: len(h)] and len(h) < 6 for h in hints), "its end is left to the policy"
        counts.append(np.mean([len(h) for h in hints]))
        assert hints[7] == ours.mixture.hint(item, 3, 7), "all answers to a prompt share it"
    p = [0.95, 0.5, 0.05]
    # L pieces of 5 of the six tokens: 0, 1, 2, 3, 4 and 5 (of 6) tokens for L = 0 ... 5.
    want = [sum(math.comb(5, k) * q**k * (1 - q) ** (5 - k) * min(6 * k // 5, 5) for k in range(6)) for q in p]
    assert counts[:3] == pytest.approx(want, abs=0.25) and counts[3:] == [0, 0]


def test_prefix_rft(model):
    ours = Ours(model, "prefix_rft", "--rollout.num_generations", "3", "--mixture.prefix_entropy_share", "0.4")
    drawn = samples([[1.0, 0.0, 0.0]])
    s = drawn[2]
    s.response_ids, s.hint = [5, 6, 7, 8, 9, *s.response_ids], 5
    s.loss_mask, s.behavior_logprobs = [0] * 5 + s.loss_mask, [0.0] * 5 + s.behavior_logprobs
    rl = []
    for one, a in zip(drawn, [2 / 3, -1 / 3, -1 / 3]):
        logp, entropy = answer_logp(model, one)
        kept = torch.ones(len(logp), dtype=torch.bool)
        if one.hint:
            kept[:5] = entropy[:5] >= entropy[:5].sort().values[-2]
        rl.append(-a * logp[kept])
    assert sum(map(len, rl)) == sum(sum(x.loss_mask) for x in drawn) + 2
    held_against(model, ours.gradients(ours.mix(drawn)), torch.cat(rl).mean())


def test_prefix_rft_gives_one_answer_a_prefix_that_shrinks(model):
    ours = Ours(model, "prefix_rft")
    lengths = []
    for progress in (0.0, 0.5, 1.0):
        ours.mixture.progress = progress
        hints = [ours.mixture.hint(Item("a", None), number, 0) for number in range(4)]
        assert hints[:3] == [[]] * 3 and hints[3] == DEMOS["a"][: len(hints[3])]
        lengths.append(len(hints[3]))
    assert lengths == [5, 3, 0]  # 95, 50 and 5 % of six tokens


@pytest.mark.parametrize("method", ["luffy", "srft", "hpt", "superrl", "uft", "prefix_rft"])
def test_no_method_depends_on_micro_batches_packing_or_ranks(model, method):
    """The trap of that line of code: means by micro-batch, a constant in one denominator and a mean in the other."""
    drawn = samples([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    for s in drawn[2::3]:
        hint = DEMOS[s.prompt_id][:2]
        s.response_ids, s.hint = [*hint, *s.response_ids], len(hint)
        s.loss_mask, s.behavior_logprobs = [0, 0, *s.loss_mask], [0.0, 0.0, *s.behavior_logprobs]
    runs = []
    for cuts in ({}, {"max_tokens": 9}, {"max_tokens": 24, "packed": True, "ranks": 3}):
        ours = Ours(model, method, **cuts)
        runs.append(ours.gradients(ours.mix(drawn)))
    largest = max(g.abs().max().item() for g in runs[0])
    assert largest > 1e-4
    for other in runs[1:]:
        for a, b in zip(other, runs[0]):  # transformers' norms round to fp32
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * largest)


def test_trap_the_loss_is_divided_by_what_was_drawn(model):
    """Twice the same prompts is the same gradient: theirs is a sum over tokens by a constant, never divided by the
    sequences."""
    once = samples([[1.0, 0.0, 0.0]])
    twice = once + samples([[1.0, 0.0, 0.0]])
    for s in twice[3:]:
        s.group_id = 1
    ours = Ours(model, "luffy")
    for a, b in zip(ours.gradients(ours.mix(once)), ours.gradients(ours.mix(twice))):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- hints and demos


def test_an_answer_goes_on_from_its_hint_and_is_judged_with_it(encoder):
    task, engine = CopyTask(), ScriptedEngine([[1], [6, 1]])
    a = encoder.tokenizer.convert_tokens_to_ids("a")
    drawn = episodes.run(
        engine, task, task.prompts("train")[:1], encoder, Sampling(stop_token_ids=(1,)), num_generations=2,
        max_new_tokens=4, seed_parts=(0,), hint=lambda item, number: [a] if number == 0 else [],
    )  # fmt: skip
    assert engine.asked[0].prompt_ids == (*drawn[0].prompt_ids, a) and engine.asked[1].prompt_ids == tuple(
        drawn[1].prompt_ids
    )
    assert drawn[0].success and drawn[0].text == "a" and drawn[0].response_ids == [a, 1]
    assert (drawn[0].hint, drawn[0].loss_mask, drawn[0].behavior_logprobs[0]) == (1, [0, 1], 0.0)
    assert (drawn[1].hint, drawn[1].loss_mask) == (0, [1, 1])
    assert objective.rollout_sequence(drawn[0], 1.0).trained.tolist() == [False] * (len(drawn[0].prompt_ids) + 1) + [
        True
    ]


@pytest.mark.parametrize("hook", [False, True])
def test_the_demonstration_of_a_prompt(hook):
    task, asked = CopyTask(), []
    if hook:
        task.demo = lambda item: asked.append(item.id) or (task.demos("train")[0] if item.data == "a" else None)
    demo = DemoOfPrompt(task, lambda d: d.response)
    assert demo("train/a") == "a" and demo("train/b") == (None if hook else "b")
    assert asked == (["train/a", "train/b"] if hook else [])


RUN = ("--train.steps", "3", "--train.lr", "0.03", "--rollout.num_generations", "4", "--mixture.relift_buffer", "2")


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if row.mixture])
def test_steps_go_on_from_a_checkpoint_as_without_one(tmp_path, checkpoint_folder, method):
    """Two updates a rollout and a warm-up; taken up after the second step, the last two are the same."""
    flags = (*RUN, "--train.method", method, "--train.minibatches_per_rollout", "2", "--train.warmup_steps", "1")
    trainer = trainer_of(copy_run(tmp_path, checkpoint_folder, *flags))
    first = steps(trainer, 2)
    other = taken_up(trainer)
    rest = steps(trainer, 2)
    for step in (*first[1:], *rest):
        assert not step.warmup and 0 <= step.mu <= 1 and step.figures["skipped_total"] == 0
        assert len(step.drawn.samples) == 4 * trainer.mixture.generations
    for a, b in zip(rest, steps(other, 2)):
        assert (a.figures, a.mu, a.drawn.samples) == (b.figures, b.mu, b.drawn.samples)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--train.method", "luffy", "--rollout.num_generations", "1", "--advantage.kind", "reinforce++"],
            "at least 2",
        ),
        (["--train.method", "hpt", "--advantage.kind", "gae"], "must not be gae"),
        (["--train.method", "hpt", "--rollout.dynamic_sampling", "true"], "dynamic_sampling replaces the prompts"),
        (["--mixture.prefix_share", "[1.5, 0]"], r"prefix_share must lie in \[0, 1\]"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        config_file.load(None, flags)


@pytest.mark.parametrize("method", ["hpt", "uft"])
def test_a_task_without_demonstrations_is_refused(tmp_path, checkpoint_folder, method):
    task = CopyTask()
    task.demos = lambda split: []
    with pytest.raises(UserError, match=f"train.method '{method}' .* needs demonstrations and the task has none"):
        train(copy_run(tmp_path, checkpoint_folder, *RUN, "--train.method", method), task=task)


def test_constants_are_the_papers():
    assert MixtureConfig().model_dump() == {
        "demo_reward": 1.0,
        "luffy_gamma": 0.1,
        "srft_demo": 0.5,
        "srft_rollout": 0.1,
        "chord_mu": (0.9, 0.05),
        "chord_steps": 200,
        "chord_phi_mu": 0.1,
        "hpt_gate": 0,
        "hpt_demo_weight": 1.0,
        "relift_buffer": 128,
        "relift_entropy": 0.001,
        "uft_pieces": 5,
        "uft_probability": (0.95, 0.05),
        "uft_share": 0.6,
        "uft_hint_weight": 0.001,
        "prefix_share": (0.95, 0.05),
        "prefix_entropy_share": 0.2,
        "gac_every": 5,  # this and what follows is ours
        "gac_memory": 0.8,
        "gac_max_step": 0.1,
    }
