"""What rollouts drawn ahead bring in time: seconds a step with real vLLM servers in the background, by depth.

Answers have a long tail: a random model ends one at each token with the chance of one word in its vocabulary, so lengths are
geometric (a mean of about the vocabulary's size, cut at `--longest`). The trainer and each server have a thread of their own.
What the age of rollouts costs in learning is `bench stale`'s question.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.results import RESULTS, environment, markdown_table, write_json

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "configs" / "demo_base"  # whose tokenizer the random model has
FIRST = 3  # steps that are not counted: until there are rollouts ahead


def make_model(folder: Path, hidden: int, layers: int, longest: int) -> None:
    """A random model of this size with the demo's words, all of which are about as likely."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    config = AutoConfig.from_pretrained(BASE)
    config.update(
        {
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "layer_types": ["full_attention"] * layers,
            "num_attention_heads": hidden // 32,
            "num_key_value_heads": hidden // 32,
            "head_dim": 32,
            "max_position_embeddings": 2 * longest,
        }
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.model_max_length = 2 * longest
    tokenizer.save_pretrained(folder)


def run(args: argparse.Namespace, model: Path, folder: Path, depth: int, in_flight: bool) -> dict[str, Any]:
    """One run of the trainer; means over its steps, without the first ones."""
    settings = {
        "run.dir": folder,
        "run.threads": 1,
        "run.device": "cpu",
        "model.path": model,
        "train.method": "rl",
        "train.steps": args.steps + FIRST,
        "train.prompts_per_step": args.prompts,
        "train.skip_flat": "false",  # nothing is ever right: without this no rollout would be trained on
        "train.micro_batch_tokens": 4096,
        "rollout.max_new_tokens": args.longest,
        "rollout.engine": "vllm",
        "rollout.vllm.mode": "server",
        "rollout.vllm.num_servers": args.servers,
        "rollout.vllm.python": args.vllm_python,
        "rollout.async_steps": depth,
        "rollout.in_flight": str(in_flight).lower(),
        "eval.splits": "[]",
        "eval.every": 0,
        "checkpoint.every": 0,
        "checkpoint.keep_best": "false",
        "checkpoint.export": "false",
        "log.to": "[]",
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "amft_fast", "train", str(ROOT / "configs" / "demo.toml"), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"depth {depth}: {(done.stderr or done.stdout)[-600:]}")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][FIRST:]

    def mean(name: str) -> float:
        return fmean(s.get(name, 0.0) for s in steps)

    return {
        "depth": depth,
        "in_flight": in_flight,
        "seconds": mean("seconds"),
        "waiting": mean("time/rollout"),
        "update": mean("time/update"),
        "sync": mean("time/sync"),
        "age": mean("staleness_mean"),
        "tokens": mean("tokens_sampled"),
        "longest": max(s["response_length"] for s in steps),
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = [
        "steps ahead",
        "s a step",
        "of synchronous",
        "waiting for rollouts",
        "update",
        "sync",
        "mean age",
        "tokens a step",
    ]
    cells = [
        [
            f"{r['depth']}{', in flight' if r['in_flight'] else ''}",
            f"{r['seconds']:.2f}",
            f"{r['seconds'] / rows[0]['seconds']:.2f}",
            *(f"{r[name]:.2f}" for name in ("waiting", "update", "sync", "age")),
            f"{r['tokens']:,.0f}",
        ]
        for r in rows
    ]
    return markdown_table(head, cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench ahead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", default=str(ROOT / ".venv-vllm/bin/python"), help="(default %(default)s)")
    parser.add_argument("--depths", default="0,1,2,4", help="steps ahead (default %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help=f"counted, after {FIRST} others (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=12, help="a step, with 8 answers each (default %(default)s)")
    parser.add_argument("--longest", type=int, default=400, help="tokens of an answer (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file (default bench/results/ahead_cpu.json)")
    args = parser.parse_args(argv)
    if not Path(args.vllm_python).exists():
        print(
            f"bench ahead: --vllm-python: there is no {args.vllm_python}; make test-integration makes one",
            file=sys.stderr,
        )
        return 2
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder / "model", args.hidden, args.layers, args.longest)
        for depth in map(int, args.depths.split(",")):
            for in_flight in (False, True) if depth else (False,):
                rows.append(run(args, folder / "model", folder / f"run-{depth}-{in_flight}", depth, in_flight))
                print(rows[-1], flush=True)
    print("\n" + table(rows))
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "vllm_python")}
    measured = ["amft_fast", "kernels", "csrc", "bench"]
    result = {"benchmark": "ahead", **environment("cpu", measured), "settings": settings, "rows": rows}
    write_json(args.out or RESULTS / "ahead_cpu.json", result)
    return 0
