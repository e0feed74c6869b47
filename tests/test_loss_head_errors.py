"""Every bad argument of the loss head is a `ValueError` that names it and what was got."""

import pytest
import torch
from amft_kernels.linear_logprob import linear_logprob
from amft_kernels.linear_policy_loss import linear_policy_loss

N, H, V = 4, 3, 7
ON = torch.ones(N)


def call(op, **changes):
    arguments = {"hidden": torch.randn(N, H), "weight": torch.randn(V, H), "targets": torch.tensor([0, 1, -100, 6])}
    if op is linear_policy_loss:
        arguments["nll_weight"] = ON
    return op(**(arguments | changes))


HEAD = {
    "hidden must be 2-D .* got shape \\(2, 2, 3\\)": {"hidden": torch.randn(2, 2, H)},
    "hidden must be float64, .* got torch.int64": {"hidden": torch.ones(N, H).long()},
    "weight must be \\[V, H\\] with H = 3, got shape \\(7, 4\\)": {"weight": torch.randn(V, 4)},
    "weight must have hidden's dtype torch.float32, got torch.bfloat16": {"weight": torch.randn(V, H).bfloat16()},
    "weight must be on hidden's device cpu, got meta": {"weight": torch.randn(V, H, device="meta")},
    "targets must be \\[N\\] with N = 4, got shape \\(3,\\)": {"targets": torch.zeros(3).long()},
    "targets must be int64 or int32, got torch.float32": {"targets": torch.zeros(N)},
    "targets must be on hidden's device cpu, got meta": {"targets": torch.zeros(N, device="meta").long()},
    "targets must lie in \\[0, 7\\) or be ignore_index = -100, got 7": {"targets": torch.tensor([0, 7, 1, 1])},
    "targets must lie in .* got -1": {"targets": torch.tensor([0, -1, 1, 1])},
    "targets must lie in \\[0, 6\\) .* got 6": {"vocab_size": 6},
    "targets must lie in .* ignore_index = 5, got -100": {"ignore_index": 5},
    "vocab_size must lie in \\[1, 7\\] .* got 8": {"vocab_size": 8},
    "vocab_size must lie in .* got 0": {"vocab_size": 0},
    "bias must be \\[V\\] with V = 7, got shape \\(6,\\)": {"bias": torch.zeros(6)},
    "bias must have hidden's dtype torch.float32, got torch.float64": {"bias": torch.zeros(V).double()},
    "temperature must be a finite number > 0, got 0": {"temperature": 0},
    "temperature must be a finite number > 0, got nan": {"temperature": float("nan")},
    "temperature must be > 0 on every row, got -1": {"temperature": torch.tensor([1.0, 1.0, 1.0, -1.0])},
    "temperature must be a tensor \\[N\\] with N = 4, got shape \\(4, 1\\)": {"temperature": torch.ones(N, 1)},
    "logit_softcap must be a finite number > 0, got -1": {"logit_softcap": -1.0},
    "chunk_bytes must be an int that holds a row of logits \\(56 bytes\\), got 55": {"chunk_bytes": 55},
    "chunk_bytes must be .* got 1000000.0": {"chunk_bytes": 1e6},
    "backend must be one of auto, triton, torch, got 'cuda'": {"backend": "cuda"},
    "backend 'triton' cannot be used: ": {"backend": "triton", "hidden": torch.randn(N, H).double(),
                                          "weight": torch.randn(V, H).double()},
}  # fmt: skip

PG = {"pg_weight": ON, "advantages": ON}
POLICY = {
    "nll_weight, shaped_weight, pg_weight or entropy_weight must be given, got none": {"nll_weight": None},
    "nll_weight must be a tensor \\[N\\] with N = 4, got float": {"nll_weight": 1.0},
    "nll_weight must be floating point, got torch.int64": {"nll_weight": ON.long()},
    "entropy_weight must be on hidden's device cpu, got meta": {"entropy_weight": torch.ones(N, device="meta")},
    "advantages is taken as a constant, got a tensor that requires grad": PG
    | {"advantages": ON.clone().requires_grad_()},
    "pg_weight and advantages go together, got pg_weight alone": {"pg_weight": ON},
    "pg_weight and advantages go together, got advantages alone": {"advantages": ON},
    "pg_weight must be given with old_logprobs, got None": {"old_logprobs": -ON},
    "pg_weight must be given with behavior_logprobs, ref_logprobs": {"behavior_logprobs": -ON, "ref_logprobs": -ON},
    "old_logprobs must be a tensor \\[N\\] with N = 4, got shape \\(5,\\)": PG | {"old_logprobs": torch.ones(5)},
    "kl_coef must be a finite number ≥ 0, got -0.1": PG | {"ref_logprobs": -ON, "kl_coef": -0.1},
    "ref_logprobs must be given with a kl_coef, got None with kl_coef = 0.1": PG | {"kl_coef": 0.1},
    "clip_low must be a finite number ≥ 0, got -0.2": PG | {"clip_low": -0.2},
    "clip_high must be a finite number ≥ 0, got nan": PG | {"clip_high": float("nan")},
    "dual_clip must be a finite number > 1, got 1.0": PG | {"dual_clip": 1.0},
    "tis_cap must be a finite number > 0, got 0": PG | {"behavior_logprobs": -ON, "tis_cap": 0},
    "weight_grad must be a contiguous torch.float32 .* got \\(7, 3\\) torch.bfloat16": {
        "weight_grad": torch.zeros(V, H).bfloat16()
    },
    "weight_grad must be a contiguous .* contiguous: False": {"weight_grad": torch.zeros(H, V).t()},
    "weight_grad must be a plain buffer .* requires_grad: True": {"weight_grad": torch.zeros(V, H).requires_grad_()},
}


@pytest.mark.parametrize("op", [linear_policy_loss, linear_logprob], ids=lambda op: op.__name__)
@pytest.mark.parametrize("message", HEAD)
def test_head(message, op):
    with pytest.raises(ValueError, match=message):
        call(op, **HEAD[message])


@pytest.mark.parametrize("message", POLICY)
def test_policy(message):
    with pytest.raises(ValueError, match=message):
        call(linear_policy_loss, **POLICY[message])


def test_main_gradient_wants_gradient_one():
    hidden = torch.randn(N, H, requires_grad=True)
    loss = call(linear_policy_loss, hidden=hidden, weight_grad=torch.zeros(V, H)).loss
    with pytest.raises(ValueError, match="back-propagate it with gradient 1, got 2"):
        (2 * loss).backward()


def test_good_arguments_are_taken():
    """The same calls without the fault: the checks refuse nothing that is right."""
    for out in (
        call(linear_policy_loss, ignore_index=-100, vocab_size=V, bias=torch.zeros(V), chunk_bytes=56, temperature=2),
        call(linear_policy_loss, **PG, old_logprobs=-ON, tis_cap=2.0, targets=torch.tensor([0, 1, -100, 6]).int()),
        call(linear_logprob, temperature=torch.ones(N), logit_softcap=30, hidden=torch.randn(H, N).t()),
    ):
        assert all(x.isfinite().all() for x in out if isinstance(x, torch.Tensor))
