"""New weights into a running vLLM: in place, in packed buckets, against a tensor at a time and against a reload from disk.

The engine is a colocated one (and, with --server, a server of its own over HTTP). The check that comes first: greedy tokens
after a sync are the trainer's. `link` is what the bare transport moves: one broadcast of all bytes as one buffer on the same
kind of group, here over gloo on a CPU. On a GPU the same command takes ipc.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from amft_fast.config import VllmConfig
from amft_fast.interfaces import Request, Sampling
from amft_fast.rollout import vllm
from amft_fast.rollout.transformers import TransformersEngine
from amft_fast.rollout.vllm.channels import broadcast, gloo_group
from amft_fast.rollout.vllm.colocated import ColocatedEngine
from amft_fast.rollout.vllm.setup import Setup
from bench.results import markdown_table, mib, prepare_vllm, write_rows

MEASURED = ("amft_fast/rollout", "bench/weight_sync.py")
# hidden, layers, heads, intermediate, vocabulary of the Qwen3 that is measured beside the demo's
SIZES = {"15M": (256, 6, 4, 768, 32_000), "60M": (512, 10, 8, 1536, 32_000)}
BUCKETS = (1 << 16, 1 << 20, 1 << 24, 1 << 28)


def make_model(name: str, folder: Path, device: str) -> tuple[torch.nn.Module, str]:
    """(model, its checkpoint folder): the demo's, or a random one of a size of SIZES."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    path = "configs/demo_base"
    if name != "demo":
        hidden, layers, heads, intermediate, vocabulary = SIZES[name]
        config = Qwen3Config(
            vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads // 2, head_dim=64, intermediate_size=intermediate, max_position_embeddings=512,
            tie_word_embeddings=True, eos_token_id=2, pad_token_id=0, bos_token_id=1,
        )  # fmt: skip
        torch.manual_seed(0)
        path = str(folder / name)
        Qwen3ForCausalLM(config).to(dtype).save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval(), path


def named(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((n, p.detach()) for n, p in model.named_parameters())


def greedy_agrees(engine, model: torch.nn.Module) -> bool:
    """Whether the engine's greedy tokens are the trainer's."""
    asked = [Request((1, 5 + i, 9, 30 + i), i, 16) for i in range(8)]
    sampling = Sampling(0.0, stop_token_ids=(2,))
    a, b = engine.generate(asked, sampling), TransformersEngine(model).generate(asked, sampling)
    return [c.token_ids for c in a] == [c.token_ids for c in b]


def milliseconds(call: Callable[[], None], rounds: int) -> tuple[float, float, float]:
    """Median, least and largest of `rounds` calls, after one that warms up."""
    call()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times), min(times), max(times)


