"""LoRA: what is trained and what it costs, merging, the reference, resuming."""

import math

import pytest
import torch
from fakes import make_checkpoint
from runs import cfg_for, train
from sequences import mixed
from transformers import AutoModelForCausalLM

from amft_fast.config import LoraConfig, ModelConfig, ObjectiveConfig, TrainConfig
from amft_fast.controller import blocks
from amft_fast.data.batch import micro_batches
from amft_fast.engine.flat import KeptFactors
from amft_fast.engine.local import LocalEngine
from amft_fast.engine.parts import Tensors
from amft_fast.errors import UserError
from amft_fast.model import lora
from amft_fast.model.policy import Policy, load_model

pytest.importorskip("peft")
CPU = torch.device("cpu")


def make(folder, trained=True, **more):
    """A policy with adapters; `trained`: with factors that are no longer zero."""
    torch.manual_seed(0)
    model = load_model(ModelConfig(path=str(folder), lora=LoraConfig(rank=4, **more)), CPU)
    if trained:
        for layer in lora.layers(model).values():
            for p in lora.factors(layer).values():
                torch.nn.init.normal_(p, std=0.1)
    return Policy(model, ObjectiveConfig())


def batch():
    return micro_batches(mixed(), 10**6, True)[0]


def test_only_factors_are_trained_and_frozen_weights_cost_no_gradient(checkpoint_folder):
    policy = make(checkpoint_folder)
    engine = LocalEngine(policy, TrainConfig(lr=1e-2))
    names = [n for g in engine.groups for n in g.names]
    assert names and all(".lora_A." in n or ".lora_B." in n for n in names)
    assert policy.weight_grad is None  # no dW in the head
    frozen = {n: p.detach().clone() for n, p in policy.named_parameters() if not p.requires_grad}
    before = engine.backward(batch()).loss
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)
    assert sum(g.numel() for g in engine.take_gradient()) < sum(p.numel() for p in policy.parameters()) / 2
    for _ in range(3):
        loss = engine.backward(batch()).loss
        engine.step()
    assert loss < before
    assert all(torch.equal(p, frozen[n]) for n, p in policy.named_parameters() if n in frozen)


def test_fresh_adapters_change_nothing(checkpoint_folder):
    plain = Policy(load_model(ModelConfig(path=str(checkpoint_folder)), CPU), ObjectiveConfig())
    torch.testing.assert_close(
        make(checkpoint_folder, trained=False).logprobs(batch()).logprobs, plain.logprobs(batch()).logprobs
    )


def test_merged_weights_have_plain_names_and_give_the_same(checkpoint_folder, tmp_path):
    policy = make(checkpoint_folder)
    wanted = policy.logprobs(batch()).logprobs
    plain = AutoModelForCausalLM.from_pretrained(checkpoint_folder, dtype=torch.float32)
    state = dict(LocalEngine(policy, TrainConfig()).named_full_params())
    assert set(state) == {n for n, _ in plain.named_parameters()}
    plain.load_state_dict(state, strict=False)
    torch.testing.assert_close(
        Policy(plain, ObjectiveConfig()).logprobs(batch()).logprobs, wanted, rtol=1e-4, atol=1e-5
    )
    LocalEngine(policy, TrainConfig()).export(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(
        Policy(again, ObjectiveConfig()).logprobs(batch()).logprobs, wanted, rtol=1e-4, atol=1e-5
    )


def test_the_reference_stays_while_the_policy_moves_and_costs_the_factors_alone(checkpoint_folder):
    policy = make(checkpoint_folder)
    engine = LocalEngine(policy, TrainConfig(lr=1e-2))
    then, reference = policy.logprobs(batch()).logprobs, engine.reference()
    for _ in range(2):
        engine.backward(batch())
        engine.step()
    torch.testing.assert_close(engine.logprobs(batch(), reference).logprobs, then)
    now = policy.logprobs(batch()).logprobs
    assert (now - then).abs().max() > 1e-3
    torch.testing.assert_close(policy.logprobs(batch()).logprobs, now)  # the exchange left nothing behind
    factors = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert sum(piece.size for piece, _ in engine.by_name(reference.flats)) == factors
    kept = {f"reference.{piece.name}": piece.saved_data(x).clone() for piece, x in engine.by_name(reference.flats)}
    other = KeptFactors(engine.from_names(Tensors.of(kept), "reference."))
    torch.testing.assert_close(engine.logprobs(batch(), other).logprobs, then)
    with pytest.raises(ValueError, match=r"there is no reference\."):
        engine.from_names(Tensors.of({}), "reference.")


def test_targets_that_do_not_fit_are_one_sentence(checkpoint_folder):
    with pytest.raises(UserError, match=r"model\.lora\.targets"):
        make(checkpoint_folder, targets=["no_such_layer"])
    with pytest.raises(UserError, match="leave out the output embedding"):
        make(checkpoint_folder, targets=["lm_head"])
    for targets in (["embed_tokens"], ["embed_tokens", "q_proj"]):
        with pytest.raises(UserError, match=r"shares with the output embedding .* leave it out"):
            make(checkpoint_folder, targets=targets)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "q_proj"]], ids="+".join)
def test_an_embedding_s_factors_are_trained_and_exported(tmp_path, targets):
    folder = make_checkpoint(tmp_path / "untied", tie=False)
    policy = make(folder, targets=targets)
    engine = LocalEngine(policy, TrainConfig(lr=1e-2))
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    first = engine.backward(batch()).loss
    for _ in range(3):
        engine.step()
        loss = engine.backward(batch()).loss
    assert loss < first
    moved = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n} and any("lora_embedding_A" in n for n in moved)
    engine.export(tmp_path / "out")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(
        Policy(plain, ObjectiveConfig()).logprobs(batch()).logprobs,
        policy.logprobs(batch()).logprobs,
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(engine.logprobs(batch(), engine.reference()).logprobs, policy.logprobs(batch()).logprobs)


def test_a_run_with_adapters_and_a_reference_resumes_where_it_stopped(tmp_path, checkpoint_folder, monkeypatch):
    """Four steps at once, and two and the rest after a resume: the same factors; the export is plain and loads."""
    # Luck asks what share of train.steps has been imitated, which a run of two steps answers otherwise than one of four.
    monkeypatch.setattr(blocks, "MOST", math.inf)
    from transformers import AutoModelForCausalLM as Auto

    flags = [
        "--model.lora.rank",
        "2",
        "--objective.kl_coef",
        "0.1",
        "--train.method",
        "amft",
        "--controller.look_prompts",
        "2",
    ]
    flags += [
        "--eval.every",
        "0",
        "--checkpoint.keep_best",
        "false",
        "--checkpoint.every",
        "4",
        "--checkpoint.export",
        "true",
    ]
    for name, steps in (("whole", "4"), ("cut", "2"), ("cut", "4")):
        more = ["--train.steps", steps, "--run.overwrite", "false"]
        assert (
            train(cfg_for(tmp_path / name, checkpoint_folder, *flags, *more), resume=name == "cut" and steps == "4")
            == 0
        )
    whole, cut = (dict(Auto.from_pretrained(tmp_path / n / "model").named_parameters()) for n in ("whole", "cut"))
    base = dict(Auto.from_pretrained(checkpoint_folder).named_parameters())
    assert any(not torch.equal(whole[n], base[n]) for n in base)
    assert all(torch.equal(whole[n], cut[n]) for n in base)
