"""Weights on their way to vLLM, without vLLM: names, order, packing, padding, the fan-out, versions, broken transfers."""

import copy
import threading
from pathlib import Path

import pytest
import torch
from fakes import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3ForCausalLM

from amft_fast.config import LoraConfig, ModelConfig, ObjectiveConfig, TrainConfig
from amft_fast.engine.local import LocalEngine
from amft_fast.errors import UserError
from amft_fast.model import lora
from amft_fast.model.policy import Policy, load_model
from amft_fast.rollout.vllm import weight_sync as ws
from amft_fast.rollout.vllm.adapter_sync import AdapterSync
from amft_fast.rollout.vllm.channels import GlooChannel, broadcast, gloo_group, meet
from amft_fast.rollout.vllm.head_padding import HeadPadding, padding_for
from amft_fast.rollout.vllm.setup import Copy


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), tie=request.param)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def named(model):
    return [(n, p.detach()) for n, p in model.named_parameters()]


def test_every_tensor_goes_once_in_layer_order_and_the_head_with_its_embedding(model):
    wire = ws.Wire(model)
    sent = list(wire.stream(named(model)))
    names = [n for n, _ in sent]
    assert names == [s.name for s in wire.specs] and len(set(names)) == len(names)
    assert "lm_head.weight" in names
    tensors = dict(sent)
    assert torch.equal(tensors["lm_head.weight"], model.lm_head.weight)
    if model.config.tie_word_embeddings:
        # At once after its source, which ZeRO-3 has released by the time that the last layer is gathered.
        assert names.index("lm_head.weight") == names.index("model.embed_tokens.weight") + 1
    layers = [n for n in names if ".layers." in n]
    assert layers == sorted(layers, key=lambda n: int(n.split(".")[2]))


def test_adapters_are_sent_merged_under_the_names_of_a_model_without(model):
    pytest.importorskip("peft")
    adapted = lora.add(copy.deepcopy(model), LoraConfig(rank=2))
    for layer in lora.layers(adapted).values():
        for p in lora.factors(layer).values():
            torch.nn.init.normal_(p, std=0.1)
    wire = ws.Wire(adapted)
    assert wire.specs == ws.Wire(model).specs
    engine = LocalEngine(Policy(adapted, ObjectiveConfig()), TrainConfig())
    before, sent = dict(named(model)), dict(wire.stream(engine.named_full_params()))
    for name, layer in lora.layers(adapted).items():
        want = before[f"{name}.weight"] + layer.get_delta_weight("default")
        torch.testing.assert_close(sent[f"{name}.weight"], want)


def test_a_tensor_that_is_missing_too_much_or_wrong_is_named(model):
    wire, tensors = ws.Wire(model), named(model)
    name = tensors[3][0]
    for bad, match in [
        (tensors[:3] + tensors[4:], f"expected {name}"),
        (tensors[:-1], f"1 tensors are missing, the first is {tensors[-1][0]}"),
        ([*tensors, ("extra", torch.zeros(2))], "expected no more tensors, got extra"),
        ([*tensors[:3], (name, torch.zeros(2, 2)), *tensors[4:]], rf"expected {name} .* got {name} \[2, 2\]"),
        (tensors[::-1], "expected model.embed_tokens.weight"),
    ]:
        with pytest.raises(ws.IncompleteError, match=match):
            list(wire.stream(bad))


def test_layers_must_come_together():
    ws.check_order(["embed", "m.layers.0.a", "m.layers.0.b", "m.layers.1.a", "norm", "v.blocks.0.a", "lm_head"])
    with pytest.raises(ValueError, match=r"layer by layer, got m\.layers\.0\.b"):
        ws.check_order(["m.layers.0.a", "m.layers.1.a", "m.layers.0.b"])


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.float64])
shapes = st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple)


@given(st.lists(st.tuples(dtypes, shapes), min_size=1, max_size=12), st.integers(1, 2000))
@settings(max_examples=60, deadline=None)
def test_buckets_hold_everything_once_within_their_bound_and_unpack_to_the_same(kinds, max_bytes):
    specs = [ws.TensorSpec(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(kinds)]
    tensors = [torch.randn(s.shape).mul(50).to(s.dtype) for s in specs]
    buckets = ws.plan_buckets(specs, max_bytes)
    assert [i for b in buckets for i in b.members] == list(range(len(specs)))
    for bucket in buckets:
        assert bucket.size <= max_bytes or len(bucket.members) == 1
        buffer = torch.empty(bucket.size, dtype=torch.uint8)
        for (_, view), i in zip(ws.unpack(buffer, bucket, specs), bucket.members):
            view.copy_(tensors[i])
        for (name, view), i in zip(ws.unpack(buffer, bucket, specs), bucket.members):
            assert name == specs[i].name and view.dtype == specs[i].dtype and torch.equal(view, tensors[i])


def test_the_adapter_is_pinned_to_one_minor_version():
    ws.check_version("0.32.0")
    ws.check_version("0.32.1+cpu")
    for other in ("0.31.9", "0.33.0", "0.3.2", "1.0"):
        with pytest.raises(UserError, match=rf"needs vLLM 0\.32\.x.*got {other}"):
            ws.check_version(other)


# ------------------------------------------------------------------------------------------------------- padded heads


def padded_twin(model, padding):
    config = type(model.config).from_dict(model.config.to_dict())
    config.head_dim = padding.padded
    twin = type(model)(config).eval()
    with torch.no_grad():
        for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters()):
            assert padding.shape(name, tuple(p.shape)) == tuple(q.shape), name
            q.copy_(padding(name, p))
    return twin


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("size", [8, 16])
def test_padded_heads_compute_the_same(kind, size):
    from transformers import LlamaForCausalLM

    common = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"num_key_value_heads": 2, "head_dim": size, "intermediate_size": 32, "rms_norm_eps": 1e-2}
    common |= {"attention_bias": True}
    torch.manual_seed(0)
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common))
    else:
        model = LlamaForCausalLM(LlamaConfig(**common))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    padding = padding_for(model.config, 32)
    assert padding == HeadPadding(size, 32, kind == "qwen3")
    ids = torch.randint(0, 40, (2, 15))
    with torch.no_grad():
        want, got = model.eval()(ids).logits, padded_twin(model, padding)(ids).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert want.std() > 0.1


