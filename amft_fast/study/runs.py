"""One run of a study, as its files tell it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from amft_fast.study.stats import area_under_curve


def read_run(folder: Path, budget: float) -> dict[str, Any]:
    """The figures of one finished run: summary, curve of scheduled evaluations, path of μ, entropy at the end."""
    summary = json.loads((folder / "summary.json").read_text())
    evals = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    split = "test" if all("test" in e for e in evals) else "val"
    # The full evaluations at the start and the end take other prompts than the scheduled ones: one curve must not mix them.
    scheduled = [e for e in evals if split in e and not e["full"]]
    points = scheduled if len(scheduled) > 1 else [e for e in evals if split in e]
    curve = [(e["tokens"], e[split]["sampled"]) for e in points]
    spent, path = 0, []
    for s in steps:
        spent += s["tokens"]
        if s["phase"] == "train":
            path.append((spent, s["mu"]))
    entropies = [s["entropy"] for s in steps if s.get("entropy") is not None]
    tail = entropies[-max(len(entropies) // 10, 1) :]
    controller = [s.get("time/utility", 0.0) for s in steps]
    return {
        "summary": summary,
        "curve": curve,
        "curve_split": split,
        "auc": area_under_curve(curve, budget),
        "mu_path": path,
        "entropy": sum(tail) / len(tail) if tail else None,
        "utility_share": sum(controller) / max(sum(s["seconds"] for s in steps), 1e-9),
    }
