"""`--profile.steps`: the report of a real run, its files, and its arithmetic."""

import json

import torch
from runs import cfg_for, train

from amft_fast.run import profiling


def test_kinds_of_operations():
    assert profiling.kind_of("aten::mm") == "matrix products"
    assert profiling.kind_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert profiling.kind_of("sm90_xmma_gemm_bf16") == "matrix products"
    assert profiling.kind_of("aten::add") == "element-wise and other"
    assert profiling.peak_flops(torch.device("cpu")) > 0


def trace(folder):
    return json.loads((folder / "profile" / "trace.json").read_text())["traceEvents"]


def within(events, phase):
    """The names of what happened inside a phase, other phases apart."""
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == phase and e.get("ph") == "X"]
    assert spans
    inside = [e for e in events if any(a < e.get("ts", a) < b for a, b in spans) and e.get("cat") != "overhead"]
    return {e["name"] for e in inside if not e["name"].startswith("amft.")}


def test_a_profiled_run_says_where_the_time_went(tmp_path, checkpoint_folder, capsys):
    flags = ["--profile.steps", "2", "--profile.skip", "1", "--train.steps", "4", "--train.warmup_steps", "0"]
    assert (
        train(cfg_for(tmp_path, checkpoint_folder, *flags, "--eval.every", "0", "--checkpoint.keep_best", "false")) == 0
    )
    text = capsys.readouterr().out
    assert text.count("profile of 2 steps") == 1
    for word in (
        "update",
        "rollout",
        "matrix products",
        "MFU",
        "weights",
        "gradients",
        "optimizer moments",
    ):
        assert word in text, word
    events = trace(tmp_path)
    traced = {e.get("name") for e in events}
    assert {"amft.update", "amft.rollout", "aten::mm"} <= traced
    # Which operations are the dearest depends on what else the machine does; that those named did run does not.
    dearest = [row.split()[0] for row in text.partition("  operation\n")[2].splitlines()[: profiling.TOP]]
    # A name may have a blank in it: autograd::engine::evaluate_function: MmBackward0.
    assert len(dearest) == profiling.TOP and all(any(str(t).split()[:1] == [d] for t in traced) for d in dearest)
    assert "rollouts are made of is left out" in text and not within(events, "amft.rollout")
    assert {"aten::mm", "[memory]"} <= within(events, "amft.update")


def test_rollouts_are_recorded_when_asked_for(tmp_path, checkpoint_folder, capsys):
    flags = ["--profile.steps", "1", "--profile.skip", "0", "--train.steps", "1", "--train.warmup_steps", "0"]
    flags += ["--profile.rollouts", "--eval.every", "0", "--checkpoint.keep_best", "false"]
    assert train(cfg_for(tmp_path, checkpoint_folder, *flags)) == 0
    assert "left out" not in capsys.readouterr().out
    assert {"aten::mm", "[memory]"} <= within(trace(tmp_path), "amft.rollout")