def test_what_needs_no_padding_gets_none_and_what_cannot_be_padded_is_refused():
    assert padding_for(Qwen3Config(head_dim=64), 32) is None
    with pytest.raises(ValueError, match="heads of 20 of a 'qwen3' model cannot be padded"):
        padding_for(Qwen3Config(head_dim=20), 32)


# --------------------------------------------------------------------------------------------- fan-out and transfers


class FakeEngine:
    """One engine in a thread: receives over a real gloo group, remembers the calls, can be told to fail at one of them."""

    def __init__(self, name="engine", workers=1, fail_at=None, absent=()):
        self.name, self.workers, self.fail_at, self.absent = name, workers, fail_at, list(absent)
        self.calls, self.tensors, self.version, self.group = [], {}, None, None

    def _called(self, name):
        self.calls.append(name)
        if self.fail_at == name:
            self.group = None  # one that fails leaves the group
            raise ConnectionError(f"{name} failed")

    def world_size(self):
        return self.workers

    def pause(self):
        self._called("pause")

    def init_weight_transfer_engine(self, info):
        self._called("init")
        self.info = info
        store = meet(info["address"], info["world_size"], info["timeout_s"])
        self.group = gloo_group(store, info["host"], info["rank_offset"], info["world_size"], info["timeout_s"])

    def shutdown_weight_transfer_engine(self):
        self._called("shutdown")

    def start_weight_update(self):
        self._called("start")

    def update_weights(self, info):
        self._called("update")
        kinds = [getattr(torch, d) for d in info["dtype_names"]]
        specs = [ws.TensorSpec(n, d, tuple(s)) for n, d, s in zip(info["names"], kinds, info["shapes"])]
        for bucket in ws.plan_buckets(specs, self.info["bucket_bytes"]):
            buffer = torch.empty(bucket.size, dtype=torch.uint8)
            broadcast(self.group, buffer).wait()
            self.tensors |= dict(ws.unpack(buffer, bucket, specs))
            self._called("bucket")

    def missing(self):
        self._called("missing")
        return self.absent

    def finish_weight_update(self, version):
        self._called("finish")
        self.version = version

    def reset_caches(self):
        self._called("reset")

    def resume(self):
        self._called("resume")


def make_sync(model, bucket_bytes=3000, timeout_s=20.0):
    wire = ws.Wire(model)
    made = []

    def channel(fan, specs):
        made.append(fan)
        return GlooChannel(fan, specs, "127.0.0.1", bucket_bytes, timeout_s)

    return ws.WeightSync(wire, channel), made


def test_a_transfer_brings_the_same_weights_to_all_engines_in_the_right_order_of_calls(model):
    engines = [FakeEngine("one"), FakeEngine("two")]
    sync, made = make_sync(model)
    sync.send(engines, named(model), 7)
    for e in engines:
        buckets = ["bucket"] * e.calls.count("bucket")
        assert len(buckets) > 3, "several buckets"
        assert e.calls == ["init", "pause", "start", "update", *buckets, "missing", "finish", "reset", "resume"]
        assert e.version == "7"
        want = dict(ws.Wire(model).stream(named(model)))
        assert set(e.tensors) == set(want) and all(torch.equal(e.tensors[n], t) for n, t in want.items())
    assert [e.info["rank_offset"] for e in engines] == [1, 2] and engines[0].info["world_size"] == 3
    with torch.no_grad():
        changed = [(n, t + 1) for n, t in named(model)]
    sync.send(engines, changed, 8)
    assert engines[0].calls.count("init") == 1 and len(made) == 1, "the group stays"
    assert torch.equal(engines[1].tensors["model.norm.weight"], dict(changed)["model.norm.weight"])
    # A third engine: the group is made anew.
    sync.send([*engines, FakeEngine("three")], named(model), 9)
    assert len(made) == 2
    sync.close()


