"""Mixtures of experts: gradients against transformers' plain loop, rollouts, the balancing loss, checkpoint names, adapters."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fakes import CopyTask, copy_run, make_checkpoint
from rounding import rounding
from runs import lines
from safetensors import safe_open
from sequences import assert_same, gradients, imitate, mixed
from transformers import AutoModelForCausalLM

from amft_fast import objective
from amft_fast.config import LoraConfig, ModelConfig, ObjectiveConfig, TrainConfig
from amft_fast.data.batch import collate, micro_batches
from amft_fast.engine.local import LocalEngine
from amft_fast.engine.world import ALONE
from amft_fast.errors import UserError
from amft_fast.interfaces import Request, Sampling
from amft_fast.model import attention, experts, lora
from amft_fast.model.layers import checkpoint_layers
from amft_fast.model.policy import Policy, load_model
from amft_fast.multi_tensor import named_sums
from amft_fast.rollout.transformers import TransformersEngine
from amft_fast.rollout.vllm import weight_sync
from amft_fast.run import launch

pytestmark = pytest.mark.cpu_isa
# Experts take two products after one another, of 16 and 12 terms, and a token adds up two experts and its neighbours' keys.
SAME = rounding(sum(len(s.ids) for s in mixed()) + 32)
E, K = 6, 2
EXPERTS = [f"layers.{i}.mlp.experts.{n}" for i in (0, 1) for n in ("gate_up_proj", "down_proj")]
ROUTERS = [f"layers.{i}.mlp.gate.weight" for i in (0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("mixture"), experts=E)


def make_policy(folder, coef=0.0, kernel="amft_packed", **more):
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=kernel, **more)
    return Policy(model, ObjectiveConfig(), router_aux_coef=coef)


def plain_gradients(folder, sequences):
    """Sequences one by one through transformers' own loop over experts and its own attention, in fp64."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    for s in sequences:
        imitate(model, s)
    return {n: p.grad for n, p in model.named_parameters()}


# -------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("max_tokens", [10**6, 40])
def test_packed_gradients_are_those_of_a_plain_loop(folder, max_tokens, implementation):
    policy = make_policy(folder, experts_implementation=implementation)
    assert_same(gradients(policy, mixed(), max_tokens), plain_gradients(folder, mixed()), SAME)


def test_what_is_loaded_multiplies_experts_in_one_product(folder):
    assert load_model(ModelConfig(path=str(folder)), torch.device("cpu")).config._experts_implementation == "grouped_mm"


def test_widths_that_the_grouped_product_does_not_take_are_multiplied_by_a_loop(folder):
    """Rows of 12 elements are 48 bytes in fp32, and 24 in bf16."""
    model = load_model(ModelConfig(path=str(folder), dtype="bf16"), torch.device("cpu"))
    assert model.config._experts_implementation == "eager"
    policy = Policy(model, ObjectiveConfig())
    assert policy(micro_batches(mixed(), 40, True)[0]).loss.isfinite()


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointed_layers_give_the_same_gradients(folder, selective):
    want = gradients(make_policy(folder, 0.1), mixed())
    policy = make_policy(folder, 0.1)
    checkpoint_layers(policy.model, selective)
    assert_same(gradients(policy, mixed()), want, SAME)


def test_every_expert_and_router_has_a_gradient(folder):
    found = gradients(make_policy(folder), mixed())
    for name in EXPERTS:
        assert found[f"model.{name}"].flatten(1).norm(dim=1).min() > 0, name
    assert all(found[f"model.{name}"].norm() > 0 for name in ROUTERS)


