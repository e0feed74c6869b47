"""The meta-gradient: its sign and size against finite differences through the real step, the probe, the cache."""

import math

import numpy as np
import pytest
import torch
from fakes import CopyTask
from transformers import AutoModelForCausalLM, AutoTokenizer

from amft_fast import objective
from amft_fast.config import MetaConfig, ObjectiveConfig, TrainConfig
from amft_fast.data.batch import micro_batches
from amft_fast.engine.local import LocalEngine
from amft_fast.interfaces import Sample
from amft_fast.meta_gradient import RolloutCache, UtilityGradient
from amft_fast.model.policy import Policy
from amft_fast.multi_tensor import mixing_slope, named_sums
from amft_fast.rollout.encoder import Encoder

pytestmark = pytest.mark.cpu_isa

OBJECTIVE = ObjectiveConfig(entropy_coef=0.02)


@pytest.fixture(autouse=True)
def norms_in_fp64(monkeypatch):
    """transformers' RMSNorm works in fp32 whatever it is given: too coarse for differences of 1e-8."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(Qwen3RMSNorm, "forward", forward)


def make_engine(folder, **train):
    cfg = TrainConfig(**({"lr": 1e-6, "max_grad_norm": 1e9} | train))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return LocalEngine(Policy(model, OBJECTIVE), cfg)


def rollouts(engine, seed, n=12, off_policy=0.0):
    """Random answers with random advantages; behaviour log-probs are the policy's own, moved by `off_policy`."""
    rng = np.random.default_rng(seed)
    sequences = []
    for g in range(n):
        k = int(rng.integers(1, 7))
        answer = [int(x) for x in rng.integers(5, 14, k)]
        sample = Sample([2, 5 + g % 4, 3], answer, [1] * k, [0.0] * k, 0, "stop", f"p{g}", g)
        sequences.append(objective.rollout_sequence(sample, 1.0).with_fields(advantages=float(rng.normal())))
    for batch in micro_batches(sequences, 10**6, False, torch.float64):
        logp = engine.policy.logprobs(batch).logprobs
        for i, part in zip(batch.members, logp.split(batch.counts)):
            s = sequences[i]
            s.fields["behavior_logprobs"] = np.zeros(len(s.ids))
            s.fields["behavior_logprobs"][s.trained] = part.numpy() + off_policy * rng.normal(size=len(part))
    return sequences


def demos(seed, n=8):
    rng = np.random.default_rng(seed)
    return [
        objective.demo_sequence([2, 5 + i % 4, 3], [int(x) for x in rng.integers(5, 14, 3)] + [1]) for i in range(n)
    ]


def sweeps(engine, mu, seed=1, max_tokens=10**6, packed=False):
    """The two sweeps of a probed step on fixed demonstrations and rollouts."""
    sft, rl = demos(seed), rollouts_cache(engine, seed)
    counts = objective.count_tokens(sft, rl)
    for name, part in (
        ("sft", objective.weigh_sft(sft, mu, counts.sft)),
        ("rl", objective.weigh_rl(rl, 1 - mu, counts.rl, OBJECTIVE)),
    ):
        for batch in micro_batches(part, max_tokens, packed, torch.float64):
            engine.backward(batch)
        engine.end_sweep(name)


def rollouts_cache(engine, seed):
    """The same training rollouts on every call for one engine: they are data here, not resampled."""
    if not hasattr(engine, "fixed_rollouts"):
        engine.fixed_rollouts = rollouts(engine, seed)
    return engine.fixed_rollouts


def utility_batches(engine, seed=7, off_policy=0.3):
    if not hasattr(engine, "fixed_utility"):
        held_out = rollouts(engine, seed, 20, off_policy)
        n = sum(s.trained.sum() for s in held_out)
        weighed = [s.with_fields(pg_weight=1 / n) for s in held_out]
        engine.fixed_utility = micro_batches(weighed, 10**6, False, torch.float64)
    return engine.fixed_utility


def utility(engine):
    """U on fixed rollouts: mean of A times the importance ratio against the log-probs sampled with."""
    total = 0.0
    for b in utility_batches(engine):
        ratio = (engine.policy.logprobs(b).logprobs - b.get("behavior_logprobs")).exp()
        total += float((b.get("pg_weight") * b.get("advantages") * ratio).sum())
    return total


def gradient_u(engine):
    """u = ∇(−U) as the trainer takes it: on-policy form with truncated importance weights (cap far away here)."""
    for b in utility_batches(engine):
        engine.backward(b, ObjectiveConfig(entropy_coef=0.0, tis_cap=1e6))
    return engine.take_gradient()