def link_ms(nbytes: int, rounds: int) -> float:
    """One broadcast of all bytes at once between two ranks of a gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        path, groups = f"{folder}/store", {}

        def join(rank: int) -> None:
            groups[rank] = gloo_group(dist.FileStore(path, 2), "127.0.0.1", rank, 2, 60.0)

        both(join)
        buffers = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(2)]
        return milliseconds(lambda: both(lambda rank: broadcast(groups[rank], buffers[rank]).wait()), rounds)[1]


def both(call: Callable[[int], object]) -> None:
    """The call for rank 0 here and for rank 1 in a thread."""
    thread = threading.Thread(target=call, args=(1,))
    thread.start()
    call(0)
    thread.join()


def from_disk(engine, model: torch.nn.Module, path: Path) -> None:
    """What a trainer without a transfer does: write a file, let vLLM read it and reload."""
    from safetensors.torch import load_file, save_file

    save_file({n: t.contiguous().clone() for n, t in engine.wire.stream(named(model))}, path)
    engine.target.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": load_file(path).items()})
    engine.target.reset_caches()


def setup(model: torch.nn.Module, path: str, device: str, folder: Path, mode: str, bucket: int) -> Setup:
    cfg = VllmConfig(mode=mode, bucket_bytes=bucket, sleep=False, devices=["0"] if device == "cuda" else [])
    if mode == "server" and device == "cuda":
        cfg = cfg.model_copy(update={"backend": "ipc"})  # on the trainer's own GPU
    return Setup(cfg, model, path, torch.device(device), folder, weights=lambda: named(model))


def measure(name: str, device: str, mode: str, rounds: int, folder: Path) -> dict[str, object]:
    """All ways for one model. Raises SystemExit when a check is red: then nothing is worth a figure."""
    model, path = make_model(name, folder, device)
    plan = setup(model, path, device, folder, mode, BUCKETS[-1])
    engine = vllm.make(plan)
    version = 0
    nbytes = sum(s.nbytes for s in engine.wire.specs)
    rows = []

    def sync() -> None:
        nonlocal version
        version += 1
        engine.sync(named(model), version)

    def row(way: str, bucket: int | None, call: Callable[[], None]) -> None:
        median, least, most = milliseconds(call, rounds)
        if not greedy_agrees(engine, model):
            raise SystemExit(f"red: after {way} the engine does not draw the trainer's greedy tokens; no figures")
        rows.append(
            {"way": way, "bucket_bytes": bucket, "ms": median, "ms_min": least, "ms_max": most}
            | {"gb_per_s": nbytes / median / 1e6}
        )

    try:
        sync()
        for bucket in BUCKETS:
            if bucket <= max(nbytes, BUCKETS[0]) * 4:
                plan.cfg = plan.cfg.model_copy(update={"bucket_bytes": bucket})
                sync_channel(engine).close()
                row(f"{plan.backend}, in place", bucket, sync)
        plan.cfg = plan.cfg.model_copy(update={"bucket_bytes": 1 << 10 if plan.backend == "ipc" else 1})
        sync_channel(engine).close()
        row(f"{plan.backend}, a tensor at a time", None, sync)
        if mode == "colocate" and device == "cpu":
            with torch.no_grad():
                row("through a file", None, lambda: from_disk(engine, model, folder / "weights.safetensors"))
    finally:
        engine.close()
    link = link_ms(nbytes, rounds) if device == "cpu" else None
    for r in rows:
        r["share_of_link"] = None if link is None else link / r["ms"]
    return {
        "model": name,
        "mode": mode,
        "tensors": len(engine.wire.specs),
        "bytes": nbytes,
        "link_ms": link,
        "rows": rows,
    }


def sync_channel(engine):
    return engine.sync_weights if isinstance(engine, ColocatedEngine) else engine.weight_sync


def table(results: list[dict]) -> str:
    rows = [
        [
            f"{r['model']}, {r['mode']}: {row['way']}",
            mib(r["bytes"]),
            "–" if row["bucket_bytes"] is None else mib(row["bucket_bytes"]),
            f"{row['ms']:.1f}",
            f"{row['ms_min']:.1f}",
            f"{row['gb_per_s']:.3f}",
            "–" if row["share_of_link"] is None else f"{100 * row['share_of_link']:.1f}",
        ]
        for r in results
        for row in r["rows"]
    ]
    return markdown_table(["way", "weights", "bucket", "ms", "least", "GB/s", "% of link"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when a check is red (then nothing is written)."""
    parser = argparse.ArgumentParser(prog="python -m bench weight-sync", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default="demo,15M,60M", help="of demo, 15M, 60M (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--server", action="store_true", help="over HTTP as well, with a server of its own")
    parser.add_argument("--out", type=Path, default=None, help="default bench/results/weight_sync_DEVICE.json")
    args = parser.parse_args(argv)
    prepare_vllm(args.device)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for mode in ("colocate", "server") if args.server else ("colocate",):
            for name in args.models.split(","):
                results.append(measure(name, args.device, mode, args.rounds, Path(folder)))
                print(table(results[-1:]), flush=True)
    return write_rows("weight-sync", args, MEASURED, results, table)


if __name__ == "__main__":
    raise SystemExit(main())
