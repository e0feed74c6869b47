"""Base checkpoints that are damaged or do not fit their tokenizer: one sentence, exit code 2, before training."""

import json
import shutil

import pytest
import torch
from fakes import make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from amft_fast import cli
from amft_fast.config import ModelConfig
from amft_fast.errors import UserError
from amft_fast.model.base import generation_stops, longest_context
from amft_fast.model.policy import load_model, load_tokenizer
from amft_fast.rollout.encoder import load_encoder

CPU = torch.device("cpu")


@pytest.fixture
def folder(checkpoint_folder, tmp_path):
    return shutil.copytree(checkpoint_folder, tmp_path / "base")


def tensors(folder, change):
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def settings(folder, name="config.json", **changes):
    found = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(found))


def cut(folder, name="model.safetensors", at=0.5):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * at)])


def spoil(found, name, value):
    found[name].view(-1)[3] = value


NORM, PROJECTION = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
DAMAGE = {
    "a tensor is missing": (lambda f: tensors(f, lambda t: t.pop(NORM)), f"lacks 1 of the model's tensors ({NORM})"),
    "a layer is missing": (
        lambda f: tensors(f, lambda t: [t.pop(k) for k in list(t) if "layers.1" in k]),
        "of the model's tensors (model.layers.1.input_layernorm.weight",
    ),
    "names of another model": (
        lambda f: tensors(f, lambda t: [t.update({"x." + k: t.pop(k)}) for k in list(t)]),
        "which would be random",
    ),
    "another shape": (lambda f: tensors(f, lambda t: t.update({NORM: torch.ones(5)})), "could not be loaded"),
    "NaN": (lambda f: tensors(f, lambda t: spoil(t, PROJECTION, float("nan"))), f"{PROJECTION} of "),
    "infinity": (
        lambda f: tensors(f, lambda t: spoil(t, NORM, float("-inf"))),
        "holds 1 values that are NaN or infinite",
    ),
    "truncated": (lambda f: cut(f), "could not be loaded"),
    "truncated head": (lambda f: cut(f, at=0.001), "could not be loaded"),
    "empty": (lambda f: cut(f, at=0), "could not be loaded"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "could not be loaded"),
    "text for weights": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs"),
        "could not be loaded",
    ),
    "a shard is missing": (
        lambda f: (
            (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
            (f / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": {NORM: "model-00002-of-00002.safetensors"}})
            ),
        ),
        "could not be loaded",
    ),
    "a damaged index": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text("{"),
        ),
        "could not be loaded",
    ),
    "config cut": (lambda f: cut(f, "config.json"), "the configuration of"),
    "config of no type": (lambda f: settings(f, model_type="nothing"), "the configuration of"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "the configuration of"),
    "config with other sizes": (lambda f: settings(f, hidden_size=24), "could not be loaded"),
    "config with a text for a number": (lambda f: settings(f, num_hidden_layers="two"), "could not be loaded"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no tokenizer": (
        lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        "the tokenizer of",
    ),
    "tokenizer cut": (lambda f: cut(f, "tokenizer.json"), "the tokenizer of"),
    "tokenizer empty": (lambda f: cut(f, "tokenizer.json", 0), "the tokenizer of"),
    "tokenizer settings cut": (lambda f: cut(f, "tokenizer_config.json"), "the tokenizer of"),
    "generation settings cut": (lambda f: cut(f, "generation_config.json"), "generation_config.json"),
    "tokenizer too large": (
        lambda f: grow(f, 3),
        "counts up to token 16 ('new2'), and the model's embedding has 14 rows",
    ),
    "a pad token of its own": (lambda f: grow(f, 0, pad_token="[PAD]"), "counts up to token 14 ('[PAD]')"),
    "code of its own": (
        lambda f: settings(f, model_type="other", auto_map={"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}),
        "the configuration of",
    ),
}


def grow(folder, n, **special):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"new{i}" for i in range(n)])
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)


def load(folder):
    cfg = ModelConfig(path=str(folder))
    load_encoder(cfg)
    return load_model(cfg, CPU)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_base_is_one_sentence(folder, name):
    damage, said = DAMAGE[name]
    damage(folder)
    with pytest.raises(UserError) as e:
        load(folder)
    text = str(e.value)
    assert said in text and text.startswith("model.path") and str(folder) in text and "\n" not in text, text
    assert len(text) < 700


def test_the_command_says_so_and_exits_with_2(folder, tmp_path, capsys):
    tensors(folder, lambda t: spoil(t, PROJECTION, float("nan")))
    assert (
        cli.main(["train", "configs/demo.toml", "--model.path", str(folder), "--run.dir", str(tmp_path / "run")]) == 2
    )
    error = capsys.readouterr().err
    assert f"{PROJECTION} of {str(folder)!r} holds 1 values that are NaN" in error and "Traceback" not in error


def test_what_is_whole_loads(folder, tmp_path):
    load(folder)
    load(make_checkpoint(tmp_path / "untied", tie=False))
    tensors(folder, lambda t: t.update({"value_head.weight": torch.ones(2)}))  # more than the model has is no damage
    load(folder)
    settings(folder, vocab_size=14)
    large = 3e38  # extremes that overflow when they are added are no infinity
    tensors(folder, lambda t: (spoil(t, NORM, large), spoil(t, NORM, large)))
    load(folder)


def test_a_tokenizer_smaller_than_the_embedding_is_right(folder):
    settings(folder, vocab_size=64)
    assert len(load_tokenizer(ModelConfig(path=str(folder)))) == 14


def test_special_tokens_that_nothing_writes_need_no_row(folder):
    grow(folder, 0, additional_special_tokens=["<spare>"])
    load(folder)
    path = folder / "chat_template.jinja"
    path.write_text("<spare>" + path.read_text())
    with pytest.raises(UserError, match=r"counts up to token 14 \('<spare>'\)"):
        load(folder)


def test_the_stops_of_generation_config_are_read(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for given, want in (([1, 3], (1, 3)), (3, (3,)), ([1, 7, 99], (1,)), (None, ())):  # 7 is a word, 99 is not there
        settings(folder, "generation_config.json", eos_token_id=given)
        assert generation_stops(str(folder), tokenizer) == want
    (folder / "generation_config.json").unlink()
    assert generation_stops(str(folder), tokenizer) == ()
    settings(folder, "tokenizer_config.json")
    shutil.copy(folder / "config.json", folder / "generation_config.json")
    settings(folder, "generation_config.json", eos_token_id=[3])
    assert set(load_encoder(ModelConfig(path=str(folder))).stop_token_ids) == {1, 3}


def test_the_context_is_the_settings_or_the_checkpoints(folder):
    assert longest_context(ModelConfig(path=str(folder))) == 256
    assert longest_context(ModelConfig(path=str(folder), max_position_embeddings=99)) == 99
    assert load_encoder(ModelConfig(path=str(folder))).context == 256