def test_experts_that_no_token_chose_have_zeros(folder):
    """One token is read, by two of six experts of a layer; the engine's flat gradient has a place for each."""
    batch = collate(objective.weigh_sft([objective.demo_sequence([2], [6])], 0.5, 1), [0], True)
    policy = make_policy(folder)
    engine = LocalEngine(policy, TrainConfig())
    engine.backward(batch)
    gradient = {p.name: x.view(p.shape) for p, x in engine.by_name(engine.take_gradient())}
    for layer, router in enumerate(policy.routing.routers):
        with torch.no_grad():
            seen = []
            handle = router.register_forward_hook(lambda m, a, out: seen.append(out[2]))  # noqa: B023
            policy.logprobs(batch)
            handle.remove()
        chosen = sorted(set(seen[0].flatten().tolist()))
        assert len(chosen) == K
        for name in ("gate_up_proj", "down_proj"):
            norms = gradient[f"model.layers.{layer}.mlp.experts.{name}"].flatten(1).norm(dim=1)
            assert norms.nonzero().flatten().tolist() == chosen


def test_the_probe_counts_every_expert(folder):
    """⟨u, g⟩ of the engine's flat buffers against products of all parameters' gradients, one by one."""
    policy = make_policy(folder)
    engine = LocalEngine(policy, TrainConfig(optimizer="sgd"))
    sequences = objective.weigh_sft(mixed(), 0.5, 50)
    parts = [sequences[:4], sequences[4:7], sequences[7:]]
    want = [gradients(make_policy(folder), part) for part in parts]

    def sweep(part):
        for batch in micro_batches(part, 30, True):
            engine.backward(batch)

    sweep(parts[0])
    u = engine.take_gradient()
    sweep(parts[1])
    engine.end_sweep("sft")
    sweep(parts[2])
    sums, _ = engine.probe([u])
    got = named_sums(sums.tolist(), 0.5)
    for name, at in (("u1_sft", 1), ("u1_rl", 2)):
        product = sum((2 * want[0][n] * want[at][n]).sum() for n in want[0])
        of_experts = sum((2 * want[0][f"model.{n}"] * want[at][f"model.{n}"]).sum() for n in EXPERTS)
        assert got[name] == pytest.approx(float(product), rel=1e-4)
        assert abs(of_experts) > 0.01 * abs(product)


