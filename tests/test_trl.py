"""Our losses and TRL's own, on the same tensors: loss and gradients of `GRPOTrainer._compute_loss`, equal to 1e-5.

A release of TRL may change a loss: then this says which.
"""

import copy

import numpy as np
import plain_losses as plain
import pytest
import torch
from fakes import make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from amft_fast import losses, objective
from amft_fast.config import ObjectiveConfig
from amft_fast.data.batch import micro_batches, scatter
from amft_fast.interfaces import Sample
from amft_fast.model.policy import SUMS, Policy

pytest.importorskip("trl", reason="make test-integration installs it")
pytestmark = pytest.mark.integration

LONGEST = 8

# What TRL's trainer is set to, and what ours is. `value`: whether losses are compared beside gradients.
CASES = {
    "grpo": ({"loss_type": "grpo"}, {"denominator": "sequence"}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"clip_high": 0.28}),
    "bnpo": ({"loss_type": "bnpo"}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"denominator": "constant"}),
    "two-sided clip": ({"loss_type": "dapo", "args.delta": 1.3}, {"dual_clip": 1.3}),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.2}, {"loss": "cispo", "ratio_cap": 1.2}),
    "sapo": (
        {"loss_type": "sapo", "args.sapo_temperature_pos": 0.9, "args.sapo_temperature_neg": 1.3},
        {"loss": "sapo", "denominator": "sequence", "sapo_tau_positive": 0.9, "sapo_tau_negative": 1.3},
    ),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.05},
        {"loss": "gspo", "denominator": "sequence", "clip_low": 0.05, "clip_high": 0.05},
    ),
    "vespo": ({"loss_type": "vespo"}, {"loss": "vespo"}),
    "KL in the loss": ({"loss_type": "dapo", "beta": 0.2, "args.use_bias_correction_kl": False}, {"kl_coef": 0.2}),
    "DeepSeek's mask": ({"loss_type": "dapo", "off_policy_mask_threshold": 0.05}, {"sequence_kl_max": 0.05}),
    "TIS by token": (
        {"loss_type": "dapo", "use_vllm": True, "vllm_importance_sampling_correction": True, "mode": "token_truncate"},
        {"tis_cap": 1.3},
    ),
    "MIS by sequence": (
        {"loss_type": "dapo", "use_vllm": True, "vllm_importance_sampling_correction": True, "mode": "sequence_mask"},
        {"tis_cap": 1.3, "correction": "mis", "correction_level": "sequence"},
    ),
}
COEFFICIENTS = ("gspo", "vespo")  # whose value is another one where their clip acts, or by a constant factor's log


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    folder = make_checkpoint(tmp_path_factory.mktemp("trl"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    args = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("out")), use_cpu=True, bf16=False, per_device_train_batch_size=2,
        num_generations=2, max_completion_length=LONGEST, temperature=1.0, gradient_checkpointing=False, report_to=[],
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": ["a"] * 2})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = GRPOTrainer(
        model, lambda completions, **_: [0.0] * len(completions), args, train_dataset=data, processing_class=tokenizer
    )
    made.current_gradient_accumulation_steps = made.args.steps_per_generation = 1
    made.model.train()
    return made


