"""Rollout engines side by side: the embedded one, transformers' `generate` and `generate_batch`, and vLLM where it is.

All draw at temperature 1 from the same weights the same number of tokens of the same prompts (no stop token; each request has a
length of its own), several answers to a prompt. Three loads: even (all prompts and answers alike), ragged (both between a
quarter and seven quarters of the mean) and long-tailed (like prompts; a few answers are several times the mean). What comes
first: the engine's greedy tokens are `generate`'s. Sampled tokens count, prompts do not.

On a CPU: one thread, processor time (other work on the machine does not count), ways taking turns; the figure is the median
over rounds, and ratios are of the same round. `overhead` is a decoded token's time in a model of 28 layers of next to no width.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from amft_fast.interfaces import Request, Sampling
from amft_fast.model.convert import DTYPES
from amft_fast.rollout import decoder
from amft_fast.rollout.transformers import TransformersEngine
from bench.results import RESULTS, environment, folder_name, markdown_table, prepare_vllm, write_json

MEASURED = ("amft_fast/rollout", "bench/rollout.py")
# hidden, layers, heads, key heads, intermediate, vocabulary; random weights in the shapes of SmolLM2-135M and Qwen2.5-1.5B.
MODELS = {
    "15M": (256, 6, 4, 2, 768, 32_000),
    "135M": (576, 30, 9, 3, 1536, 49_152),
    "1.5B": (1536, 28, 12, 2, 8960, 151_936),
}
# prompts, answers to each, mean tokens of a prompt, mean tokens of an answer. 1.5B: 512 rows that look at 1000 tokens.
FOLDER_CASE = (6, 8, 72, 25)  # of a model of a folder: a step of configs/smollm2_words.toml
CASES = {"demo": (48, 8, 12, 24), "15M": (4, 8, 64, 32), "135M": (2, 8, 64, 32), "1.5B": (64, 8, 936, 128)}
ON_CPU = ("demo", "15M", "135M")
LOADS = ("even", "ragged", "long-tailed")
GENERATE, PAGED = "transformers generate", "transformers generate_batch"
ENGINE, FORWARD = "engine", "engine by transformers' forward"
PAGE = 32
NARROW = 0.1  # by how much of the logits' spread a first choice may be off in bf16


def make_model(name: str, device: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The demo's model, one of a folder, or a Llama with random weights of one of MODELS."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    if name not in MODELS:
        model = AutoModelForCausalLM.from_pretrained("configs/demo_base" if name == "demo" else name, dtype=dtype)
        model.generation_config.eos_token_id = None
        return model.to(device).eval()
    hidden, layers, heads, key_heads, intermediate, vocabulary = MODELS[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, head_dim=hidden // heads, intermediate_size=intermediate, max_position_embeddings=2048,
        tie_word_embeddings=True, eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def requests(load: str, case: tuple[int, int, int, int], vocabulary: int) -> list[Request]:
    """Prompts of random tokens; lengths by the load, the same on every machine."""
    prompts, answers, mean_prompt, mean_answer = case
    rng = np.random.default_rng(0)
    prompt_lengths, lengths = np.full(prompts, mean_prompt), np.full(prompts * answers, mean_answer)
    if load == "ragged":
        prompt_lengths = _spread(mean_prompt, prompts)
        lengths = rng.permutation(_spread(mean_answer, prompts * answers))
    elif load == "long-tailed":  # an exponential distribution's quantiles
        at = (np.arange(prompts * answers) + 0.5) / (prompts * answers)
        lengths = rng.permutation(np.maximum(1, np.rint(-mean_answer * np.log1p(-at)))).astype(int)
    ids = [tuple(rng.integers(3, vocabulary, n).tolist()) for n in prompt_lengths]
    return [Request(ids[i // answers], i, int(n)) for i, n in enumerate(lengths)]


def _spread(mean: int, count: int) -> np.ndarray:
    """From a quarter to seven quarters of the mean, evenly."""
    return np.rint(mean * np.linspace(0.25, 1.75, count)).astype(int).clip(min=1)


class Lengths:
    """Ends each row of `generate` at its own length."""

    def __init__(self, asked: list[Request], width: int, device: torch.device) -> None:
        self.ends = torch.tensor([width + r.max_new_tokens for r in asked], device=device)

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


def hf_generate(model: torch.nn.Module, asked: list[Request], sample: bool = True) -> list[list[int]]:
    """transformers' own generate on the whole batch: prompts padded on the left, ended rows ride along to the end."""
    from transformers import StoppingCriteriaList

    width, device = max(len(r.prompt_ids) for r in asked), model.device
    ids = torch.zeros(len(asked), width, dtype=torch.long)
    for row, r in zip(ids, asked):
        row[width - len(r.prompt_ids) :] = torch.tensor(r.prompt_ids)
    mask = (torch.arange(width)[None] >= width - torch.tensor([[len(r.prompt_ids)] for r in asked])).long()
    out = model.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        do_sample=sample,
        top_k=0 if sample else None,
        max_new_tokens=max(r.max_new_tokens for r in asked),
        stopping_criteria=StoppingCriteriaList([Lengths(asked, width, device)]),
        pad_token_id=0,
    )
    return [row[width : width + r.max_new_tokens].tolist() for row, r in zip(out, asked)]


