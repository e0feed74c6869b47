"""bench/: the dispatcher, the loss-head benchmark from end to end on tiny shapes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from amft_kernels.linear_policy_loss import linear_policy_loss, linear_policy_loss_reference
from loss_head_cases import run_policy

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # bench is not part of the package

from bench import __main__ as dispatcher  # noqa: E402
from bench import loss_head, measure, results, workload  # noqa: E402

TINY = ["--device", "cpu", "--rounds", "1", "--core", "--shapes", "64,16,257"]


def run(folder, *extra, shapes=()):
    code = loss_head.main([*TINY, *shapes, *extra, "--out", str(folder)])
    return code, json.loads((folder / "loss_head_cpu.json").read_text(encoding="utf-8"))


def rows_of(result, **wanted):
    rows = result["shapes"][0]["rows"]
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


# --------------------------------------------------------------------------------------------------------- dispatcher


def test_dispatcher_lists_benchmarks_and_runs_the_one_named(monkeypatch, capsys):
    assert dispatcher.main(["--help"]) == 0
    listing = capsys.readouterr().out
    assert all(name in listing for name in ("loss-head", "probe", "gpu"))
    assert dispatcher.main([]) == 2
    monkeypatch.setattr(loss_head, "main", lambda rest: len(rest))
    assert dispatcher.main(["loss-head", "--device", "cpu"]) == 2


def test_dispatcher_refuses_an_unknown_name(capsys):
    assert dispatcher.main(["los-head"]) == 2
    error = capsys.readouterr().err
    assert "no benchmark 'los-head': did you mean 'loss-head'?" in error and "probe" in error


# ---------------------------------------------------------------------------------------------------------- workload


@pytest.mark.parametrize("kind", workload.KINDS)
def test_the_truth_is_the_reference_in_fp64(kind):
    case = workload.make_case((64, 16, 257), torch.float32, "cpu")
    terms = {"nll_weight": case.token_weight.double()}
    if kind != "ce":
        terms = {"pg_weight": case.token_weight, "advantages": case.advantages, "old_logprobs": case.old_logprobs}
        terms = {name: value.double() for name, value in terms.items()}
    if kind == "policy":
        terms["entropy_weight"] = case.entropy_weight.double()
    args = case.hidden.double(), case.weight.double(), case.targets
    want = run_policy(linear_policy_loss_reference, *args, **terms)
    errors = workload.Truth(case).errors(kind, want["loss"], want["hidden"], want["weight"])
    assert max(errors.values()) < 1e-7, errors  # the weights 1/N are rounded to fp32
    assert 0 < float(want["clipped_tokens"]) < 32 or kind == "ce"


def test_a_dropped_entropy_gradient_is_far_over_every_limit():
    case = workload.make_case((64, 16, 257), torch.float32, "cpu")
    _, *grads = workload.loss_and_grads(loss_head.eager_policy(case), case)
    errors = workload.Truth(case).errors("pg", torch.tensor(0.0), *grads)
    assert min(errors["hidden"], errors["weight"]) > 0.1


# ---------------------------------------------------------------------------------------------------------- loss head


def test_results_hold_device_versions_commit_and_every_figure(tmp_path, capsys):
    code, result = run(tmp_path, shapes=["32,16,257"])
    assert code == 0 and result["benchmark"] == "loss-head" and result["dtype"] == "float32"
    assert result["device"] and result["versions"]["torch"] == torch.__version__ and result["commit"]
    assert [entry["shape"] for entry in result["shapes"]] == [[64, 16, 257], [32, 16, 257]]
    for name in ("linear_policy_loss", "linear_policy_loss, weight_grad", "linear_logprob"):
        for kind in ("policy", "ce"):
            (row,) = rows_of(result, name=name, kind=kind)
            assert row["green"] and row["backend"] == "torch" and row["median_ms"] > 0 and row["tflops"] > 0
            assert row["over_chunked_gemms"] > 0 and row["over_whole_gemms"] > 0 and row["share_of_gemm_rate"] > 0
            assert row["peak_extra_bytes"] > 4 * 257 * 16  # dW at least
            assert set(row["errors"]) == {"loss", "hidden", "weight"}
    assert len(rows_of(result, role="floor")) == 2
    document = (tmp_path / "loss_head_cpu.md").read_text(encoding="utf-8")
    assert "linear_policy_loss, torch" in document and document in capsys.readouterr().out
    assert (tmp_path / "loss_head_cpu.png").read_bytes()[:4] == b"\x89PNG"


def test_a_red_check_blocks_its_timing(tmp_path, monkeypatch):
    def wrong(hidden, *args, **options):
        out = linear_policy_loss(hidden, *args, **options)
        return out._replace(loss=out.loss + 1e-3 * hidden.square().mean())

    monkeypatch.setattr(loss_head, "linear_policy_loss", wrong)
    code, result = run(tmp_path)
    assert code == 1
    for row in rows_of(result, name="linear_policy_loss"):
        assert not row["green"] and "median_ms" not in row and row["peak_extra_bytes"] is None
    assert rows_of(result, name="linear_logprob", kind="policy")[0]["median_ms"] > 0
    assert "red: not timed" in (tmp_path / "loss_head_cpu.md").read_text(encoding="utf-8")


def test_nan_is_red(tmp_path, monkeypatch):
    def nan(*args, **options):
        out = linear_policy_loss(*args, **options)
        return out._replace(loss=out.loss * float("nan"))

    monkeypatch.setattr(loss_head, "linear_policy_loss", nan)
    code, result = run(tmp_path)
    assert code == 1 and not rows_of(result, name="linear_policy_loss", kind="ce")[0]["green"]


def test_what_cannot_run_is_left_out_with_a_sentence(tmp_path, monkeypatch):
    def slow(case):
        raise measure.TimeUp  # as the timer does

    def broken(case):
        raise RuntimeError("no such kernel\nand a long trace")

    def fat(case):
        raise torch.OutOfMemoryError("CUDA out of memory")

    peers = [loss_head.PEERS[0].__class__(name, "ce", make, core=True) for name, make in
             (("slow", slow), ("broken", broken), ("fat", fat))]  # fmt: skip
    monkeypatch.setattr(loss_head, "PEERS", (*loss_head.PEERS, *peers))
    code, result = run(tmp_path, "--limit", "77")
    why = {row["name"]: row["why"] for row in result["shapes"][0]["left_out"]}
    assert code == 0
    assert why["slow"] == "its first call, compilation included, was not done after 77 s"
    assert why["broken"] == "failed: RuntimeError: no such kernel"
    assert why["fat"] == "out of memory at N, H, V = 64, 16, 257"
    assert "no such kernel" in (tmp_path / "loss_head_cpu.md").read_text(encoding="utf-8")


def test_the_timer_ends_what_never_ends():
    with pytest.raises(measure.TimeUp), measure.time_limit(0.05):
        while True:
            pass


def test_peers_say_what_they_lack():
    from bench import peers

    case = workload.make_case((32, 16, 257), torch.float32, "cpu")
    for peer in peers.PEERS:
        if "compile" in peer.name:
            continue
        try:
            run = peer.make(case)
        except peers.LeftOut as reason:
            assert any(word in str(reason) for word in ("not installed", "CUDA", "no usable", "has no")), reason
        else:
            assert run().dim() == 0
    with pytest.raises(peers.LeftOut, match="Nothing is not installed"):
        peers.need("nothing_of_that_name", "f", library="Nothing")


def test_a_spent_budget_skips_and_says_so(tmp_path):
    code, result = run(tmp_path, "--budget", "0", shapes=["32,16,257"])
    assert code == 0 and result["shapes"] == []
    assert result["skipped"][0] == "N, H, V = 64, 16, 257: the time budget of 0 s was spent"


def test_every_shape_is_written_when_it_is_done(tmp_path, monkeypatch):
    """A process that is killed in its second shape leaves the first."""
    measure_shape, written = loss_head.measure_shape, []

    def spying(shape, *rest):
        if (tmp_path / "loss_head_cpu.json").exists():
            found = json.loads((tmp_path / "loss_head_cpu.json").read_text(encoding="utf-8"))
            written.append([entry["shape"][0] for entry in found["shapes"]])
        return measure_shape(shape, *rest)

    monkeypatch.setattr(loss_head, "measure_shape", spying)
    run(tmp_path, shapes=["32,16,257", "16,16,257"])
    assert written == [[64], [64, 32]]


def test_a_wrong_main_gradient_is_red(tmp_path, monkeypatch):
    def wrong(*args, weight_grad=None, **options):
        out = linear_policy_loss(*args, weight_grad=weight_grad, **options)
        if weight_grad is not None:
            weight_grad.mul_(1.1)
        return out

    monkeypatch.setattr(loss_head, "linear_policy_loss", wrong)
    code, result = run(tmp_path)
    assert code == 1
    for row in rows_of(result, role="ours"):
        assert row["green"] == (row["name"] != loss_head.TRAINING)


def test_an_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    measure_shape = loss_head.measure_shape

    def interrupted(shape, *rest):
        if shape[0] == 32:
            raise KeyboardInterrupt
        return measure_shape(shape, *rest)

    monkeypatch.setattr(loss_head, "measure_shape", interrupted)
    _, result = run(tmp_path, shapes=["32,16,257", "16,16,257"])
    assert [entry["shape"][0] for entry in result["shapes"]] == [64]
    assert result["skipped"] == ["N, H, V = 32, 16, 257: interrupted", "N, H, V = 16, 16, 257: interrupted"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--shapes", "64,16"], "a shape is N,H,V"),
        (["--shapes", "64,16,0"], "a shape is N,H,V"),
        (["--chunk-bytes", "64MB"], "such as 64MiB"),
        (["--chunk-bytes", "1KiB"], "must hold a row of logits"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        loss_head.main(["--device", "cpu", "--shapes", "64,16,257", *arguments])
    assert words in capsys.readouterr().err


def test_sizes_and_bars():
    assert loss_head.parse_bytes("2GiB") == 2 << 30 and loss_head.parse_bytes("4096") == 4096
    assert [results.mib(x) for x in (None, 1 << 30, 3 << 19, 200 << 20, 15 << 30)] == [
        "–", "1 GiB", "1.5 MiB", "200 MiB", "15 GiB",
    ]  # fmt: skip
    timed = {"kind": "policy", "errors": {}, "peak_extra_bytes": 100}
    own = timed | {"role": "ours", "name": "linear_policy_loss", "median_ms": 70.0}
    eager = timed | {"role": "peer", "name": "eager, full logits", "median_ms": 100.0, "peak_extra_bytes": 700}
    entry = {"shape": [2048, 512, 32768], "sweep": False, "rows": [own, eager]}
    bars = loss_head.report.bars({"device_type": "cpu", "shapes": [entry]})
    assert [(bar["value"], bar["met"]) for bar in bars] == [(0.7, True), (pytest.approx(1 / 7), False)]


# ------------------------------------------------------------------------------------------------------- measurement


def test_peak_memory_on_the_cpu_counts_what_is_alive_at_once():
    x = torch.randn(256, 256)

    def work():
        a = x + 1
        b = a * 2
        del a
        return b + 1

    work()
    result, peak = measure.with_peak(work, "cpu")
    assert 2 * 2**18 <= peak <= 2 * 2**18 + 4096 and result.shape == x.shape