def slope_by_probe(engine, mu, lr, diagonal):
    u = gradient_u(engine)
    sweeps(engine, mu)
    sums, clip = engine.probe([u, u])
    engine.zero_grad()
    return lr * mixing_slope(named_sums(sums.tolist(), mu), "u1", diagonal, float(clip)), float(clip)


def slope_by_finite_difference(engine, mu, delta=0.02):
    state = {k: v.clone() for k, v in engine.state_dict().items()}
    values = []
    for m in (mu + delta, mu - delta):
        sweeps(engine, m)
        engine.step()
        values.append(utility(engine))
        engine.load_state_dict(state)
    return (values[0] - values[1]) / (2 * delta)


def warm(engine, steps=4):
    """Warms AdamW's moments on other data: at its very first step the derivative is nearly 0."""
    for i in range(steps):
        for b in micro_batches(objective.weigh_sft(demos(50 + i), 1.0, 32), 10**6, False, torch.float64):
            engine.backward(b)
        engine.step()


@pytest.mark.parametrize("clip", [1e9, 0.05], ids=["no clipping", "clipping"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("mu", [0.3, 0.8])
def test_slope_of_utility_in_mu_through_the_real_step(checkpoint_folder, optimizer, clip, mu):
    lr = 1e-6
    engine = make_engine(checkpoint_folder, lr=lr, optimizer=optimizer, max_grad_norm=clip)
    warm(engine)
    engine.cfg = engine.cfg.model_copy(update={"max_grad_norm": clip})
    diagonal = "exact" if optimizer == "adamw" else None
    # A step this small moves U by ~1e-8: fp64 leaves 7 digits of the difference.
    want = slope_by_finite_difference(engine, mu, 0.002)
    got, c = slope_by_probe(engine, mu, lr, diagonal)
    assert (c < 1) == (clip < 1)
    assert got == pytest.approx(want, rel=0.01), (got, want)


def test_the_sign_raises_mu_when_demonstrations_help(checkpoint_folder):
    """When the held-out utility is the demonstrations' own likelihood, its loss falls along −g_SFT: the signal is positive."""
    engine = make_engine(checkpoint_folder, optimizer="sgd")
    for b in micro_batches(objective.weigh_sft(demos(1), 1.0, 32), 10**6, False, torch.float64):
        engine.backward(b)
    u = engine.take_gradient()
    sweeps(engine, 0.5)
    n = named_sums(engine.probe([u, u])[0].tolist(), 0.5)
    assert n["u1_sft"] / math.sqrt(n["u1_u1"] * n["sft_sft"]) == pytest.approx(1.0, abs=1e-9)
    assert n["u1_d"] > 0 and mixing_slope(n) > 0


@pytest.mark.parametrize("mu", [0.1, 0.6])
def test_probe_equals_separately_computed_gradients(checkpoint_folder, mu):
    engine = make_engine(checkpoint_folder)
    u = gradient_u(engine)
    sft, rl = demos(1), rollouts_cache(engine, 1)
    counts = objective.count_tokens(sft, rl)
    gradients = []
    for part in (objective.weigh_sft(sft, 1.0, counts.sft), objective.weigh_rl(rl, 1.0, counts.rl, OBJECTIVE)):
        for b in micro_batches(part, 10**6, False, torch.float64):
            engine.backward(b)
        gradients.append(torch.cat(engine.take_gradient()))
    sweeps(engine, mu)
    n = named_sums(engine.probe([u, u])[0].tolist(), mu)
    g_sft, g_rl = gradients
    flat = torch.cat(u)
    for name, want in {
        "u1_sft": flat @ g_sft, "u1_rl": flat @ g_rl, "sft_sft": g_sft @ g_sft, "rl_rl": g_rl @ g_rl, "sft_rl": g_sft @ g_rl,
    }.items():  # fmt: skip
        assert float(n[name]) == pytest.approx(float(want), rel=1e-10, abs=1e-14), name


@pytest.mark.parametrize(("max_tokens", "packed"), [(1, False), (17, False), (10**6, True), (30, True)])
def test_probe_does_not_depend_on_micro_batches_or_packing(checkpoint_folder, max_tokens, packed):
    engine = make_engine(checkpoint_folder)
    u = gradient_u(engine)
    sweeps(engine, 0.4)
    whole, _ = engine.probe([u, u])
    engine.zero_grad()
    sweeps(engine, 0.4, max_tokens=max_tokens, packed=packed)
    torch.testing.assert_close(engine.probe([u, u])[0], whole, rtol=1e-9, atol=1e-13)


def test_a_probed_step_updates_as_a_plain_one(checkpoint_folder):
    masters = []
    for probed in (True, False):
        engine = make_engine(checkpoint_folder, lr=1e-2)
        sft, rl = demos(1), rollouts_cache(engine, 1)
        counts = objective.count_tokens(sft, rl)
        parts = [objective.weigh_sft(sft, 0.3, counts.sft), objective.weigh_rl(rl, 0.7, counts.rl, OBJECTIVE)]
        if probed:
            u = gradient_u(engine)
            sweeps(engine, 0.3)
            engine.probe([u, u])
        else:
            for b in micro_batches(parts[0] + parts[1], 10**6, False, torch.float64):
                engine.backward(b)
        engine.step()
        masters.append(torch.cat([g.master for g in engine.groups]))
    torch.testing.assert_close(*masters, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- the cache


def make_utility(folder, engine, **meta):
    cfg = MetaConfig(**({"prompts": 4, "num_generations": 2, "memory": 0.0, "refresh_share": 0.25} | meta))
    encoder = Encoder(AutoTokenizer.from_pretrained(folder))
    task = CopyTask()
    items = task.prompts("train")
    demos = {d.id: d for d in task.demos("train")}
    return UtilityGradient(cfg, items, demos, encoder, engine, lambda s: micro_batches(s, 10**6, False), 1.0), items


class Drawer:
    """Draws the answer 'a' (token 5) with reward 1 and 'b' with reward 0, at log-probs it is told."""

    def __init__(self, logprob=-1.0, gap=0.0):
        self.logprob, self.gap, self.asked = logprob, gap, []

    def __call__(self, items, step):
        self.asked.append((step, [i.id for i in items]))
        out = []
        for g, item in enumerate(items):
            for token, reward in ((5, 1.0), (6, 0.0)):
                s = Sample([2, 5, 3], [token], [1], [self.logprob - self.gap * (token == 6)], step, "stop", item.id, g)
                s.reward, s.success = reward, reward > 0
                out.append(s)
        return out


def test_importance_weighted_gradient_against_brute_force(checkpoint_folder):
    """u = −(1/N) Σ min(π/π_then, cap) A ∇log π, written out with autograd over one-token answers."""
    engine = make_engine(checkpoint_folder)
    logprobs = engine.policy.model(torch.tensor([[2, 5, 3]])).logits[0, -1].log_softmax(-1)
    then = float(logprobs[5].detach()) - math.log(
        1.5
    )  # token 5 has become 1.5 times as likely, token 6 is wherever it is
    utility_gradient, _ = make_utility(checkpoint_folder, engine, is_cap=2.0, min_ess=0.0)
    got = utility_gradient.compute(0, Drawer(then))
    ratios = (logprobs[[5, 6]].detach() - then).exp().clamp(max=2.0)
    # Group of rewards 1, 0: advantages ±1 (up to ε). Each half has 2 prompts, 4 tokens, the same answers in both.
    loss = -(ratios[0] * logprobs[5] - ratios[1] * logprobs[6]) * 2 / 4
    engine.zero_grad()
    loss.backward()
    want = torch.cat(engine.take_gradient())
    for half in got.halves:
        torch.testing.assert_close(torch.cat(half), want, rtol=1e-5, atol=1e-9)
    w = np.array(ratios)
    plain = np.exp(np.array(logprobs[[5, 6]].detach()) - then)
    assert got.figures["ess"] == pytest.approx(plain.sum() ** 2 / (2 * (plain**2).sum()), rel=1e-6) and w.max() <= 2.0


def test_the_cache_rolls_oldest_first():
    cache, draw = RolloutCache(CopyTask().prompts("train"), 0.25), Drawer()
    for step in range(6):
        cache.refresh(step, draw)
    asked = [ids for _, ids in draw.asked]
    assert asked[0] == ["train/a", "train/b", "train/c", "train/d"]
    assert asked[1:] == [["train/a"], ["train/b"], ["train/c"], ["train/d"], ["train/a"]]
    assert [g.step for g in cache.groups] == [5, 2, 3, 4]


def test_refresh_share_one_is_fresh():
    cache, draw = RolloutCache(CopyTask().prompts("train"), 1.0), Drawer()
    for step in range(3):
        assert cache.refresh(step, draw) == 4


def test_a_stale_cache_is_redrawn(checkpoint_folder):
    engine = make_engine(checkpoint_folder)
    utility_gradient, _ = make_utility(checkpoint_folder, engine, min_ess=0.9)
    draw = Drawer(-1.0, gap=3.0)
    utility_gradient.compute(0, draw)
    assert len(draw.asked) == 1, "a cache drawn just now is not drawn again"
    figures = utility_gradient.compute(1, draw).figures
    assert len(draw.asked) == 3 and len(draw.asked[-1][1]) == 4 and figures["drawn"] == 5
    lenient, _ = make_utility(checkpoint_folder, engine, min_ess=0.0)
    draw = Drawer(-1.0, gap=3.0)
    for step in (0, 1):
        lenient.compute(step, draw)
    assert len(draw.asked) == 2


@pytest.mark.parametrize("broken", [0, 1, 2], ids=["the first of all", "a share", "all again"])
def test_a_draw_that_breaks_off_leaves_the_cache_as_it_was(checkpoint_folder, broken):
    """A stop in mid-draw saves the state: u is made again, of the rollouts that it would have had."""

    class Stopping(Drawer):
        left = broken

        def __call__(self, items, step):
            if self.left == 0:
                self.left -= 1
                raise InterruptedError
            self.left -= 1
            return super().__call__(items, step)

    engine = make_engine(checkpoint_folder)
    (stopped, _), (whole, _) = (make_utility(checkpoint_folder, engine, min_ess=0.9) for _ in range(2))
    draw, undisturbed = Stopping(-1.0, gap=3.0), Drawer(-1.0, gap=3.0)
    for step in (0, 1):
        before = stopped.cache.state_dict()
        try:
            got = stopped.compute(step, draw)
        except InterruptedError:
            assert stopped.cache.state_dict() == before
            got = stopped.compute(step, draw)
        want = whole.compute(step, undisturbed)
        assert got.figures == want.figures and stopped.cache.state_dict() == whole.cache.state_dict()
    assert draw.left < 0 and len(undisturbed.asked) == 3


def test_cache_state_goes_round(checkpoint_folder):
    engine = make_engine(checkpoint_folder)
    one, items = make_utility(checkpoint_folder, engine)
    one.compute(0, Drawer())
    other = RolloutCache(items, 0.25)
    other.load_state_dict(one.cache.state_dict())
    assert other.state_dict() == one.cache.state_dict()


def test_groups_without_spread_add_nothing_and_hybrid_takes_their_demonstrations(checkpoint_folder):
    class Failing(Drawer):
        def __call__(self, items, step):
            out = super().__call__(items, step)
            for s in out:
                s.reward, s.success = 0.0, False
            return out

    engine = make_engine(checkpoint_folder)
    reward, _ = make_utility(checkpoint_folder, engine)
    got = reward.compute(0, Failing())
    assert got.figures["useful_groups"] == 0 and not any(t.any() for half in got.halves for t in half)
    hybrid, _ = make_utility(checkpoint_folder, engine, utility="hybrid")
    nll, _ = make_utility(checkpoint_folder, engine, utility="nll")
    a, b = hybrid.compute(0, Failing()), nll.compute(0, Failing())
    assert a.figures["demo_groups"] == 4
    for x, y in zip(a.halves, b.halves):
        torch.testing.assert_close(x, y)
        assert any(t.any() for t in x)


def test_computing_u_leaves_the_engine_as_it_was(checkpoint_folder):
    engine = make_engine(checkpoint_folder)
    before = {k: v.clone() for k, v in engine.state_dict().items()}
    make_utility(checkpoint_folder, engine)[0].compute(0, Drawer())
    assert all(torch.equal(v, before[k]) for k, v in engine.state_dict().items())
    assert not any(g.grad.any() for g in engine.groups)


def test_memory_pools_fresh_groups_into_an_exponential_average(checkpoint_folder):
    """With memory only the groups just drawn are worked on; a group counts `memory` times less each window."""
    engine = make_engine(checkpoint_folder)
    kept, _ = make_utility(checkpoint_folder, engine, memory=0.5, refresh_share=0.5)
    draw, fresh = Drawer(-1.0, gap=1.0), []
    real = kept._gradient

    def spy(indices, drawn):
        utility = real(indices, drawn)
        fresh.append(([t.clone() for t in utility.halves[0]], len(list(indices))))
        return utility

    kept._gradient = spy
    for step in range(3):
        got = kept.compute(step, draw)
    assert [n for _, n in fresh] == [4, 2, 2]
    weights = [4 * 0.25, 2 * 0.5, 2.0]
    want = sum(w * f[0][0] for w, f in zip(weights, fresh)) / sum(weights)
    torch.testing.assert_close(got.halves[0][0], want)
