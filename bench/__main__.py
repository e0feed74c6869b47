"""`python -m bench NAME [...]`: runs one benchmark; `python -m bench NAME --help` shows its options."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "loss-head": ("bench.loss_head", "the fused loss head against eager, torch.compile and other libraries"),
    "probe": ("bench.probe", "multi_tensor_dot against torch's own ways to the same numbers"),
    "controller": ("bench.controller", "what learning mu costs: steps of amft against steps of fixed mu"),
    "designs": ("bench.designs", "the controller's rules played on recorded regimes, a hundred designs a minute"),
    "step": ("bench.step", "one update on recorded rollouts against TRL and an eager loop"),
    "scaling": ("bench.scaling", "an update's cost against length, group size, vocabulary and ranks"),
    "compile-gate": ("bench.compile_gate", "every Triton configuration compiled for GPUs that are not here"),
    "weight-sync": ("bench.weight_sync", "new weights into a running vLLM, in place, against a reload from disk"),
    "rollout": ("bench.rollout", "tokens per second of vLLM against transformers"),
    "reward": ("bench.reward", "the maths reward against math-verify, verl's and lm-eval's scorers"),
    "gym": ("bench.gym", "two steps on each task of reasoning-gym: which run, and which have demonstrations"),
    "simulate": ("bench.simulate", "a run on 8 to 1,024 GPUs, modelled: idle shares, best split, what grows first"),
    "stale": ("bench.stale", "what rollouts drawn ahead cost in learning: success at equal tokens by their age"),
    "ahead": ("bench.ahead", "what rollouts drawn ahead bring in time, with real vLLM servers in the background"),
    "machine": ("bench.machine", "what the device does at best: a large product and a copy"),
    "head-pieces": ("bench.head_pieces", "the loss head's products and its row kernel, each by itself"),
    "gpu": ("bench.gpu", "everything that needs a GPU, in under ten minutes, a process each"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The benchmark's exit code; 2 when there is none of that name."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in BENCHMARKS:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is loaded; its profiler talks otherwise
        return importlib.import_module(BENCHMARKS[name][0]).main(rest)
    listing = "\n".join(f"  {known:<14}{words}" for known, (_, words) in BENCHMARKS.items())
    usage = f"usage: python -m bench NAME [options]\n{listing}"
    if name in ("-h", "--help"):
        print(usage)
        return 0
    if name:
        close = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f": did you mean {close[0]!r}?" if close else ""
        print(f"bench: there is no benchmark {name!r}{hint}", file=sys.stderr)
    print(usage, file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