def rollouts(model, n=8):
    """Answers of ragged lengths to prompts of one length, with log-probs around the present ones."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(n):
        ids = [int(x) for x in rng.integers(5, 14, int(rng.integers(2, LONGEST + 1)))]
        sample = Sample([2, 5 + i % 4, 3], ids, [1] * len(ids), [0.0] * len(ids), 0, "stop", "p", i // 4)
        s = objective.rollout_sequence(sample, 1.0)
        with torch.no_grad():
            logp = np.concatenate([[0.0], plain.plain_tokens(model, s.ids)[0].double().numpy()])
        old = logp + rng.normal(0, 0.25, len(s.ids))
        behavior = old + rng.normal(0, 0.25, len(s.ids))
        ref = logp + rng.normal(0, 0.5, len(s.ids))
        advantages = rng.normal() * np.ones(len(s.ids))
        out.append(s.with_fields(old_logprobs=old, behavior_logprobs=behavior, ref_logprobs=ref, advantages=advantages))
    return out


def theirs(trainer, sequences, settings):
    """Loss and gradients of TRL, padded on the right."""
    t = copy.copy(trainer)
    t.args = copy.copy(trainer.args)
    settings = dict(settings)
    mode = settings.pop("mode", None)
    for name, value in settings.items():
        owner, _, leaf = name.rpartition(".")
        assert hasattr(t.args if owner else t, leaf), f"TRL has no {name}"
        setattr(t.args if owner else t, leaf, value)
    width = max(int(s.trained.sum()) for s in sequences)

    def padded(name):
        rows = [s.fields[name][s.trained] for s in sequences]
        return torch.tensor(np.stack([np.pad(r, (0, width - len(r))) for r in rows]), dtype=torch.float32)

    ids = [s.ids[s.trained] for s in sequences]
    mask = torch.tensor(np.stack([np.arange(width) < len(x) for x in ids])).long()
    inputs = {
        "prompt_ids": torch.tensor(np.stack([s.ids[:3] for s in sequences])),
        "prompt_mask": torch.ones(len(sequences), 3, dtype=torch.long),
        "completion_ids": torch.tensor(np.stack([np.pad(x, (0, width - len(x))) for x in ids])),
        "completion_mask": mask,
        "advantages": torch.tensor([s.fields["advantages"][-1] for s in sequences], dtype=torch.float32),
        "old_per_token_logps": padded("old_logprobs"),
        "ref_per_token_logps": padded("ref_logprobs"),
        "sampling_per_token_logps": padded("behavior_logprobs"),
        "num_items_in_batch": mask.sum(),
    }
    if mode is not None:
        gap = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]) * mask
        weight = (gap if mode.startswith("token") else gap.sum(-1, keepdim=True)).exp()
        inputs["importance_sampling_ratio"] = (
            weight.clamp(max=1.3) if mode.endswith("truncate") else weight * (weight <= 1.3)
        )
    t.model.zero_grad()
    loss = t._compute_loss(t.model, inputs)
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in t.model.parameters()]


def ours(model, sequences, o):
    policy = Policy(model, o)
    policy.zero_grad()
    sequences = [s.with_fields() for s in sequences]
    if o.reads_logprobs:
        batches = micro_batches(sequences, 40, False)
        scatter(sequences, batches, [policy.logprobs(b).logprobs for b in batches], "present_logprobs")
    folded = losses.fold(sequences, o)
    weighed = objective.weigh_rl(folded, 1.0, objective.count_tokens([], folded), o, max_new_tokens=LONGEST)
    sums = 0
    for batch in micro_batches(weighed, 40, True):
        out = policy(batch)
        out.loss.backward()
        sums = sums + out.sums
    return float(sums[SUMS.index("loss")]), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("case", CASES)
def test_the_same_loss_and_gradient(trainer, case):
    settings, own = CASES[case]
    sequences = rollouts(trainer.model)
    loss, gradients = theirs(trainer, sequences, settings)
    value, found = ours(trainer.model, sequences, ObjectiveConfig(**own))
    if case not in COEFFICIENTS:
        assert value == pytest.approx(loss, rel=1e-5, abs=1e-5)
    largest = max(g.abs().max().item() for g in gradients)
    assert largest > 1e-3
    for a, b in zip(found, gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * largest)


def test_the_entropy_quantile(trainer):
    """Ours is a share of the tokens, TRL's a quantile that it interpolates: they agree on which tokens these are."""
    sequences = rollouts(trainer.model)
    _, gradients = theirs(trainer, sequences, {"loss_type": "dapo", "top_entropy_quantile": 0.2})
    policy = Policy(trainer.model, ObjectiveConfig(entropy_share=0.2))
    batches = micro_batches(sequences, 40, False)
    scores = [policy.logprobs(b) for b in batches]
    scatter(sequences, batches, [s.entropy for s in scores], "present_entropy")
    _, found = ours(trainer.model, sequences, ObjectiveConfig(entropy_share=0.2))
    largest = max(g.abs().max().item() for g in gradients)
    for a, b in zip(found, gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * largest)
