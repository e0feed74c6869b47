"""Each loss of `objective.loss` and what goes with it, through the policy, against fp64 autograd on plain logits."""

import numpy as np
import plain_losses as plain
import pytest
import torch
from fakes import make_checkpoint
from transformers import AutoModelForCausalLM

from amft_fast import config_file, losses, objective
from amft_fast.config import AdvantageConfig, ObjectiveConfig
from amft_fast.data.batch import micro_batches, scatter
from amft_fast.errors import UserError
from amft_fast.interfaces import Sample, Turn
from amft_fast.model.policy import SUMS, Policy

pytestmark = pytest.mark.cpu_isa

T = 0.7  # temperature
LOSSES = {
    "grpo": ({"clip_low": 0.1, "clip_high": 0.15}, lambda a: plain.grpo(a, 0.1, 0.15)),
    "cispo": ({"ratio_cap": 1.2}, lambda a: plain.cispo(a, 1.2)),
    "sapo": ({"sapo_tau_positive": 0.9, "sapo_tau_negative": 1.3}, lambda a: plain.sapo(a, 0.9, 1.3)),
    "dppo": ({"dppo_bound": 0.01}, lambda a: plain.dppo(a, 0.01)),
    "dro": ({"ratio_penalty": 0.3}, lambda a: plain.dro(a, 0.3)),
    "gspo": ({"clip_low": 0.02, "clip_high": 0.03}, lambda a: plain.gspo(a, 0.02, 0.03)),
    "gmpo": ({"gmpo_clip": 0.15}, lambda a: plain.gmpo(a, 0.15)),
    "vespo": (
        {"vespo_positive": (1.5, 2.5), "vespo_negative": (2.5, 1.5)},
        lambda a: plain.vespo(a, (1.5, 2.5), (2.5, 1.5)),
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("losses"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")


def rollouts(model, seed=0, n=9, moved=0.3):
    """Ragged answers whose old log-probs lie `moved` around the present ones, and the sampler's around those."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        k = int(rng.integers(1, 9))
        answer = [int(x) for x in rng.integers(5, 14, k)]
        mask = [1] * k
        if k > 4:  # a verifier's message in the middle
            mask[2] = mask[3] = 0
        s = objective.rollout_sequence(Sample([2, 5 + i % 4, 3], answer, mask, [0.0] * k, 0, "stop", "p", i // 3), T)
        with torch.no_grad():
            logp = np.concatenate([[0.0], plain.plain_tokens(model, s.ids, T)[0].numpy()])
        old = logp + rng.normal(0, moved, len(s.ids))
        s.fields["behavior_logprobs"] = old + rng.normal(0, 0.3, len(s.ids))
        advantage = rng.normal() * np.ones(len(s.ids))
        ref = logp + rng.normal(0, 0.5, len(s.ids))
        out.append(s.with_fields(old_logprobs=old, advantages=advantage, ref_logprobs=ref))
    return out


def gradients(model, o, sequences, max_tokens=10**6, packed=False, longest=8, own=None, ranks=1):
    """Loss and gradients by our way: a pass where the loss asks for one, the fold, the weights, micro-batches of all ranks."""

    def batches(given):
        return [b for r in range(ranks) for b in micro_batches(given, max_tokens, packed, torch.float64, r, ranks)]

    policy = Policy(model, o, own_loss=own)
    policy.zero_grad()
    sequences = [s.with_fields() for s in sequences]
    for s in sequences:
        s.fields = dict(s.fields)
    if o.reads_logprobs or o.reads_entropy:
        whole = [b for b in batches(sequences) if b.members]
        outs = [policy.logprobs(b) for b in whole]
        scatter(sequences, whole, [x.logprobs for x in outs], "present_logprobs")
        scatter(sequences, whole, [x.entropy for x in outs], "present_entropy")
    folded = losses.fold(sequences, o, (0, 1, 2))
    weighed = objective.weigh_rl(folded, 1.0, objective.count_tokens([], folded), o, max_new_tokens=longest)
    sums = 0
    for batch in batches(weighed):
        out = policy(batch)
        out.loss.backward()
        sums = sums + out.sums
    return float(sums[SUMS.index("loss")]), [p.grad.clone() for p in policy.parameters()]


def held_against(model, wanted, o, sequences, value=True, **options):
    """Ours against the gradients of `wanted`, a scalar with a graph."""
    model.zero_grad()
    wanted.backward()
    truth = [p.grad.clone() for p in model.parameters()]
    loss, ours = gradients(model, o, sequences, **options)
    if value:
        assert loss == pytest.approx(float(wanted.detach()), rel=1e-9, abs=1e-12)
    assert max(g.abs().max() for g in truth) > 1e-3, "the loss must have a gradient for this to say anything"
    for a, b in zip(ours, truth):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "denominator"),
    [*((name, "token") for name in LOSSES), ("sapo", "sequence"), ("gspo", "sequence"), ("grpo", "constant")],
)
def test_loss_against_autograd_on_plain_logits(model, name, denominator):
    settings, formula = LOSSES[name]
    o = ObjectiveConfig(loss=name, denominator=denominator, **settings)
    sequences = rollouts(model)
    answers = [plain.answer_of(model, s, T) for s in sequences]
    wanted = plain.mean([formula(a).expand(len(a.logp)) for a in answers], denominator, 8)
    # The coefficient form of the losses of whole sequences has their gradient, not the value where their clip acts.
    held_against(model, wanted, o, sequences, value=name not in ("gspo", "gmpo", "vespo"), max_tokens=40)


@pytest.mark.parametrize("name", LOSSES)
def test_the_constants_above_act(model, name):
    """Without its constants the gradient is another one, so each clip, cap and bound is seen by the test above."""
    sequences = rollouts(model)
    free = {
        "clip_low": 0.999, "clip_high": 1e6, "ratio_cap": 1e6, "sapo_tau_positive": 1.0, "sapo_tau_negative": 1.0,
        "dppo_bound": 0.999, "ratio_penalty": 0.1, "gmpo_clip": 1e6, "vespo_positive": (1, 1), "vespo_negative": (1, 1),
    }  # fmt: skip
    settings = LOSSES[name][0]
    _, acting = gradients(model, ObjectiveConfig(loss=name, **settings), sequences)
    _, idle = gradients(model, ObjectiveConfig(loss=name, **{k: free[k] for k in settings}), sequences)
    assert max((a - b).abs().max() for a, b in zip(acting, idle)) > 1e-3


@pytest.mark.parametrize("name", [*LOSSES, "clip_cov", "kl_cov"])
def test_no_loss_depends_on_micro_batches_packing_or_ranks(model, name):
    extra = {"cov_share": 0.2, "clip_cov_bounds": (-0.5, 3.0)} if "cov" in name else {}
    o = ObjectiveConfig(
        loss=name, denominator="sequence", entropy_share=0.6, **LOSSES.get(name, ({}, None))[0], **extra
    )
    sequences = rollouts(model, seed=3)
    _, whole = gradients(model, o, sequences)
    for max_tokens, packed, ranks in ((12, False, 1), (24, True, 3)):
        _, others = gradients(model, o, sequences, max_tokens, packed, ranks=ranks)
        largest = max(g.abs().max().item() for g in whole)
        for a, b in zip(others, whole):  # transformers' norms round to fp32
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * largest)


@pytest.mark.parametrize("name", ["gspo", "gmpo", "vespo", "cispo", "sapo", "dppo", "dro", "grpo"])
def test_before_the_first_update_every_loss_is_reinforce(model, name):
    """ρ = 1: no pass and no old log-probs are needed, and −A ∇log π is what is left."""
    sequences = rollouts(model, seed=1)
    for s in sequences:
        del s.fields["old_logprobs"], s.fields["behavior_logprobs"]
        s.fields["behavior_logprobs"] = np.zeros(len(s.ids))
    answers = [plain.answer_of(model, s, T) for s in sequences]
    wanted = plain.mean([-a.advantage * a.logp for a in answers], "token")
    held_against(model, wanted, ObjectiveConfig(loss=name, **LOSSES[name][0]), sequences, value=False)


def test_clip_cov_leaves_out_a_share_drawn_from_the_bounds(model):
    o = ObjectiveConfig(loss="clip_cov", cov_share=0.2, clip_cov_bounds=(-0.2, 1.0))
    sequences = rollouts(model, seed=2)
    answers = [plain.answer_of(model, s, T) for s in sequences]
    cov = plain.covariances(answers)
    folded = losses.fold(
        [s.with_fields(present_logprobs=_spread(s, a.logp)) for s, a in zip(sequences, answers)], o, (4,)
    )
    before = np.concatenate([s.fields["advantages"][s.trained] for s in sequences])
    after = np.concatenate([s.fields["advantages"][s.trained] for s in folded])
    out = after != before
    assert out.sum() == int(0.2 * len(before)) and not after[out].any()
    assert all(-0.2 < c < 1.0 for c in cov[torch.from_numpy(out)])
    inside = int(((cov > -0.2) & (cov < 1.0)).sum())
    assert inside > out.sum(), "a lot decides"
    again = losses.fold(
        [s.with_fields(present_logprobs=_spread(s, a.logp)) for s, a in zip(sequences, answers)], o, (5,)
    )
    assert any((a.fields["advantages"] != b.fields["advantages"]).any() for a, b in zip(folded, again))


def _spread(s, values):
    out = np.zeros(len(s.ids))
    out[s.trained] = values.detach().numpy()
    return out


def test_kl_cov_holds_back_the_tokens_of_highest_covariance(model):
    o = ObjectiveConfig(loss="kl_cov", cov_share=0.25, kl_cov_coef=0.4)
    sequences = rollouts(model, seed=2)
    answers = [plain.answer_of(model, s, T) for s in sequences]
    cov = plain.covariances(answers)
    chosen = cov >= cov.sort().values[-int(0.25 * len(cov))]
    lengths = [len(a.logp) for a in answers]
    terms = [
        -a.advantage * (a.logp - a.old).exp() + 0.4 * (a.logp - a.old).abs() * k
        for a, k in zip(answers, chosen.split(lengths))
    ]
    held_against(model, plain.mean(terms, "token"), o, sequences, value=False)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_in_the_loss(model, kind):
    o = ObjectiveConfig(kl_coef=0.3, kl_kind=kind)
    sequences = rollouts(model)
    answers = [plain.answer_of(model, s, T) for s in sequences]
    terms = []
    for a in answers:
        d = a.ref - a.logp
        terms.append(plain.grpo(a) + 0.3 * {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[kind])
    held_against(model, plain.mean(terms, "token"), o, sequences)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("advantage", ["dr_grpo", "gae"])
def test_kl_in_the_reward(kind, advantage):
    """Off the sample's reward as a sum over its tokens; with gae off each token's."""
    samples = [
        Sample([2], [5, 1], [1, 1], [-1.0, -0.5], 0, "stop", "p", 0, turns=[Turn(2, r)], reward=r) for r in (1.0, 0.0)
    ]
    rl = [objective.rollout_sequence(s, 1.0) for s in samples]
    refs = ([-1.4, -0.2], [-0.7, -0.9])
    off = []
    for s, ref in zip(rl, refs):
        s.fields |= {"ref_logprobs": np.array([0, *ref]), "values": np.zeros(3)}
        d = np.array(ref) - [-1.0, -0.5]
        off.append(0.1 * {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - d - 1}[kind])
    objective.set_advantages(rl, samples, AdvantageConfig(kind=advantage, lam=1.0), 8, (0.1, kind))
    if advantage == "dr_grpo":
        rewards = np.array([1.0, 0.0]) - [x.sum() for x in off]
        want = rewards - rewards.mean()
        assert [s.fields["advantages"][1] for s in rl] == pytest.approx(list(want))
    else:
        want = [[1 - x.sum(), 1 - x[1]] for x in off[:1]] + [[-x.sum(), -x[1]] for x in off[1:]]
        assert [s.fields["returns"][1:].tolist() for s in rl] == [pytest.approx(w) for w in want]


# ------------------------------------------------------------------------------------------ what leaves out and weighs


@pytest.mark.parametrize("loss", ["grpo", "cispo", "gspo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["tis", "mis", "icepop"])
def test_correction_of_the_rollout_engine(model, correction, level, loss):
    o = ObjectiveConfig(
        loss=loss, correction=correction, correction_level=level, tis_cap=1.3, icepop_bounds=(0.8, 1.25),
        denominator="sequence", **({"clip_low": 0.9, "clip_high": 9.0} if loss == "gspo" else LOSSES[loss][0]),
    )  # fmt: skip
    sequences = rollouts(model)
    terms, cut = [], 0
    for s in sequences:
        a = plain.answer_of(model, s, T)
        gap = a.old - a.behavior
        weight = (gap if level == "token" else gap.sum().expand(len(gap))).exp()
        if correction == "tis":
            held = weight.clamp(max=1.3)
        elif correction == "mis":
            held = weight * (weight <= 1.3)
        else:
            held = weight * ((weight >= 0.8) & (weight <= 1.25))
        cut += int((held != weight).sum())
        term = plain.gspo(a, 0.9, 9.0) if loss == "gspo" else LOSSES[loss][1](a)
        terms.append(held * term)
    assert cut > 3, "the correction must act"
    held_against(model, plain.mean(terms, "sequence"), o, sequences, value=loss != "gspo")


def test_sequence_masks(model):
    sequences = rollouts(model, seed=5, moved=0.5)
    answers = [plain.answer_of(model, s, T) for s in sequences]
    behind = [(a.behavior - a.logp.detach()).mean() for a in answers]
    ratio = [float((-b).exp()) for b in behind]
    bounds = (sorted(ratio)[1] + 1e-6, sorted(ratio)[-2] - 1e-6)
    terms = [plain.grpo(a) * (bounds[0] <= r <= bounds[1]) for a, r in zip(answers, ratio)]
    kept = sum(bounds[0] <= r <= bounds[1] for r in ratio)
    assert 0 < kept < len(ratio)
    held_against(model, plain.mean(terms, "token"), ObjectiveConfig(sequence_ratio_bounds=bounds), sequences)
    answers = [plain.answer_of(model, s, T) for s in sequences]
    most = float(sorted(b for a, b in zip(answers, behind) if a.advantage[0] < 0)[-1]) - 1e-6
    dropped = [bool(a.advantage[0] < 0 and b > most) for a, b in zip(answers, behind)]
    assert sum(dropped) == 1
    terms = [plain.grpo(a) * (not d) for a, d in zip(answers, dropped)]
    held_against(model, plain.mean(terms, "token"), ObjectiveConfig(sequence_kl_max=max(most, 0.0)), sequences)


def test_entropy_share_takes_the_tokens_of_highest_entropy_of_the_update(model):
    sequences = rollouts(model, seed=6)
    answers = [plain.answer_of(model, s, T) for s in sequences]
    flat = torch.cat([a.entropy.detach() for a in answers])
    least = flat.sort().values[-int(0.3 * len(flat))]
    terms = [plain.grpo(a) * (a.entropy.detach() >= least) for a in answers]
    o = ObjectiveConfig(entropy_share=0.3)
    held_against(model, plain.mean(terms, "token"), o, sequences)


def test_entropy_coefficient_is_steered_to_its_target():
    o = ObjectiveConfig(entropy_coef=0.01, entropy_target=0.5, entropy_step=0.004, entropy_coef_max=0.02)
    bonus = losses.EntropyBonus(o)
    seen = []
    for entropy in (0.4, 0.3, 0.2, None, float("nan"), 0.6, 0.9, 0.9, 0.9, 0.9, 0.9):
        bonus.observe(entropy)
        seen.append(bonus.coef)
    assert seen == pytest.approx([0.014, 0.018, 0.02, 0.02, 0.02, 0.016, 0.012, 0.008, 0.004, 0.0, 0.0])
    fixed = losses.EntropyBonus(ObjectiveConfig(entropy_coef=0.01))
    fixed.observe(0.1)
    assert fixed.coef == 0.01


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--objective.loss", "gpso"], "did you mean gspo"),
        (["--objective.loss", "kl_cov"], "minibatches_per_rollout above 1, got 1"),
        (["--objective.loss", "dro", "--train.minibatches_per_rollout", "2"], "ratio_penalty above 0"),
        (["--objective.loss", "gspo", "--objective.ratio_penalty", "0.1"], "ratio_penalty goes with grpo"),
        (["--objective.correction", "mis", "--objective.tis_cap", "0"], "tis_cap above 0, got 0"),
        (["--objective.icepop_bounds", "[2, 1]"], "icepop_bounds must be the lower and the upper bound"),
        (["--objective.vespo_negative", "[0, 1]"], "vespo_negative must be k > 0 and lambda > 0"),
        (["--advantage.overlong_buffer", "2000"], "below rollout.max_new_tokens, got 2000 and 1024"),
        (["--advantage.kind", "opo", "--advantage.level", "turn"], "level turn is there for kind grpo"),
        (["--advantage.kind", "gae", "--advantage.rewards", '{"a": 1}'], "kind must not be gae"),
        (["--objective.loss", "my.py:fn", "--objective.tis_cap", "2"], "given the sampler's log-probs"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        config_file.load(None, flags)
