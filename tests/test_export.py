"""amft-fast export: any checkpoint as a model that loads, or as a peft adapter."""

import json

import pytest
import torch
from fakes import CopyTask, copy_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from amft_fast.cli import main
from amft_fast.run import checkpoint, launch

IDS = torch.tensor([[2, 5, 3]])


@pytest.fixture(scope="module")
def run(tmp_path_factory, checkpoint_folder):
    """A run of 4 steps that was never exported, with checkpoints of steps 2, 3 and 4 of which 3 is the best."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--train.steps", "4", "--checkpoint.every", "1", "--checkpoint.keep_last", "3", "--train.method", "fixed"]
    assert launch.train(copy_run(folder, checkpoint_folder, *flags), False, CopyTask()) == 0
    checkpoint.mark_best(folder / "checkpoints", folder / "checkpoints" / "step-000003")
    return folder


def parameters_of(run, step):
    tensors, _ = checkpoint.load(run / "checkpoints" / f"step-{step:06d}")
    return {k.removeprefix("param."): tensors[k] for k in tensors if k.startswith("param.")}


@pytest.mark.parametrize("flags,step", [([], 4), (["--checkpoint", "best"], 3), (["--checkpoint", "2"], 2)])
def test_any_checkpoint_becomes_a_model_that_loads(run, flags, step, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(run), "--out", str(out), *flags]) == 0
    assert f"step {step} of" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out)
    want, got = parameters_of(run, step), dict(model.named_parameters())
    assert set(want) == set(got) and all(torch.equal(got[n], want[n]) for n in want)
    assert model.dtype == torch.float32, "the base checkpoint's"
    assert AutoTokenizer.from_pretrained(out).encode("a b") and not list(tmp_path.glob(".*"))


def test_an_interrupted_run_is_exported_into_its_own_folder_once(run, capsys):
    (run / "summary.json").unlink()
    assert main(["export", str(run), "--dtype", "bf16"]) == 0
    out = run / "export" / "step-000004"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for name, p in parameters_of(run, 4).items():
        assert torch.equal(dict(model.named_parameters())[name], p.bfloat16())
    assert main(["export", str(run)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_what_cannot_be_exported_is_a_sentence(run, tmp_path, capsys):
    for flags, words in (
        ([str(tmp_path)], "it has no config.toml"),
        ([str(run), "--checkpoint", "7"], "no '7' under"),
        ([str(run), "--checkpoint", "last"], "which holds best, 4, 3, 2"),
        ([str(run), "--adapter"], "model.lora.rank is 0"),
    ):
        assert main(["export", *flags]) == 2
        err = capsys.readouterr().err.strip()
        assert words in err and "\n" not in err


def test_a_damaged_checkpoint_is_passed_over_or_named(run, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=True)
    (copy / "checkpoints" / "step-000004" / "state.safetensors").write_bytes(b"x")
    assert main(["export", str(copy), "--out", str(tmp_path / "a")]) == 0
    assert "checkpoint passed over" in (out := capsys.readouterr().out) and "step 3 of" in out
    assert main(["export", str(copy), "--checkpoint", "4", "--out", str(tmp_path / "b")]) == 2
    assert not (tmp_path / "b").exists()


def test_adapters_merge_into_the_model_or_go_to_peft(tmp_path, checkpoint_folder):
    peft = pytest.importorskip("peft", reason="LoRA is an extra")
    run = tmp_path / "run"
    flags = ["--train.steps", "2", "--model.lora.rank", "2", "--train.method", "fixed", "--train.lr", "0.1"]
    assert launch.train(copy_run(run, checkpoint_folder, *flags), False, CopyTask()) == 0
    assert main(["export", str(run)]) == 0 and main(["export", str(run), "--adapter"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(run / "export" / "step-000002")
    base = AutoModelForCausalLM.from_pretrained(checkpoint_folder)
    before = base(IDS).logits
    adapted = peft.PeftModel.from_pretrained(base, run / "export" / "step-000002-adapter")
    with torch.no_grad():
        assert torch.allclose(adapted(IDS).logits, merged(IDS).logits, atol=1e-5)
        assert not torch.allclose(adapted(IDS).logits, before, atol=1e-3), "it has learned"
    assert adapted.peft_config["default"].base_model_name_or_path == str(checkpoint_folder)