def test_ranks_of_engines_with_several_workers_do_not_overlap():
    class Recorder(FakeEngine):
        def init_weight_transfer_engine(self, info):
            self.info = info

    engines = [Recorder(workers=2), Recorder(workers=4), Recorder(workers=1)]
    fan = ws.FanOut(engines)
    fan.init_weight_transfer_engine({"rank_offset": 1, "world_size": 8})
    assert [e.info["rank_offset"] for e in engines] == [1, 3, 7]
    fan.init_weight_transfer_engine({"packed": True})
    assert engines[2].info == {"packed": True}, "ipc has no ranks"


@pytest.mark.parametrize("where", ["pause", "init", "start", "update", "bucket", "finish", "reset", "resume"])
def test_an_engine_that_fails_anywhere_ends_the_transfer_soon_and_all_tensors_are_read(model, where):
    if not model.config.tie_word_embeddings:
        pytest.skip("once is enough")
    sync, _ = make_sync(model, timeout_s=1.5)  # bounds each wait of those that did not fail
    engines = [FakeEngine("good"), FakeEngine("bad", fail_at=where)]
    read = []

    def stream():
        for item in named(model):
            read.append(item[0])
            yield item

    box = []

    def send():
        try:
            sync.send(engines, stream(), 3)
        except ws.TransferError as e:
            box.append(e)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    thread.join(200)
    assert box, "it must end, and with an error"
    assert "bad" in str(box[0]) or where in ("update", "bucket"), box
    assert len(read) == len(named(model)), "under ZeRO-3 each tensor is a collective that other ranks take part in"
    assert sync.channel is None
    fresh = [FakeEngine("good"), FakeEngine("new")]
    sync.make_channel = make_sync(model)[0].make_channel  # with a limit that a busy machine keeps
    sync.send(fresh, named(model), 4)
    assert [e.version for e in fresh] == ["4", "4"]
    sync.close()


def test_an_update_with_a_tensor_missing_is_never_finished(model):
    sync, _ = make_sync(model)
    engine = FakeEngine()
    with pytest.raises(ws.IncompleteError, match="expected"):
        sync.send([engine], [x for x in named(model) if "layers.1.self_attn.k_proj" not in x[0]], 1)
    assert "finish" not in engine.calls and engine.version is None


def test_an_update_that_an_engine_finds_incomplete_is_never_finished(model):
    sync, _ = make_sync(model)
    engines = [FakeEngine(), FakeEngine(absent=["model.layers.0.self_attn.qkv_proj"])]
    with pytest.raises(ws.IncompleteError, match=r"1 modules .* the first is model\.layers\.0\.self_attn\.qkv_proj"):
        sync.send(engines, named(model), 1)
    assert all("finish" not in e.calls for e in engines)


def test_an_update_that_broke_off_is_cleared_by_an_empty_one():
    engine = FakeEngine()
    ws.clear_update(engine)
    assert engine.calls == ["start", "finish", "shutdown"] and engine.version is None
    still_open = FakeEngine(fail_at="start")  # vLLM refuses a second start
    ws.clear_update(still_open)
    assert "finish" in still_open.calls


def test_the_copy_for_restarts_is_that_of_the_last_transfer_even_of_one_that_broke(model):
    copy = Copy()
    list(copy.tee(named(model)))
    with torch.no_grad():
        later = [(n, t * 2) for n, t in named(model)]
    sync, _ = make_sync(model)
    with pytest.raises(ws.TransferError):
        sync.send([FakeEngine(fail_at="update")], copy.tee(later), 2)
    got = dict(copy())
    assert all(torch.equal(got[n], t) for n, t in later) and got[later[0][0]] is not later[0][1]
    engine = FakeEngine()
    sync.send([engine], copy(), 2)
    assert torch.equal(engine.tensors["model.norm.weight"], dict(later)["model.norm.weight"])
    sync.close()


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_an_adapter_that_cannot_be_written_is_a_transfer_that_failed(fault, tmp_path, monkeypatch):
    """A full disk: nothing is told to the engine, nothing half-written is left, and the version before it is still there."""
    pytest.importorskip("peft")
    cfg = LoraConfig(rank=2)
    folder = make_checkpoint(tmp_path / "base")
    adapted = load_model(ModelConfig(path=str(folder), lora=cfg), torch.device("cpu"))
    sync, engine = AdapterSync(adapted, cfg, str(folder), tmp_path / "adapters"), AdapterEngine()
    sync.send([engine], lora.named_factors(adapted), 1)
    assert engine.calls == ["pause", "load amft-1", "reset", "resume"]

    def full(tensors, path, **more):
        Path(path).write_bytes(b"half")
        raise fault

    monkeypatch.setattr(lora, "save_file", full)
    with pytest.raises(
        ws.TransferError, match=r"the adapter could not be written to .*amft-2: .*No space left on device"
    ):
        sync.send([engine], lora.named_factors(adapted), 2)
    assert len(engine.calls) == 4 and [p.name for p in (tmp_path / "adapters").iterdir()] == ["amft-1"]


class AdapterEngine(FakeEngine):
    def load_adapter(self, path, version):
        self._called(f"load {Path(path).name}")
