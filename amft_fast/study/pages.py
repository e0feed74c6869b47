"""The pages of a study: compare.json, compare.md, compare.png and compare.html, made from finished runs alone."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from amft_fast.errors import UserError
from amft_fast.report.charts import LIGHT, Line, line_chart
from amft_fast.run.writers import plain, replace_bytes, replace_text
from amft_fast.study.runs import read_run
from amft_fast.study.stages import Scores, Seeds, Standing, best
from amft_fast.study.stats import Difference, interval, paired, reported_split
from amft_fast.study.sweep import Chosen, Sweep
from amft_fast.study.tables import Table
from amft_fast.study.tables import page as html

NOTES = (
    "Means over seeds; ± is the half-width of the 95 % interval of the mean (Student's t). Success is in percent: greedy "
    "decoding, the mean of sampled answers, and pass@k.",
    "Equal compute: every run ends when it has used the same number of tokens, sampled and trained on, the controller's own "
    "included. Wall time is that of one CPU thread beside others.",
    "AUC: mean sampled success over the compute spent (area under the success-against-compute curve), from the evaluations "
    "on the schedule.",
)


Runs = dict[str, list[dict[str, Any]]]  # by method, as read_run gives them


@dataclass(frozen=True)
class Page:
    """What a study's pages say beside its runs: config, tokens a run, seeds and where they stand, the sweep."""

    config: str
    budget: int
    seeds: Seeds
    standing: Standing
    sweep: Sweep | None
    chosen: Chosen


def write_comparison(out: Path, page: Page, runs: Sequence[tuple[str, Path]]) -> str:
    """Writes the study's files under `out`, each whole; returns the Markdown tables."""
    if not runs:
        raise UserError(f"no run under {out} has finished; the logs are in its folders")
    labels = list(dict.fromkeys(label for label, _ in runs))
    data = {label: [read_run(f, page.budget) for name, f in runs if name == label] for label in labels}
    baseline = page.seeds.baseline if page.seeds.baseline in data else best(scores(data, main_split(data), "sampled"))
    found = differences(data, baseline)
    tables = [success_table(data, page)]
    if found:
        tables.append(difference_table(data, baseline, found))
    if page.chosen.figures:
        tables.append(sweep_table(page.sweep, page.chosen))
    notes = [*NOTES, *stage_notes(page, main_split(data))]
    figures = {
        label: [{k: v for k, v in r.items() if k not in ("curve", "mu_path")} for r in data[label]] for label in labels
    }
    record = {"config": page.config, "budget": page.budget, "runs": figures, "baseline": baseline, "differences": found}
    record["stopped"] = {label: {"best": top, **_difference(d)} for label, (top, d) in page.standing.stopped.items()}
    record["cut"] = page.standing.cut
    if page.sweep is not None:
        record["sweep"] = page.chosen.as_json(page.sweep)
    replace_text(out / "compare.json", json.dumps(plain(record), indent=1))
    text = "\n\n".join(f"## {t.title}\n\n{t.markdown()}" for t in tables)
    listed = "\n".join(f"- {note}" for note in notes)
    replace_text(out / "compare.md", f"# {page.config}, {page.budget:,} tokens a run\n\n{text}\n\n{listed}\n")
    write_picture(data, found, baseline, out / "compare.png")
    sentence = f"{len(labels)} methods, {len(runs)} runs, {page.budget:,} tokens each."
    replace_text(out / "compare.html", html("comparison", page.config, sentence, tables, notes, plots(data)))
    return f"{text}\n\n{out / 'compare.html'}"


def main_split(data: Runs) -> str:
    return reported_split(next(iter(data.values()))[0]["summary"]["end"])


def splits_shown(data: Runs) -> list[str]:
    """The splits that the tables show, of those evaluated at the end."""
    end = next(iter(data.values()))[0]["summary"]["end"]
    return list(dict.fromkeys([reported_split(end), *(s for s in ("test", "ood", "train") if s in end)]))


def scores(data: Runs, split: str, figure: str) -> Scores:
    """A figure of the evaluation at the end, by method and seed."""
    return {
        label: {r["summary"]["seed"]: r["summary"]["end"][split][figure] for r in runs} for label, runs in data.items()
    }


def success_table(data: Runs, page: Page) -> Table:
    """One row a method."""
    splits = splits_shown(data)
    k = next(iter(data.values()))[0]["summary"]["end"][splits[0]]["k"]
    head = ["method", "seeds"]
    head += [page.sweep.setting] if page.sweep else []
    head += [f"{s} {f}" for s in splits for f in ("greedy", "sampled", f"pass@{k}")]
    head += ["AUC", "entropy", "μ first → last", "Mtokens", "wall s", "meta %"]
    rows = []
    for label, runs in data.items():
        row = [label, str(len(runs))]
        row += [page.chosen.value.get(label, "its own")] if page.sweep else []
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


FIGURES = ("sampled", "greedy")


def differences(data: Runs, baseline: str) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """`{method: {split: {figure: difference}}}` to the baseline, paired by seed, in shares of 1; methods without a seed of the
    baseline's are left out."""
    out: dict[str, Any] = {}
    for split in (s for s in splits_shown(data) if s in (main_split(data), "ood")):
        for figure in FIGURES:
            by_seed = scores(data, split, figure)
            for label in data:
                if label != baseline and by_seed[label].keys() & by_seed[baseline].keys():
                    found = paired(by_seed[label], by_seed[baseline])
                    out.setdefault(label, {}).setdefault(split, {})[figure] = _difference(found)
    return out


