"""Studies of several regimes side by side: what each method loses to the best of each, and where it loses most.

`amft-fast regret STUDY STUDY ... --out FOLDER` reads their compare.json alone and writes regret.json, .md, .html and
.png.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amft_fast.errors import UserError
from amft_fast.report.charts import LIGHT
from amft_fast.run.writers import plain, replace_text
from amft_fast.study.pages import plain_axes, points, save_picture
from amft_fast.study.stages import Scores, best, mean
from amft_fast.study.stats import paired, reported_split
from amft_fast.study.tables import Table, page

NOTE = (
    "In points of sampled success at the end, paired by seed with the best method of the regime, ± the half-width of the 95 % "
    "interval (Student's t); — is the best. The best has the highest mean of those with the most seeds, so one with fewer may "
    "stand above it. Ranked by the worst regime; a method that a regime lacks is not ranked, and its cell is blank."
)


@dataclass(frozen=True)
class Regime:
    """One study: its name, the split judged on, and each method's success by seed, as a share of 1."""

    name: str
    config: str
    split: str
    scores: Scores


@dataclass(frozen=True)
class Loss:
    """Of a method in a regime, as a share of 1: the difference to the best, at most 0 but by chance."""

    mean: float
    half: float
    seeds: int


def read_regimes(folders: Sequence[Path]) -> list[Regime]:
    """The studies in these folders, called by the last part of their paths, or by the whole of them where two are alike.

    Raises UserError for a folder without a compare.json that is whole.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"regret: a study is named twice, got {', '.join(names)}")
    return [_regime(name, folder / "compare.json") for name, folder in zip(names, folders)]


def _regime(name: str, path: Path) -> Regime:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        split = reported_split(next(iter(data["runs"].values()))[0]["summary"]["end"])
        scores = {
            label: {r["summary"]["seed"]: r["summary"]["end"][split]["sampled"] for r in runs}
            for label, runs in data["runs"].items()
        }
        return Regime(name, data["config"], split, scores)
    except FileNotFoundError:
        raise UserError(f"regret: no {path}; give folders that `amft-fast compare` has written") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, StopIteration) as e:
        raise UserError(
            f"regret: {path} is no study ({type(e).__name__}: {e}); run its compare command again"
        ) from None


def losses(regime: Regime) -> dict[str, Loss]:
    """Each method's difference to the best of the regime, which has 0; methods without a seed of the best's are left out."""
    top = best(regime.scores)
    out = {top: Loss(0.0, 0.0, len(regime.scores[top]))}
    for label, by_seed in regime.scores.items():
        if label != top and by_seed.keys() & regime.scores[top].keys():
            found = paired(by_seed, regime.scores[top])
            out[label] = Loss(found.mean, found.half, found.seeds)
    return out


def regret(regimes: Sequence[Regime]) -> dict[str, Any]:
    """`ranked`: methods that every regime has, the smallest worst loss first; `unranked`: the others, in the order met;
    `losses` by method and regime; `worst`: (regime, loss) of each method that is ranked; `best` of each regime."""
    by_regime = {regime.name: losses(regime) for regime in regimes}
    met = list(dict.fromkeys(label for found in by_regime.values() for label in found))
    table = {label: {name: found[label] for name, found in by_regime.items() if label in found} for label in met}
    worst = {
        label: min(found.items(), key=lambda entry: entry[1].mean)
        for label, found in table.items()
        if len(found) == len(regimes)
    }
    return {
        "ranked": sorted(worst, key=lambda label: -worst[label][1].mean),
        "unranked": [label for label in met if label not in worst],
        "losses": table,
        "worst": worst,
        "best": {regime.name: best(regime.scores) for regime in regimes},
    }


def regret_table(regimes: Sequence[Regime], found: dict[str, Any]) -> Table:
    """One row a method, those that are ranked first."""

    def cell(label: str, name: str) -> str:
        loss = found["losses"][label].get(name)
        if loss is None:
            return ""
        return "—" if found["best"][name] == label else points(loss.mean, loss.half)

    rows = []
    for rank, label in enumerate(found["ranked"], 1):
        name, loss = found["worst"][label]
        worst = f"{points(loss.mean, loss.half)} ({name})" if loss.mean else "—"
        rows.append([label, str(rank), worst, *(cell(label, r.name) for r in regimes)])
    rows += [[label, "", "", *(cell(label, r.name) for r in regimes)] for label in found["unranked"]]
    return Table("Loss to the best of each regime", ("method", "rank", "worst", *(r.name for r in regimes)), rows)


def regime_table(regimes: Sequence[Regime]) -> Table:
    """What each regime is, and its best."""
    rows = []
    for r in regimes:
        top = best(r.scores)
        rows.append([r.name, r.config, r.split, top, f"{100 * mean(r.scores[top]):.1f}", str(len(r.scores[top]))])
    return Table("Regimes", ("regime", "config", "split", "best", "sampled %", "seeds"), rows)


def write_picture(regimes: Sequence[Regime], found: dict[str, Any], path: Path) -> None:
    """A row a method, the least worst on top, and a point for what it loses in each regime, with its interval as far as it is
    inside the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = [*found["ranked"], *found["unranked"]][::-1]
    fig = Figure(figsize=(8.5, 1.2 + 0.32 * len(labels)), dpi=130, layout="constrained")
    FigureCanvasAgg(fig)
    ax = fig.subplots()
    for i, r in enumerate(regimes):
        shown = [
            (y, found["losses"][label][r.name]) for y, label in enumerate(labels) if r.name in found["losses"][label]
        ]
        places = [y + 0.16 * ((len(regimes) - 1) / 2 - i) for y, _ in shown]
        halves = [100 * loss.half if math.isfinite(loss.half) else 0.0 for _, loss in shown]
        means, colour = [100 * loss.mean for _, loss in shown], LIGHT[(i + 1) % len(LIGHT)]
        ax.errorbar(means, places, xerr=halves, fmt="o", color=colour, ms=4, lw=1.2, label=r.name)
    ax.axvline(0, color=LIGHT[0], linewidth=0.8)
    ax.set_yticks(range(len(labels)), [label.replace("$", r"\$") for label in labels])
    # Two seeds have intervals of any width: what they say of the means must stay legible.
    low = 1.1 * min((100 * loss.mean for row in found["losses"].values() for loss in row.values()), default=0.0) - 1
    ax.set_xlim(low, max(2.0, -0.15 * low))
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    plain_axes(ax, "Loss to the best of each regime, points of sampled success", "paired by seed, 95 % intervals")
    save_picture(fig, path)


