"""The whole loss through the policy: invariance to cutting and packing, and fp64 autograd on plain logits."""

import numpy as np
import pytest
import torch
from rounding import LAYERS, rounding
from transformers import AutoModelForCausalLM

from amft_fast import objective
from amft_fast.config import AdvantageConfig, ObjectiveConfig
from amft_fast.data.batch import TokenSequence, collate, micro_batches, padded_groups, scatter
from amft_fast.interfaces import Sample, Turn
from amft_fast.model.policy import SUMS, Policy

pytestmark = pytest.mark.cpu_isa

MU = 0.3
OBJECTIVE = ObjectiveConfig(entropy_coef=0.05, clip_low=0.1, clip_high=0.15, tis_cap=1.5, kl_coef=0.1, dual_clip=3.0)


@pytest.fixture
def policy(checkpoint_folder):
    model = AutoModelForCausalLM.from_pretrained(checkpoint_folder, dtype=torch.float64, attn_implementation="sdpa")
    return Policy(model, OBJECTIVE)


def sequences(seed=0, n=9):
    """SFT and RL sequences of ragged lengths; old and behaviour log-probs far enough off for clip, cap and KL to act."""
    rng = np.random.default_rng(seed)
    sft = [
        objective.demo_sequence([2, int(rng.integers(5, 13)), 3], [int(x) for x in rng.integers(5, 13, k)] + [1])
        for k in (1, 3, 2, 6)
    ]
    rl = []
    for g in range(n):
        k = int(rng.integers(1, 9))
        prompt, answer = [2, 5 + g % 4, 3], [int(x) for x in rng.integers(5, 14, k)]
        mask = [1] * k
        if k > 4:  # a verifier's message in the middle
            mask[2] = mask[3] = 0
        sample = Sample(prompt, answer, mask, list(rng.normal(-2, 0.5, k) * mask), 0, "stop", f"p{g // 3}", g // 3)
        s = objective.rollout_sequence(sample, 0.7)
        t = len(s.ids)
        rl.append(
            s.with_fields(
                advantages=rng.normal(size=t), old_logprobs=rng.normal(-2, 0.5, t), ref_logprobs=rng.normal(-2, 0.5, t)
            )
        )
    counts = objective.count_tokens(sft, rl)
    return objective.weigh_sft(sft, MU, counts.sft), objective.weigh_rl(rl, 1 - MU, counts.rl, OBJECTIVE), counts


def run(policy, seqs, max_tokens, packed):
    policy.zero_grad()
    sums = 0
    for batch in micro_batches(seqs, max_tokens, packed, torch.float64):
        out = policy(batch)
        out.loss.backward()
        sums = sums + out.sums
    return sums, {n: p.grad.clone() for n, p in policy.named_parameters()}


def test_loss_and_gradients_do_not_depend_on_micro_batches_or_packing(policy):
    sft, rl, _ = sequences()
    whole, grads = run(policy, sft + rl, 10**6, False)
    for max_tokens, packed in ((1, False), (20, False), (35, False), (10**6, True), (24, True)):
        sums, others = run(policy, sft + rl, max_tokens, packed)
        torch.testing.assert_close(sums, whole, rtol=1e-6, atol=1e-9)
        for name, g in grads.items():
            # transformers' norms (4 a layer and the last) round gradients to fp32, a shared prompt's after they are summed.
            apart = rounding(4 * LAYERS + 1) * g.abs().max().item()
            torch.testing.assert_close(others[name], g, rtol=0, atol=apart, msg=lambda m, n=name: f"{n}: {m}")


def test_loss_and_every_gradient_against_fp64_autograd_on_plain_logits(policy):
    """The objective written out on whole logits, sequence by sequence, as algorithm.md has it."""
    sft, rl, counts = sequences()
    sums, grads = run(policy, sft + rl, 40, False)
    policy.zero_grad()
    o, l_sft, l_rl, clipped = OBJECTIVE, 0.0, 0.0, 0
    for seq in sft:
        logp, _ = plain_logprobs(policy, seq, 1.0)
        l_sft = l_sft - logp[seq.trained[1:]].sum() / counts.sft
    for seq in rl:
        logp, entropy = plain_logprobs(policy, seq, 0.7)
        m = torch.from_numpy(seq.trained[1:])
        f = {k: torch.from_numpy(v[1:].copy())[m] for k, v in seq.fields.items()}
        logp, entropy, adv = logp[m], entropy[m], f["advantages"]
        ratio = (logp - f["old_logprobs"]).exp()
        inner = torch.minimum(ratio * adv, ratio.clamp(1 - o.clip_low, 1 + o.clip_high) * adv)
        inner = torch.where(adv < 0, torch.maximum(inner, o.dual_clip * adv), inner)
        weight = (f["old_logprobs"] - f["behavior_logprobs"]).exp().clamp(max=o.tis_cap)
        d = f["ref_logprobs"] - logp
        kl = d.exp() - d - 1
        l_rl = l_rl + (-weight * inner - o.entropy_coef * entropy + o.kl_coef * kl).sum() / counts.rl
        clipped += int((ratio * adv > inner).sum())
    loss = MU * l_sft + (1 - MU) * l_rl
    loss.backward()
    assert clipped > 5, "the clip must act for this test to say anything"
    torch.testing.assert_close(sums[SUMS.index("loss")], loss.detach(), rtol=1e-9, atol=1e-12)
    for name, p in policy.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-7, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def plain_logprobs(policy, seq, temperature):
    """Log-prob and entropy of each token after the first, from whole logits."""
    ids = torch.from_numpy(seq.ids)[None]
    logp = (policy.model(ids).logits[0, :-1] / temperature).log_softmax(-1)
    return logp.gather(-1, ids[0, 1:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def test_on_policy_gradient_is_that_of_the_ratio(policy):
    """old = None: ratio 1 with gradient, so the gradient is −A ∇log π, whatever the clip range."""
    _, rl, _ = sequences()
    bare = [
        TokenSequence(
            s.ids, s.trained, {k: v for k, v in s.fields.items() if k not in ("old_logprobs", "ref_logprobs")}
        )
        for s in rl
    ]
    policy.objective = ObjectiveConfig(entropy_coef=0.0)
    _, grads = run(policy, [s.with_fields(entropy_weight=0.0) for s in bare], 10**6, False)
    policy.zero_grad()
    for s in bare:
        logp, _ = plain_logprobs(policy, s, 0.7)
        m = torch.from_numpy(s.trained[1:])
        weight = torch.from_numpy((s.fields["advantages"] * s.fields["pg_weight"])[1:].copy())
        (-(weight * logp)[m].sum()).backward()
    for name, p in policy.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-8, atol=1e-12)


def test_verifier_and_prompt_tokens_carry_no_gradient(policy):
    """The gradient is that of the policy's own tokens alone; what the verifier said after the last of them changes nothing."""
    policy.objective = ObjectiveConfig(entropy_coef=0.0)

    def gradients(last):
        mask = [1, 1, 0, 0, 1, 1] + [0] * len(last)
        sample = Sample([2, 5, 3], [6, 1, 9, 10, 7, 1, *last], mask, [-1.0] * len(mask), 0, "stop", "p", 0)
        seq = objective.rollout_sequence(sample, 1.0).with_fields(advantages=1.0)
        assert seq.ids[seq.trained].tolist() == [6, 1, 7, 1]
        batch = collate([seq], [0], False)
        assert batch.rows.tolist() == [2, 3, 6, 7] and batch.targets.tolist() == [6, 1, 7, 1]
        return seq, run(policy, objective.weigh_rl([seq], 1.0, 4, policy.objective), 10**6, False)[1]

    seq, wanted = gradients([9, 10])
    for last in ([11, 12], [11], []):
        for name, g in gradients(last)[1].items():
            apart = rounding(4 * LAYERS + 1) * g.abs().max().item()  # norms round gradients to fp32
            torch.testing.assert_close(g, wanted[name], rtol=0, atol=apart)
    policy.zero_grad()
    logp, _ = plain_logprobs(policy, seq, 1.0)
    (-logp[[2, 3, 6, 7]].sum() / 4).backward()
    for name, p in policy.named_parameters():
        torch.testing.assert_close(wanted[name], p.grad, rtol=1e-8, atol=1e-12)
        assert wanted[name].abs().max() > 1e-3, name


def test_token_rewards_lie_on_the_last_own_token_of_each_turn():
    sample = Sample([2], [6, 1, 9, 9, 7, 1], [1, 1, 0, 0, 1, 1], [0.0] * 6, 0, "stop", "p", 0)
    sample.turns = [Turn(2, -1.0), Turn(6, 5.0)]
    assert objective.token_rewards(sample).tolist() == [0, -1, 0, 0, 0, 5]


def test_gae_gives_each_token_its_own_advantage():
    sample = Sample(
        [2], [6, 1, 9, 7, 1], [1, 1, 0, 1, 1], [0.0] * 5, 0, "stop", "p", 0, turns=[Turn(2, 0.0), Turn(5, 1.0)]
    )
    seq = objective.rollout_sequence(sample, 1.0)
    seq.fields["values"] = np.array([9, 0.1, 0.2, 9, 0.3, 0.4])
    objective.set_advantages([seq], [sample], AdvantageConfig(kind="gae", gamma=1.0, lam=1.0))
    np.testing.assert_allclose(seq.fields["returns"], [0, 1, 1, 0, 1, 1])
    assert seq.fields["advantages"][seq.trained].argmax() == 0  # the lowest value, so the largest surprise


def test_padded_plan_covers_everything_once_within_the_bound():
    lengths = [int(x) for x in np.random.default_rng(0).integers(1, 60, 100)]
    groups = padded_groups(lengths, 128)
    assert sorted(i for g in groups for i in g) == list(range(100))
    assert all(len(g) * max(lengths[i] for i in g) <= 128 for g in groups)
    assert 1 - sum(lengths) / (len(groups) * 128) < 0.25


def test_scatter_brings_rows_back_to_their_sequences():
    sft, rl, _ = sequences()
    batches = micro_batches(sft + rl, 30, False, torch.float64)
    seqs = sft + rl
    scatter(seqs, batches, [b.targets.double() for b in batches], "returns")
    for s in seqs:
        np.testing.assert_array_equal(s.fields["returns"], np.where(s.trained, s.ids, 0))