def _difference(found: Difference) -> dict[str, float]:
    return {"seeds": found.seeds, "mean": found.mean, "half": found.half}


def difference_table(data: Runs, baseline: str, found: dict[str, Any]) -> Table:
    """One row a method, the best first, in points."""
    split = main_split(data)
    ranked = sorted(found, key=lambda label: -found[label][split]["sampled"]["mean"])
    shown = list(next(iter(found.values()), {}))
    head = ["method", "seeds in common", *(f"{s} {f}" for s in shown for f in FIGURES)]
    rows = [
        [
            label,
            str(found[label][split]["sampled"]["seeds"]),
            *(points(found[label][s][f]["mean"], found[label][s][f]["half"]) for s in shown for f in FIGURES),
        ]
        for label in ranked
    ]
    return Table(f"Difference to {baseline} in points, paired by seed", head, rows)


def sweep_table(sweep: Sweep, chosen: Chosen) -> Table:
    """Success on val by value, the chosen one marked."""
    rows = []
    for label, figures in chosen.figures.items():
        cells = []
        for value in sweep.values:
            cell = figures.get(value)
            text = "failed" if cell is None else f"{100 * cell['sampled']:.1f} ({100 * cell['greedy']:.1f})"
            cells.append(text + " *" * (chosen.value[label] == value))
        rows.append([label, *cells])
    return Table(f"The sweep of {sweep.setting}: val sampled (greedy)", ("method", *sweep.values), rows)


def stage_notes(page: Page, split: str) -> list[str]:
    """What was decided on the way, in sentences."""
    seeds, notes = page.seeds, []
    if page.chosen.figures:
        notes.append(
            f"The sweep: one run a value with seed 0 and {page.sweep.share:g} times the tokens; * marks the best by success on "
            "val at its end, sampled, then greedy. The runs of the study have that value."
        )
    for label, (top, d) in page.standing.stopped.items():
        notes.append(
            f"{label} was stopped after {d.seeds} seeds: {points(d.mean, d.half)} points ({split} sampled, paired by seed) "
            f"against {top}, the best then, its whole interval below −{seeds.stop_behind:g}"
            + (" (spread of all methods together)." if d.seeds == 2 else ".")
        )
    if page.standing.cut:
        notes.append(
            f"After {seeds.first} seeds the {seeds.finalists} ahead"
            + (f" and the baseline {seeds.baseline}" if seeds.baseline else "")
            + f" went on to {seeds.last}; not {', '.join(page.standing.cut)}."
        )
    return notes


def points(mean: float, half: float) -> str:
    """A difference of shares in points, with its interval where there is one."""
    return f"{100 * mean:+.1f}".replace("-", "−") + (f" ± {100 * half:.1f}" if half == half else "")


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


def _lines(data: Runs, key: str) -> list[Line]:
    out = []
    for i, (label, runs) in enumerate(data.items()):
        curves = [r[key] for r in runs if len(r[key]) > 1]
        if curves:
            xs, ys = mean_curve(curves)
            style = "solid" if i < len(LIGHT) else "dashed"
            out.append(Line(label, [x / 1e6 for x in xs], ys, colour=i % len(LIGHT), style=style))
    return out


def plots(data: Runs) -> Markup:
    split = next(iter(data.values()))[0]["curve_split"]
    note = "Against tokens (millions), mean over seeds."
    success = line_chart(f"Sampled success on {split}", _lines(data, "curve"), note, percent=True, log=False)
    paths = line_chart("Mixing weight μ", _lines(data, "mu_path"), note, log=False)
    return success + paths


def write_picture(data: Runs, found: dict[str, Any], baseline: str, path: Path) -> None:
    """Success against compute, the paths of μ, and the differences to the baseline, side by side, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(17, max(4.2, 0.3 * len(data))), dpi=130, layout="constrained")
    FigureCanvasAgg(fig)
    left, right, last = fig.subplots(1, 3)
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
        plain_axes(ax, title, "tokens sampled and trained on (millions)")
    right.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    if found:
        _draw_differences(last, data, found)
    below = textwrap.fill(f"against {baseline}, paired by seed, 95 % intervals", 60)
    plain_axes(last, f"{main_split(data)}, sampled: difference in points", below)
    save_picture(fig, path)


def save_picture(fig: Any, path: Path) -> None:
    """Writes a figure as a PNG: whole or not at all, and the same bytes for the same figure."""
    held = io.BytesIO()
    fig.savefig(held, format="png", metadata={"Software": None})
    replace_bytes(path, held.getvalue())


def _draw_differences(ax: Any, data: Runs, found: dict[str, Any]) -> None:
    split = main_split(data)
    ranked = sorted(found, key=lambda label: found[label][split]["sampled"]["mean"])
    ds = [found[label][split]["sampled"] for label in ranked]
    halves = [100 * d["half"] if d["half"] == d["half"] else 0.0 for d in ds]
    ax.errorbar([100 * d["mean"] for d in ds], range(len(ds)), xerr=halves, fmt="o", color=LIGHT[1], ms=4, lw=1.4)
    ax.axvline(0, color=LIGHT[0], linewidth=0.8)
    ax.set_yticks(range(len(ds)), [label.replace("$", r"\$") for label in ranked])


def plain_axes(ax: Any, title: str, below: str) -> None:
    ax.set_title(title.replace("$", r"\$"), loc="left", fontsize=10, fontweight="bold")
    ax.set_xlabel(below, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    ax.tick_params(labelsize=8)