def hf_generate_batch(model: torch.nn.Module, asked: list[Request]) -> list[list[int]]:
    """transformers' continuous batching over a paged cache, each request with its own length. Raises what it raises."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    longest = max(r.max_new_tokens for r in asked)
    settings = GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0, max_new_tokens=longest)
    paging = None
    if model.device.type == "cpu":  # it would take its pages from the GPU's memory
        pages = sum(-(-(len(r.prompt_ids) + r.max_new_tokens) // PAGE) + 1 for r in asked)
        paging = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=512)
    with model.continuous_batching_context_manager(
        generation_config=settings, continuous_batching_config=paging, block=True, timeout=5
    ) as manager:
        names = [manager.add_request(list(r.prompt_ids), max_new_tokens=r.max_new_tokens) for r in asked]
        out: dict[str, list[int]] = {}
        while len(out) < len(names):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("generate_batch stopped before it was done")
                continue
            if result.error:
                raise RuntimeError(f"generate_batch: {result.error}")
            if result.is_finished():
                out[result.request_id] = result.generated_tokens
    return [out[name] for name in names]


def engine_tokens(engine, asked: list[Request]) -> list[list[int]]:
    return [c.token_ids for c in engine.generate(asked, Sampling(1.0))]


def by_forward(model: torch.nn.Module) -> TransformersEngine:
    """The embedded engine as it is for models whose layers it does not know."""
    known, decoder.FAMILIES = decoder.FAMILIES, ()
    try:
        engine = TransformersEngine(model)
        engine.explain()
        return engine
    finally:
        decoder.FAMILIES = known


def ways(
    model: torch.nn.Module, device: str, peers: Sequence[str]
) -> dict[str, Callable[[list[Request]], list[list[int]]]]:
    engine, forward, paged = (
        TransformersEngine(model),
        by_forward(model),
        copy.deepcopy(model),
    )  # paged: changes its attention
    all_ways = {
        ENGINE: lambda asked: engine_tokens(engine, asked),
        FORWARD: lambda asked: engine_tokens(forward, asked),
        GENERATE: lambda asked: hf_generate(model, asked),
        PAGED: lambda asked: hf_generate_batch(paged, asked),
    }
    return {name: way for name, way in all_ways.items() if not peers or name in peers}


def greedy_agrees(model: torch.nn.Module, asked: list[Request]) -> bool:
    """Whether the engine's greedy tokens of some short answers are `generate`'s; in a narrow type, whether each is the model's
    own first choice after the tokens before it, up to what rounding may decide."""
    some = [Request(r.prompt_ids, r.seed, min(r.max_new_tokens, 4)) for r in asked[:: max(1, len(asked) // 4)]]
    mine = [c.token_ids for c in TransformersEngine(model).generate(some, Sampling(0.0))]
    if torch.finfo(model.dtype).bits >= 32:
        return mine == hf_generate(model, some, sample=False)
    for r, ids in zip(some, mine):
        whole = torch.tensor([[*r.prompt_ids, *ids]], device=model.device)
        with torch.inference_mode():
            logits = model(whole, logits_to_keep=len(ids) + 1).logits[0, :-1].float()
        behind = logits.amax(-1) - logits.gather(-1, whole[0, -len(ids) :, None])[:, 0]
        if float((behind / logits.std(-1)).max()) > NARROW:
            return False
    return True


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    name: str, load: str, device: str, rounds: int, peers: Sequence[str] = (), dtype: torch.dtype | None = None
) -> dict[str, object]:
    """One model and load. Raises SystemExit when greedy tokens differ."""
    model = make_model(name, device, dtype)
    asked = requests(load, CASES.get(name, FOLDER_CASE), model.config.vocab_size)
    if not greedy_agrees(model, asked):
        raise SystemExit("red: the engine's greedy tokens are not generate's; no figures")
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    candidates = ways(model, device, peers)
    few = [Request(r.prompt_ids, r.seed, 2) for r in asked[:2]]
    for round_ in range(rounds + 1):  # the first one warms up, with two short answers
        for way, run in candidates.items():
            now = asked if round_ else few
            if way in failed:
                continue
            begin = clock(device)
            try:
                out = run(now)
            except Exception as e:
                if way in (ENGINE, FORWARD):
                    raise
                failed[way] = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:200]
                continue
            taken = clock(device) - begin
            if [len(ids) for ids in out] != [r.max_new_tokens for r in now]:
                raise SystemExit(f"red: {way} did not draw the tokens that were asked for; no figures")
            if round_:
                seconds.setdefault(way, []).append(taken)
    tokens = sum(r.max_new_tokens for r in asked)
    rows = {
        way: {
            "tokens_per_s": tokens / statistics.median(taken),
            "seconds": taken,
            "times_generate": statistics.median(g / t for g, t in zip(seconds[GENERATE], taken)),
        }
        for way, taken in seconds.items()
        if GENERATE in seconds
    }
    return {
        "model": Path(name).name,
        "load": load,
        "requests": len(asked),
        "tokens": tokens,
        "ways": rows,
        "failed": failed,
    }


def overhead(device: str, tokens: int = 64) -> dict[str, float]:
    """Milliseconds of processor time for a decoded token of one row, 28 layers of width 16: what is not arithmetic."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=128, hidden_size=16, num_hidden_layers=28, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, max_position_embeddings=512,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(device).eval()
    engines = {ENGINE: TransformersEngine(model), FORWARD: by_forward(model)}
    least = dict.fromkeys(engines, float("inf"))
    for _ in range(5):
        for name, engine in engines.items():
            begin = time.process_time()
            engine.generate([Request((3, 4, 5), 0, tokens)], Sampling(1.0))
            least[name] = min(least[name], 1e3 * (time.process_time() - begin) / tokens)
    return least


