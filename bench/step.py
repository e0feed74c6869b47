"""One training step against others: the same weights, the same recorded rollouts, the same loss.

`python -m bench step --device cpu`: the demo's model and rollouts drawn from it; `--model DIR` another model (of a transformers
folder) and its answers to word problems. `--device cuda --shape 1.5b`: random weights of Qwen2.5's shapes and rollouts of
log-normal length. First every candidate's gradient is compared with that of an eager loop in fp32; one that is further off than
twice an eager loop in its own type is not timed. Then all take turns, and the best of the rounds counts, since other work on a
machine only ever adds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from amft_fast.run.profiling import peak_flops
from bench import ROOT
from bench.measure import with_peak
from bench.peers import LeftOut, first_line
from bench.results import RESULTS, environment, folder_name, markdown_table, mib, write_json
from bench.step_peers import Eager, Ours, Trl, Work, verl

MEASURED = ("amft_fast", "kernels", "bench/*.py")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
TRL_SLACK = 10  # in fp32: its own loss is 1.2e-4 off on a model of 135 M
EVERY = "amft-fast, every rollout read"
MAIN = (EVERY, "TRL", "transformers")  # what is timed on a model of a folder, beside "amft-fast" itself
FLAT_SHARES = (0.0, 0.25, 0.5, 0.75)
CHECKED = 8  # rollouts whose gradient is compared in a narrow type
# Hidden, MLP, layers, heads, key heads, tied; vocabulary 151 936: the shapes of Qwen2.5.
# Bytes that a layer keeps of a token for its backward pass, per unit of the hidden size and of the MLP's: measured on fake
# tensors at 0.5 B (57 KB) and 1.5 B (103 KB), bf16, without recomputation.
KEPT_HIDDEN, KEPT_MLP = 18, 8.6
STATES = 18  # bytes a parameter: bf16 weights, fp32 master and gradient, two moments
EAGER_LOGIT = 16  # bytes a logit of an eager loss: bf16, fp32, its log-softmax, two gradients
SHARE = 0.85  # of a card's memory that is planned for; the allocator's gaps are the rest
VOCABULARY = 151936
DEMO = ROOT / "configs" / "demo_base"
SHAPES = {
    "0.5b": (896, 4864, 24, 14, 2, True),
    "1.5b": (1536, 8960, 28, 12, 2, True),
    "7b": (3584, 18944, 28, 28, 4, False),
}


def fitting(shape: str, memory: float, longest: int) -> tuple[int, tuple[int, ...]]:
    """(tokens of a micro-batch, rows of the peers' micro-batches) that a card of so many bytes holds; rows are powers of two.

    At 16 k tokens 1.5 B took 81 GB of 84, and an eager loss of 4 rows would have taken 100.
    """
    hidden, mlp, layers, heads, kv, tied = SHAPES[shape]
    size = hidden // heads
    body = layers * (hidden * (2 * heads + 2 * kv) * size + 3 * hidden * mlp)
    parameters = body + VOCABULARY * hidden * (1 if tied else 2)
    kept = layers * (KEPT_HIDDEN * hidden + KEPT_MLP * mlp)
    head = (2 << 30) + 6 * VOCABULARY * hidden  # workspace, and dW on its way
    left = SHARE * memory - STATES * parameters
    tokens = min(16384, int((left - head) / kept) // 1024 * 1024)
    rows = int(left / (longest * (kept + EAGER_LOGIT * VOCABULARY)))
    most = 1 << (min(rows, 8).bit_length() - 1) if rows else 0
    return max(tokens, 1024), tuple(r for r in (most // 2, most) if r)


def recorded(rollouts: int, model: Path | None = None, dtype: str = "fp32") -> tuple[Work, object]:
    """The demo's model and its own answers to the demo's prompts, at temperature 1; with `model` that of a folder, and its
    answers to the word problems of configs/smollm2_words.toml.

    Advantages are those of the rewards; where every group is flat, as with a model that knows no answer, normal draws."""
    from transformers import AutoModelForCausalLM

    from amft_fast import config_file
    from amft_fast.advantages import group_advantages
    from amft_fast.interfaces import Sampling
    from amft_fast.rollout import episodes
    from amft_fast.run.build import build

    flags = ["--run.device", "cpu", "--run.threads", str(torch.get_num_threads()), "--model.dtype", dtype]
    flags += ["--model.path", str(model)] if model else []
    cfg = config_file.load(str(ROOT / "configs" / ("smollm2_words.toml" if model else "demo.toml")), flags)
    parts = build(cfg, lambda: False)
    g = cfg.rollout.num_generations
    items = [parts.task.prompts("train")[i] for i in range(rollouts // g)]
    samples = episodes.run(
        parts.rollout_engine,
        parts.task,
        items,
        parts.encoder,
        Sampling(temperature=1.0, stop_token_ids=parts.encoder.stop_token_ids),
        num_generations=g,
        max_new_tokens=cfg.rollout.max_new_tokens,
        seed_parts=(0, "bench"),
    )
    advantages = group_advantages(
        np.array([s.reward for s in samples]), np.array([s.group_id for s in samples]), "grpo"
    )
    if not advantages.any():
        advantages = np.random.default_rng(0).normal(size=len(samples))
    # A model of its own: the engine's parameters are views of one flat tensor, or add their gradients into one.
    trained = parts.policy.model
    model = AutoModelForCausalLM.from_config(trained.config, dtype=trained.dtype, attn_implementation="sdpa")
    model.load_state_dict(trained.state_dict())
    return Work(model, samples, advantages, cfg.train.micro_batch_tokens), parts.encoder.tokenizer


def random_work(shape: str, rollouts: int, longest: int, max_tokens: int, seed: int = 0) -> tuple[Work, object]:
    """Random weights and random tokens on the GPU; groups of 8 answers, log-normal lengths."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    from amft_fast.interfaces import Sample

    hidden, mlp, layers, heads, kv, tied = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, tie_word_embeddings=tied, max_position_embeddings=32768,
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(rollouts):
        if i % 8 == 0:
            prompt = rng.integers(0, 150000, 256).tolist()
        n = int(np.clip(rng.lognormal(np.log(longest / 3), 0.7), 16, longest - 256))
        ids = rng.integers(0, 150000, n).tolist()
        samples.append(Sample(prompt, ids, [1] * n, [0.0] * n, 0, "stop", str(i // 8), i // 8))
    # TRL asks for a tokenizer, and reads no text with it here.
    return Work(model, samples, rng.normal(size=rollouts), max_tokens), AutoTokenizer.from_pretrained(DEMO)


@dataclass
class Candidate:
    name: str
    make: Callable[[Work], object]
    made: object = None
    note: str = ""
    distance: float = 0.0
    peak: int = 0
    seconds: list[float] = field(default_factory=list)


def candidates(work: Work, tokenizer, rows: Sequence[int]) -> list[Candidate]:
    """Ours, then those with most rows in a micro-batch."""
    out = [Candidate("amft-fast", Ours), Candidate(EVERY, lambda w: Ours(w, skip_flat=False))]
    for r in sorted(rows, reverse=True):
        out.append(Candidate(f"TRL GRPOTrainer, {r} rows", functools.partial(Trl, rows=r, tokenizer=tokenizer)))
        out.append(Candidate(f"transformers, eager loss, {r} rows", functools.partial(Eager, rows=r)))
    out.insert(4, Candidate("amft-fast, compiled layers", lambda w: Ours(w, compiled=True)))
    out.append(Candidate("amft-fast, padded rows", lambda w: Ours(w, packed=False)))
    return [*out, Candidate("verl", lambda w: verl())]


def flops(work: Work) -> float:
    """Of one update without recomputation, padding or sharing: 6 per weight and token (the head's for answers alone), and 12
    times heads · size for each pair of a token and one before it."""
    config, model = work.model.config, work.model
    head = work.model.get_output_embeddings().weight.numel()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    body = sum(p.numel() for p in model.parameters()) - head - (0 if tied else head)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    lengths = [len(s.prompt_ids) + len(s.response_ids) for s in work.samples]
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * size * pairs
    return 6 * body * sum(lengths) + 6 * head * work.trained + attention


def seconds(call: Callable[[], object], device: str) -> float:
    """A CPU's are those of the process: on a busy machine the wall clock counts the others' work."""
    if device == "cuda":
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - begin
    begin = time.process_time()
    call()
    return time.process_time() - begin


@contextlib.contextmanager
def _noting_failures(c: Candidate, device: str) -> Iterator[None]:
    """Writes down what keeps a candidate from being measured, at whatever point; the others go on."""
    try:
        yield
    except LeftOut as e:
        c.note = str(e)
    except torch.OutOfMemoryError:
        c.note = "does not fit"
    except Exception as e:
        c.note = f"failed: {first_line(e)}"
    if c.note:
        c.made = None
        release(device)


def check(all_candidates: list[Candidate], work: Work, log: Callable[[str], None]) -> None:
    """Compares every candidate's gradient with that of an eager loop in fp32: in a narrow type that of the same weights, over a
    few of the rollouts. A candidate may be twice as far off as the first eager loop in its own type, and a little more: two
    orders of the same sums differ by as much."""
    few = work.few(CHECKED)
    truth, device = few.true_gradients(), work.device.type
    limit, norm = TOLERANCE[work.dtype], float(sum(t.square().sum() for t in truth) ** 0.5)
    for c in sorted(all_candidates, key=lambda c: "eager loss" not in c.name):
        with _noting_failures(c, device):
            c.made = c.make(few)
            c.made.backward()
            pairs = zip(c.made.gradients(), truth, strict=True)
            c.distance = float(sum((a.float() - b).square().sum() for a, b in pairs) ** 0.5 / norm)
            if "eager loss" in c.name and limit == TOLERANCE[work.dtype]:
                limit += 2 * c.distance
            slack = TRL_SLACK if c.name.startswith("TRL") and few is work else 1
            if not c.distance < limit * slack:
                c.note = f"RED: gradient {c.distance:.1e} off, not timed"
        log(f"{c.name}: {c.note or f'gradient {c.distance:.1e} off'}")
        if few is not work:
            c.made = None
        release(device)


def measure(all_candidates: list[Candidate], work: Work, rounds: int, log: Callable[[str], None]) -> None:
    """All in turns on a CPU; on a GPU, which holds one model at a time, one after the other."""
    device = work.device.type
    for c in (c for c in all_candidates if not c.note):
        with _noting_failures(c, device):
            c.made = c.made or c.make(work)
            c.made.update()
            _, c.peak = with_peak(c.made.update, device)
            if device == "cuda":
                c.seconds = [seconds(c.made.update, device) for _ in range(rounds)]
                c.made = None
        release(device)
        log(f"{c.name}: {c.note or 'measured'}")
    for _ in range(rounds if device == "cpu" else 0):
        for c in (c for c in all_candidates if not c.note):
            with _noting_failures(c, device):
                c.seconds.append(seconds(c.made.update, device))


def drawing(work: Work, rounds: int) -> dict[str, float]:
    """Seconds to draw the recorded rollouts' lengths again from their prompts, by our engine and by `generate`, which TRL draws
    with; the best of the rounds."""
    from amft_fast.interfaces import Request
    from amft_fast.rollout.transformers import TransformersEngine
    from bench.rollout import engine_tokens, hf_generate

    model = work.copy().eval()
    model.generation_config.eos_token_id = None
    asked = [Request(tuple(s.prompt_ids), i, len(s.response_ids)) for i, s in enumerate(work.samples)]
    engine, device = TransformersEngine(model), work.device.type
    ways = {"amft-fast": lambda r: engine_tokens(engine, r), "generate": lambda r: hf_generate(model, r)}
    least = dict.fromkeys(ways, float("inf"))
    for round_ in range(rounds + 1):  # the first one warms up
        for name, way in ways.items():
            now = asked if round_ else [replace(r, max_new_tokens=2) for r in asked[:2]]
            taken = seconds(lambda way=way, now=now: way(now), device)
            least[name] = min(least[name], taken) if round_ else least[name]
    return least


def whole_step(draws: dict[str, float], rows: list[dict]) -> dict[str, float | None]:
    """How many times as long as ours a step takes, rollouts and update, of those who draw with `generate`."""
    drawn = [
        {**r, "ms": r["ms"] + 1e3 * draws["amft-fast" if r["name"].startswith("amft-fast") else "generate"]}
        for r in rows
        if "ms" in r
    ]
    return {rival: times_faster(drawn, rival) for rival in ("TRL", "transformers")}


def by_flat_share(work: Work, rounds: int) -> list[dict]:
    """Our update where so many of the groups teach nothing (their rewards are all equal); the best of the rounds."""
    found = [Candidate(f"{share:.0%} flat", lambda w, s=share: Ours(w.with_flat(s))) for share in FLAT_SHARES]
    measure(found, work, rounds, lambda text: None)
    return [{"flat": s, "ms": 1e3 * min(c.seconds)} for s, c in zip(FLAT_SHARES, found) if c.seconds]


def flat_table(rows: list[dict]) -> str:
    whole = rows[0]["ms"]
    cells = [[f"{r['flat']:.0%}", f"{r['ms']:.0f}", f"{r['ms'] / whole:.2f}"] for r in rows]
    return markdown_table(["groups that teach nothing", "update, ms", "of the whole"], cells)


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def rows_of(all_candidates: list[Candidate], work: Work, peak: float) -> list[dict]:
    out = []
    for c in all_candidates:
        row = {"name": c.name, "note": c.note, "gradient_distance": c.distance}
        if c.seconds:
            best, reads_all = min(c.seconds), c.name == EVERY or not c.name.startswith("amft-fast") or not work.flat
            row |= {"ms": 1e3 * best, "median_ms": 1e3 * statistics.median(c.seconds), "peak_bytes": c.peak}
            row |= {
                "tokens_per_s": work.tokens / best,
                "mfu": flops(work) / best / peak if peak and reads_all else None,
            }
        out.append(row)
    return out


def table(rows: list[dict]) -> str:
    cells = [
        [r["name"], *(("–",) * 5 if "ms" not in r else _cells(r)), r["note"]]
        for r in rows
    ]  # fmt: skip
    return markdown_table(["update", "ms", "median", "tokens/s", "MFU", "peak memory", "note"], cells)


def _cells(r: dict) -> tuple[str, ...]:
    mfu = "–" if r["mfu"] is None else f"{r['mfu']:.0%}"
    return f"{r['ms']:.0f}", f"{r['median_ms']:.0f}", f"{r['tokens_per_s']:,.0f}", mfu, mib(r["peak_bytes"])


def picture(result: dict, path: Path) -> None:
    """Milliseconds of each candidate as bars, ours on top."""
    from matplotlib.figure import Figure

    rows = [r for r in result["rows"] if "ms" in r][::-1]
    figure = Figure(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    colours = ["#1f6f8b" if r["name"].startswith("amft") else "#b8b8b8" for r in rows]
    bars = axes.barh([r["name"] for r in rows], [r["ms"] for r in rows], color=colours)
    axes.bar_label(bars, [f"{r['ms']:.0f} ms, {mib(r['peak_bytes'])}" for r in rows], padding=4)
    axes.set_xlim(0, 1.3 * max(r["ms"] for r in rows))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"one update on {result['rollouts']} rollouts, {result['environment']['device']}")
    figure.savefig(path, dpi=120)


def times_faster(rows: list[dict], rival: str) -> float | None:
    """The best of the rival's over ours."""
    own = next((r.get("ms") for r in rows if r["name"] == "amft-fast"), None)
    theirs = [r["ms"] for r in rows if r["name"].startswith(rival) and "ms" in r]
    return min(theirs) / own if theirs and own else None


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when one of ours was not timed."""
    parser = argparse.ArgumentParser(prog="python -m bench step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1.5b", help="on a GPU")
    parser.add_argument("--model", type=Path, help="on a CPU: a transformers folder, instead of the demo's model")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of --model, on a CPU")
    parser.add_argument("--rollouts", type=int, help="default 384 on a CPU, 48 with --model, 64 on a GPU")
    parser.add_argument("--longest", type=int, default=4096, help="tokens of a sequence on a GPU")
    parser.add_argument(
        "--micro-batch-tokens", type=int, help="on a GPU (default: what its memory holds); the demo's own on a CPU"
    )
    parser.add_argument(
        "--without", nargs="+", default=(), metavar="NAME", help="leaves out contenders whose names begin so"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default 1)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if args.model and (args.device == "cuda" or not (args.model / "config.json").is_file()):
        parser.error(f"--model takes a transformers folder, and a CPU; got {str(args.model)!r} on {args.device}")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        work, tokenizer = recorded(args.rollouts or (48 if args.model else 384), args.model, args.dtype)
        rows, name = (96, 384), "step_cpu"
        if args.model:
            rows, name = (len(work.samples),), f"step_cpu_{folder_name(args.model, args.dtype)}"
    else:
        memory = torch.cuda.get_device_properties(0).total_memory
        tokens, rows = fitting(args.shape, memory, args.longest)
        tokens = args.micro_batch_tokens or tokens
        work, tokenizer = random_work(args.shape, args.rollouts or 64, args.longest, tokens)
        name = f"step_cuda_{args.shape}"
    everyone = candidates(work, tokenizer, rows)
    if args.model:  # each keeps weights, gradients and moments: 16 bytes a parameter
        everyone = [c for c in everyone if c.name == "amft-fast" or c.name.startswith(MAIN)]
    everyone = [c for c in everyone if not c.name.startswith(tuple(args.without))]
    if not everyone:
        parser.error("--without leaves nobody")
    peak = peak_flops(torch.device(args.device), work.dtype)
    facts = {
        "benchmark": "step",
        "environment": environment(args.device, MEASURED) | {"load_average": os.getloadavg()[0]},
        "dtype": str(work.dtype).removeprefix("torch."),
        "shape": args.model.resolve().name if args.model else "demo" if args.device == "cpu" else args.shape,
        "rollouts": len(work.samples),
        "flat": work.flat,
        "tokens": work.tokens,
        "trained_tokens": work.trained,
        "micro_batch_tokens": work.max_tokens,
        "rounds": args.rounds,
    }

    def written() -> dict:
        rows = rows_of(everyone, work, peak)
        result = facts | {"rows": rows, "times_faster": {k: times_faster(rows, k) for k in ("TRL", "transformers")}}
        write_json(args.out / f"{name}.json", result)
        return result

    def log(text: str) -> None:
        print(text, file=sys.stderr)
        written()

    check(everyone, work, log)
    measure(everyone, work, args.rounds, log)
    if not args.model and not args.without:
        facts["by_flat_share"] = by_flat_share(work, args.rounds)
    if args.model:
        facts["drawing_s"] = drawing(work, min(args.rounds, 2))
        facts["whole_step"] = whole_step(facts["drawing_s"], rows_of(everyone, work, peak))
    result = written()
    load, result_rows = facts["environment"]["load_average"], result["rows"]
    if any("ms" in r for r in result_rows):
        with contextlib.suppress(ImportError):  # a GPU machine may have no matplotlib
            picture(result, args.out / f"{name}.png")
    words = f"{len(work.samples)} rollouts, {work.flat:.0%} of them in groups that teach nothing, "
    words += f"{work.tokens:,} tokens of which {work.trained:,} trained, load {load:.1f}"
    print(f"{result['environment']['device']}, {words}\n\n{table(result_rows)}\n")
    if "by_flat_share" in facts:
        print(flat_table(facts["by_flat_share"]) + "\n")
    if args.model:
        print(", ".join(f"rollouts by {way} {s:.1f} s" for way, s in facts["drawing_s"].items()))
        for rival, ratio in facts["whole_step"].items():
            print(
                f"{rival}, rollouts by generate: "
                + (f"our step is {ratio:.2f} times as fast" if ratio else "not measured")
            )
    for rival, ratio in result["times_faster"].items():
        print(f"{rival}: " + ("not measured" if ratio is None else f"ours is {ratio:.2f} times as fast as its best"))
    return 1 if any("ms" not in r for r in result_rows if r["name"].startswith("amft")) else 0


if __name__ == "__main__":
    raise SystemExit(main())