def test_adapters_go_to_the_attention_and_leave_experts_and_routers_alone(folder, tmp_path):
    pytest.importorskip("peft")
    settings = ModelConfig(path=str(folder), lora=LoraConfig(rank=2, targets=["all-linear"]))
    model = load_model(settings, torch.device("cpu"))
    assert {n.rpartition(".")[2] for n in lora.layers(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    policy = Policy(model, ObjectiveConfig())
    for batch in micro_batches(mixed(), 40, True):
        policy(batch).loss.backward()
    assert {n.partition(".lora_")[1] for n, p in policy.named_parameters() if p.grad is not None} == {".lora_"}
    lora.export(model, tmp_path)
    merged, base = saved(tmp_path), saved(folder)
    assert merged.keys() == base.keys()
    assert all(torch.equal(merged[n], t) for n, t in base.items() if ".experts." in n)
    for names in (["up_proj", "q_proj"], ["gate"], ["down_proj"], ["gate_up_proj"]):
        with pytest.raises(UserError, match=r"model\.lora\.targets"):
            load_model(settings.model_copy(update={"lora": LoraConfig(rank=2, targets=names)}), torch.device("cpu"))


# -------------------------------------------------------------------------------------------------------------- rollouts


def test_rollouts_by_our_loop_over_the_layers_are_those_of_transformers(folder, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    requests = [Request((2, 5, 3), i, 8) for i in range(3)] + [Request((2, 6, 7, 8, 3), 9, 5)]
    engine = TransformersEngine(model, max_batch=3)
    assert engine.explain()[0] == "decoder"
    for r, c in zip(requests, engine.generate(requests, Sampling())):
        ids = torch.tensor([[*r.prompt_ids, *c.token_ids]])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0, len(r.prompt_ids) - 1 : -1].log_softmax(-1)
        want = logp.gather(-1, torch.tensor(c.token_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(c.logprobs), want, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------- the auxiliary loss


def update(policy, sequences, max_tokens, packed=True):
    """The gradient of an update, L_aux over its micro-batches, and the busiest expert's share."""
    policy.routing.begin_update()
    policy.zero_grad()
    aux = 0.0
    for batch in micro_batches(sequences, max_tokens, packed):
        out = policy(batch)
        out.loss.backward()
        aux += float(out.sums[-1])
    gradient = {n: p.grad.double().clone() for n, p in policy.named_parameters()}
    return gradient, aux, policy.routing.end_update(ALONE)


def weighed():
    """Demonstrations and rollouts as in a step at mu = 0.3."""
    some = mixed()
    tokens = [sum(int(s.trained.sum()) for s in part) for part in (some[:5], some[5:])]
    sft = objective.weigh_sft([replace(s, fields={}) for s in some[:5]], 0.3, tokens[0])
    rl = [replace(s, fields={}).with_fields(advantages=(-1.0) ** i) for i, s in enumerate(some[5:])]
    return sft + objective.weigh_rl(rl, 0.7, tokens[1], ObjectiveConfig(entropy_coef=0.0))


def plain_aux(policy, sequences):
    """L_aux from its formula, in fp64, sequence by sequence; and f."""
    weights, probs, choices = [], [[], []], [[], []]
    for s in sequences:
        out = policy.model(input_ids=torch.from_numpy(s.ids[None]), use_cache=False, output_router_logits=True)
        at = torch.from_numpy(s.trained.nonzero()[0])
        w = sum(s.fields[n] for n in ("nll_weight", "pg_weight") if n in s.fields)
        weights.append(torch.from_numpy(w[s.trained]))
        for layer, logits in enumerate(out.router_logits):
            p = logits[at - 1].double().softmax(-1)
            probs[layer].append(p)
            choices[layer].append(F.one_hot(p.topk(K).indices, E).sum(1).double())
    w = torch.cat(weights)
    f = torch.stack([w @ torch.cat(c) for c in choices]) / w.sum()
    return f, torch.stack([w @ torch.cat(p) for p in probs])


def test_the_auxiliary_loss_is_its_formula_with_the_load_of_the_last_update(folder):
    policy, coef = make_policy(folder, 0.5), 0.5
    _, first, load = update(policy, weighed(), 10**6)
    f, mean = plain_aux(policy, weighed())
    assert first == pytest.approx(coef * K, rel=1e-5)  # even loads: a constant
    torch.testing.assert_close(policy.routing.load, f)
    assert float(load) == pytest.approx(float(f.max())) and f.sum(1).tolist() == pytest.approx([K, K])
    gradient, second, _ = update(policy, weighed(), 10**6)
    want = coef * E * (f * mean).sum(1).mean()
    assert second == pytest.approx(float(want.detach()), rel=1e-5) and second > first
    policy.zero_grad()
    want.backward()
    plain = update(make_policy(folder), weighed(), 10**6)[0]
    names = [n for n, p in policy.named_parameters() if p.grad is not None]
    total = {n: plain[n] + policy.get_parameter(n).grad for n in names}
    assert_same(gradient, total, SAME)
    assert (gradient["model.model.layers.0.mlp.gate.weight"] - plain["model.model.layers.0.mlp.gate.weight"]).norm() > 0


@pytest.mark.parametrize(("max_tokens", "packed"), [(40, True), (1, False)])
def test_the_auxiliary_loss_does_not_hang_on_micro_batches(folder, max_tokens, packed):
    found = []
    for tokens, rows in ((10**6, True), (max_tokens, packed)):
        policy = make_policy(folder, 0.5)
        update(policy, weighed(), tokens, rows)
        found.append(update(policy, weighed(), tokens, rows))
    assert_same(found[1][0], found[0][0], SAME)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5) and float(found[1][2]) == pytest.approx(
        float(found[0][2])
    )


def test_the_utility_gradient_has_no_auxiliary_loss_and_counts_for_no_load(folder):
    policy = make_policy(folder, 0.5)
    batch = micro_batches(weighed(), 10**6, True)[0]
    out = policy(batch, ObjectiveConfig())
    assert float(out.sums[-1]) == 0 and policy.routing.end_update(ALONE) is None


def test_there_must_be_routers(checkpoint_folder):
    with pytest.raises(UserError, match=r"model\.router_aux_coef: Qwen3ForCausalLM has no routers"):
        make_policy(checkpoint_folder, 0.1)


# ------------------------------------------------------------------------------------------------------------- whole runs

RUN = ("--train.steps", "4", "--train.warmup_steps", "1", "--controller.window", "2", "--meta.prompts", "2")
RUN += ("--train.method", "amft", "--controller.signal", "balanced", "--meta.num_generations", "4")
RUN += ("--rollout.num_generations", "3", "--model.router_aux_coef", "0.01")


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """Four steps with a learned mu."""
    out = tmp_path_factory.mktemp("run") / "run"
    saves = ("--checkpoint.every", "2", "--checkpoint.export", "true")
    assert launch.train(copy_run(out, folder, *RUN, *saves), False, CopyTask()) == 0
    return out


def test_a_run_learns_mu_and_tells_how_its_experts_are_loaded(run):
    rows = lines(run)
    assert len(rows) == 5 and any("controller/mu_next" in r for r in rows)
    assert all(K / E < r["router_load_max"] <= 1 and 0 < r["router_aux"] < 0.1 for r in rows)


def test_a_resumed_run_has_the_load_of_the_update_before(run, folder, tmp_path):
    state = json.loads((run / "checkpoints" / "step-000004" / "state.json").read_text())
    load = state["router_load"] if "router_load" in state else state["state"]["router_load"]
    assert len(load) == 2 and sum(load[0]) == pytest.approx(K)
    again = tmp_path / "again"
    saves = ("--checkpoint.every", "2", "--checkpoint.export", "false")
    assert launch.train(copy_run(again, folder, *RUN, *saves, "--train.steps", "3"), False, CopyTask()) == 0
    assert launch.train(copy_run(again, folder, *RUN, *saves), True, CopyTask()) == 0
    for a, b in zip(lines(run), lines(again)):
        assert a["loss"] == b["loss"] and a["router_load_max"] == b["router_load_max"]


def test_the_export_loads_in_plain_transformers_and_gives_the_same_logits(folder, tmp_path):
    policy = make_policy(folder)
    LocalEngine(policy, TrainConfig()).export(tmp_path)
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        want = policy.model(input_ids=ids).logits
        got = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert saved(tmp_path).keys() == saved(folder).keys()


def saved(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118


# --------------------------------------------------------------------------------------------------------- on their way


def test_vllm_is_sent_the_names_and_tensors_of_a_checkpoint(folder):
    """What vLLM reads of a Qwen3-MoE is what its published folders hold: gate, up and down of each expert."""
    policy = make_policy(folder)
    wire, want = weight_sync.Wire(policy.model), saved(folder)
    sent = list(wire.stream(LocalEngine(policy, TrainConfig()).named_full_params()))
    assert [(n, tuple(t.shape)) for n, t in sent] == [(s.name, s.shape) for s in wire.specs]
    tensors = dict(sent)
    assert len(tensors) == len(sent) and tensors.keys() == want.keys() | {"lm_head.weight"}
    assert all(torch.equal(tensors[n], t) for n, t in want.items())
    assert tensors["model.layers.1.mlp.experts.5.down_proj.weight"].shape == (16, 12)
    assert tensors["model.layers.0.mlp.gate.weight"].shape == (E, 16)


def test_a_mixture_s_narrow_heads_can_be_padded(folder):
    """As vLLM's CPU attention wants them; the experts stay as they are."""
    from amft_fast.rollout.vllm.head_padding import padding_for

    policy = make_policy(folder)
    padding = padding_for(policy.model.config, 32)
    wide, plain = (weight_sync.Wire(policy.model, p).specs for p in (padding, None))
    assert padding.query_norm and [s.name for s in wide] == [s.name for s in plain]
    changed = {a.name.split(".")[-2] for a, b in zip(wide, plain) if a.shape != b.shape}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}


def test_a_parameter_of_a_dense_model_is_saved_as_it_is(model):
    tensor = torch.zeros(2)
    assert experts.as_saved(model, "model.norm.weight", tensor)[0][1] is tensor