def write_regret(folders: Sequence[Path], out: Path) -> str:
    """Reads the studies, writes regret.json, .md, .html and .png under `out`; returns the table as Markdown."""
    regimes = read_regimes(folders)
    found = regret(regimes)
    tables = [regret_table(regimes, found), regime_table(regimes)]
    record = {
        "regimes": {r.name: {"config": r.config, "split": r.split, "best": found["best"][r.name]} for r in regimes},
        "ranked": found["ranked"],
        "unranked": found["unranked"],
        "losses": {label: {n: vars(loss) for n, loss in row.items()} for label, row in found["losses"].items()},
        "worst": {label: {"regime": n, **vars(loss)} for label, (n, loss) in found["worst"].items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / "regret.json", json.dumps(plain(record), indent=1))
    text = "\n\n".join(f"## {t.title}\n\n{t.markdown()}" for t in tables)
    replace_text(out / "regret.md", f"# Regret over {len(regimes)} regimes\n\n{text}\n\n- {NOTE}\n")
    write_picture(regimes, found, out / "regret.png")
    sentence = f"{len(found['losses'])} methods, {len(found['ranked'])} of them in all of {len(regimes)} regimes."
    replace_text(out / "regret.html", page("regret", "Regret over regimes", sentence, tables, [NOTE]))
    return f"{text}\n\n{out / 'regret.html'}"
