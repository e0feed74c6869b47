"""A loss of one's own: loaded from a file, checked at the start, the same as ours where it is the same."""

import pytest
import torch
from fakes import copy_run
from runs import steps, trainer_of

from amft_fast import own_loss
from amft_fast.errors import UserError

CLIPPED = """
import torch

def clipped(logp, old, behavior, advantage):
    ratio = (logp - old).exp()
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)

def capped(logp, old, behavior, advantage):
    weight = -(logp - old).exp().clamp(max=5.0).detach() * advantage
    return weight * logp, weight

def detached(logp, old, behavior, advantage):
    return capped(logp, old, behavior, advantage)[0]

def averaged(logp, old, behavior, advantage):
    return -advantage * (logp - logp.mean())

def short(logp, old, behavior, advantage):
    return (-advantage * logp).sum()

def infinite(logp, old, behavior, advantage):
    return -advantage / (logp - logp)

def broken(logp, old, advantage):
    return -advantage * logp

CONSTANT = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_loss.py"
    path.write_text(CLIPPED)
    return path


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("detached", "finite differences say .* return the pair"),
        ("averaged", "a function of each token by itself"),
        ("short", r"one loss a token, got shape \[\] for 64 tokens"),
        ("infinite", "the loss of .* is (-?inf|nan) at logp"),
        ("broken", "failed on 64 tokens: TypeError"),
        ("CONSTANT", "is a int, not a function"),
        ("cliped", "did you mean clipped"),
    ],
)
def test_what_is_wrong_is_said_at_the_start(file, name, sentence):
    with pytest.raises(UserError, match=sentence):
        own_loss.load(f"{file}:{name}")


@pytest.mark.parametrize(("name", "ours"), [("clipped", "grpo"), ("capped", "cispo")])
def test_a_run_with_ones_own_is_a_run_with_ours(tmp_path, file, checkpoint_folder, name, ours):
    """Two updates a rollout, so that ratios differ from 1; the whole way through config, policy and head."""
    flags = [
        *("--train.method", "rl", "--train.steps", "2", "--train.minibatches_per_rollout", "2", "--train.lr", "0.05"),
        *("--rollout.num_generations", "4"),
    ]
    records = []
    for loss in (f"{file}:{name}", ours):
        trainer = trainer_of(copy_run(tmp_path, checkpoint_folder, *flags, "--objective.loss", loss))
        records.append([s.figures for s in steps(trainer, 2)])
    assert any(r["ratio_max"] > 1.01 for r in records[0])
    for a, b in zip(*records):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_the_head_asks_about_rows_that_count_alone(file):
    from amft_fast.ops import LossForm, linear_policy_loss

    asked = []

    def function(logp, old, behavior, advantage):
        asked.append(len(logp))
        return -advantage * logp

    hidden, weight = torch.randn(5, 3), torch.randn(7, 3, requires_grad=True)
    on = torch.tensor([1.0, 0, 1, 0, 0])
    terms = {"pg_weight": on, "advantages": torch.tensor([1.0, float("nan"), 2, 3, 4]), "nll_weight": 1 - on}
    out = linear_policy_loss(hidden, weight, torch.arange(5), form=LossForm("own", own=function), **terms)
    out.loss.backward()
    assert set(asked) == {2} and out.loss.isfinite() and weight.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"form.own takes backend 'torch'"):
        form = LossForm("own", own=function)
        linear_policy_loss(hidden, weight, torch.arange(5), form=form, backend="triton", **terms)