def vllm_rows(device: str, rounds: int) -> dict[str, dict]:
    """The colocated vLLM on the even loads, as tokens per second of wall time: its own processes do not count here."""
    from amft_fast.rollout import vllm
    from bench.weight_sync import named, setup

    out = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ON_CPU:
            model = make_model(name, device)
            path = f"{folder}/{name}"
            model.save_pretrained(path)
            engine = vllm.make(setup(model, path, device, Path(folder), "colocate", 1 << 28))
            asked, taken = requests("even", CASES[name], model.config.vocab_size), []
            try:
                engine.sync(named(model), 1)
                for _ in range(rounds + 1):
                    begin = time.perf_counter()
                    engine_tokens(engine, asked)
                    taken.append(time.perf_counter() - begin)
            finally:
                engine.close()
            tokens = sum(r.max_new_tokens for r in asked)
            out[name] = {"tokens_per_s": tokens / statistics.median(taken[1:]), "seconds": taken[1:]}
    return out


def table(results: list[dict]) -> str:
    rows = [
        [
            f"{r['model']}, {r['load']}, {r['tokens']} tokens of {r['requests']} answers: {way}",
            f"{figures['tokens_per_s']:,.0f}",
            f"{figures['times_generate']:.2f}",
        ]
        for r in results
        for way, figures in r["ways"].items()
    ]
    return markdown_table(["rollouts", "tokens/s", "× generate"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when a check is red (then nothing is written)."""
    parser = argparse.ArgumentParser(prog="python -m bench rollout", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default=",".join(ON_CPU), help=f"of {', '.join(CASES)} (default %(default)s)")
    parser.add_argument("--model", type=Path, help="a transformers folder, instead of --models")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default 1)")
    parser.add_argument("--loads", default=",".join(LOADS), help=f"of {', '.join(LOADS)}")
    parser.add_argument("--ways", default="", help="these alone, with commas between; all by default")
    parser.add_argument("--no-overhead", action="store_true", help="without the model of next to no width")
    parser.add_argument("--vllm", action="store_true", help="vLLM too, in an environment that has it")
    parser.add_argument("--out", type=Path, default=None, help="default bench/results/rollout_DEVICE.json")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging

    logging.set_verbosity_error()
    if args.model and not (args.model / "config.json").is_file():
        parser.error(f"--model takes a transformers folder, got {str(args.model)!r}")
    prepare_vllm(args.device)
    torch.set_num_threads(args.threads)
    suffix = f"_{folder_name(args.model, args.dtype)}" if args.model else ""
    out = args.out or RESULTS / f"rollout_{args.device}{suffix}.json"
    result = {
        "benchmark": "rollout",
        **environment(args.device, MEASURED),
        "rounds": args.rounds,
        "threads": args.threads,
    }
    if args.dtype:
        result["dtype"] = args.dtype
    result |= {"clock": "processor time" if args.device == "cpu" else "wall time", "results": []}
    result["overhead_ms_per_token"] = {} if args.no_overhead else overhead(args.device)
    peers = [way for way in args.ways.split(",") if way]
    for name in [str(args.model)] if args.model else args.models.split(","):
        for load in args.loads.split(","):
            result["results"].append(measure(name, load, args.device, args.rounds, peers, DTYPES.get(args.dtype)))
            print(table(result["results"][-1:]), flush=True)
            for way, why in result["results"][-1]["failed"].items():
                print(f"{way}: {why}", flush=True)
            write_json(out, result)
    if args.vllm:
        result["vllm"] = vllm_rows(args.device, args.rounds)
        write_json(out, result)
    print({k: round(v, 2) for k, v in result["overhead_ms_per_token"].items()})
    out.with_suffix(".md").write_text(table(result["results"]) + "\n", encoding="utf-8")
    print(f"written to {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
