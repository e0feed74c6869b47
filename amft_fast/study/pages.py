"""The pages of a study: compare.json, compare.md, compare.png and compare.html, made from finished runs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from amft_fast.errors import UserError
from amft_fast.report.charts import LIGHT, Line, line_chart
from amft_fast.study.runs import read_run
from amft_fast.study.stats import interval
from amft_fast.study.tables import Table, page

NOTES = (
    "Means over seeds; ± is the half-width of the 95 % interval of the mean (Student's t). Success is in percent: greedy "
    "decoding, the mean of sampled answers, and pass@k.",
    "Equal compute: every run ends when it has used the same number of tokens, sampled and trained on, the controller's own "
    "included. Wall time is that of one CPU thread beside others.",
    "AUC: mean sampled success over the compute spent (area under the success-against-compute curve), from the evaluations "
    "on the schedule.",
)


def write_comparison(out: Path, config: str, runs: list[tuple[str, int, Path]], budget: int) -> str:
    """Writes the study's files under `out`; returns the Markdown table."""
    if not runs:
        raise UserError(f"no run under {out} has finished; the logs are in its folders")
    labels = list(dict.fromkeys(label for label, _, _ in runs))
    data = {label: [read_run(f, budget) for name, _, f in runs if name == label] for label in labels}
    success = table(data)
    figures = {
        label: [{k: v for k, v in r.items() if k not in ("curve", "mu_path")} for r in data[label]] for label in labels
    }
    (out / "compare.json").write_text(json.dumps({"config": config, "budget": budget, "runs": figures}, indent=1))
    text = success.markdown()
    notes = "\n".join(f"- {note}" for note in NOTES)
    (out / "compare.md").write_text(f"# {config}, {budget:,} tokens a run\n\n{text}\n\n{notes}\n")
    write_picture(data, budget, out / "compare.png")
    sentence = f"{len(labels)} methods, {len(runs)} runs, {budget:,} tokens each."
    (out / "compare.html").write_text(page("comparison", config, sentence, [success], NOTES, plots(data)))
    return f"{text}\n\n{out / 'compare.html'}"


def table(data: dict[str, list[dict[str, Any]]]) -> Table:
    """One row a method."""
    first = next(iter(data.values()))[0]["summary"]
    splits = [s for s in ("test", "ood", "train") if s in first["end"]]
    k = first["end"][splits[0]]["k"]
    head = ["method", "seeds"]
    head += [f"{s} {f}" for s in splits for f in ("greedy", "sampled", f"pass@{k}")]
    head += ["AUC", "entropy", "μ first → last", "Mtokens", "wall s", "meta %"]
    rows = []
    for label, runs in data.items():
        row = [label, str(len(runs))]
        for s in splits:
            row += [_percent([r["summary"]["end"][s][f] for r in runs]) for f in ("greedy", "sampled", "pass_at_k")]
        row.append(_percent([r["auc"] for r in runs]))
        entropies = [r["entropy"] for r in runs if r["entropy"] is not None]
        row.append(f"{sum(entropies) / len(entropies):.2f}" if entropies else "–")
        first_mu, last_mu = (sum(r["summary"][n] for r in runs) / len(runs) for n in ("mu_first", "mu_last"))
        row.append(f"{first_mu:.2f} → {last_mu:.2f}")
        row.append(f"{sum(r['summary']['tokens'] for r in runs) / len(runs) / 1e6:.2f}")
        row.append(f"{sum(r['summary']['wall_s'] for r in runs) / len(runs):.0f}")
        row.append(f"{100 * sum(r['utility_share'] for r in runs) / len(runs):.1f}")
        rows.append(row)
    return Table("Success at equal compute", head, rows)


def _percent(values: list[float]) -> str:
    mean, half = interval(values)
    return f"{100 * mean:.1f}" + (f" ± {100 * half:.1f}" if half == half else "")


def mean_curve(curves: list[list[tuple[float, float]]], points: int = 60) -> tuple[list[float], list[float]]:
    """The mean of several (x, y) curves on a common grid, by linear interpolation."""
    import numpy as np

    low, high = max(c[0][0] for c in curves), min(c[-1][0] for c in curves)
    grid = np.linspace(low, high, points)
    ys = [np.interp(grid, [x for x, _ in c], [y for _, y in c]) for c in curves]
    return grid.tolist(), np.mean(ys, axis=0).tolist()


def _lines(data: dict[str, list[dict[str, Any]]], key: str) -> list[Line]:
    out = []
    for i, (label, runs) in enumerate(data.items()):
        curves = [r[key] for r in runs if len(r[key]) > 1]
        if curves:
            xs, ys = mean_curve(curves)
            style = "solid" if i < len(LIGHT) else "dashed"
            out.append(Line(label, [x / 1e6 for x in xs], ys, colour=i % len(LIGHT), style=style))
    return out


def plots(data: dict[str, list[dict[str, Any]]]) -> Markup:
    split = next(iter(data.values()))[0]["curve_split"]
    note = "Against tokens (millions), mean over seeds."
    success = line_chart(f"Sampled success on {split}", _lines(data, "curve"), note, percent=True, log=False)
    paths = line_chart("Mixing weight μ", _lines(data, "mu_path"), note, log=False)
    return success + paths


def write_picture(data: dict[str, list[dict[str, Any]]], budget: float, path: Path) -> None:
    """Success against compute and the paths of μ, side by side, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(10.5, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(fig)
    left, right = fig.subplots(1, 2)
    split = next(iter(data.values()))[0]["curve_split"]
    for ax, key, title, scale in (
        (left, "curve", f"Sampled success on {split} (%)", 100),
        (right, "mu_path", "Mixing weight μ", 1),
    ):
        for line in _lines(data, key):
            style = "-" if line.style == "solid" else "--"
            ax.plot(
                line.xs, [scale * y for y in line.ys], style, color=LIGHT[line.colour], label=line.name, linewidth=1.6
            )
        ax.set_title(title, loc="left", fontsize=10, fontweight="bold")
        ax.set_xlabel("tokens sampled and trained on (millions)", fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        ax.tick_params(labelsize=8)
    right.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.savefig(path, metadata={"Software": None})
