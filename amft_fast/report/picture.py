"""report.png: a run in one compact picture for a README (success, entropy, μ, time)."""

from __future__ import annotations

import itertools
from pathlib import Path

from amft_fast.report.charts import LIGHT, Line
from amft_fast.report.plots import PHASES, in_bars, phase_seconds, rollout_lines, smoothed, success_lines
from amft_fast.report.reader import Record

_STYLES = {"solid": "-", "dashed": "--", "dotted": ":", "faint": "-"}


def write_picture(record: Record, path: Path) -> None:
    """Writes the 2 × 2 picture. Panels without data say so."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(10, 6.2), dpi=130, layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(2, 2)
    _success(axes[0, 0], record)
    _entropy(axes[0, 1], record)
    _mu(axes[1, 0], record)
    _time(axes[1, 1], record)
    for ax, title in zip(
        axes.flat, ("Success, sampled", "Entropy of the policy (nats)", "Mixing weight μ", "Seconds per step")
    ):
        ax.set_title(title, loc="left", fontsize=10, fontweight="bold")
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#9aa3ad")
        ax.tick_params(labelsize=8, colors="#444b52")
        ax.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        ax.set_axisbelow(True)
        if ax.get_legend_handles_labels()[0]:
            beside = (
                {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if title == "Seconds per step" else {"loc": "best"}
            )
            ax.legend(fontsize=8, frameon=False, reverse=title == "Seconds per step", **beside)
        elif not ax.has_data():
            ax.text(0.5, 0.5, "nothing on record", transform=ax.transAxes, ha="center", color="#6b7280", fontsize=9)
    for ax in axes[1]:
        ax.set_xlabel("step", fontsize=8)
    fig.savefig(path, metadata={"Software": None})


def _text(name: str) -> str:
    """A name as matplotlib shows it unchanged: a dollar sign would start mathematics."""
    return name.replace("$", r"\$")


def _draw(ax, line: Line, scale: float = 1.0, pixel: float = 0.0) -> None:
    """One `Line` of the page on matplotlib's axes; `pixel` is the width of one in steps, for lines that are shifted."""
    if not line.finite():
        return
    xs, ys = [x + line.shift * pixel for x in line.xs], [float("nan") if y is None else scale * y for y in line.ys]
    colour, label = LIGHT[line.colour], _text(line.name) if line.in_legend else None
    if line.style == "open":
        ax.errorbar(
            xs,
            ys,
            [scale * e for e in line.errors] or None,
            fmt="o",
            color=colour,
            mfc="white",
            markersize=4.5,
            linewidth=1.2,
            label=label,
        )
    else:
        faint = line.style == "faint"
        marker = "." if len(xs) == 1 else None
        ax.plot(
            xs,
            ys,
            _STYLES[line.style],
            color=colour,
            alpha=0.3 if faint else 1,
            lw=1 if faint else 1.6,
            label=label,
            marker=marker,
        )


def _success(ax, record: Record) -> None:
    for line in [*rollout_lines(record), *success_lines(record, "sampled")]:
        _draw(ax, line, 100, record.done / 400)
    ax.yaxis.set_major_formatter("{x:g}%")
    ax.set_ylim(bottom=0)


def _entropy(ax, record: Record) -> None:
    for line in smoothed(record, "entropy", "entropy", 2):
        _draw(ax, line)
    target = record.last("entropy_target")
    if target is not None and record.last("entropy") is not None:
        ax.axhline(target, color="#6b7280", linestyle=(0, (2, 3)), linewidth=1.2, label=f"H* = {target:.3g}")
    ax.set_ylim(bottom=0)


def _mu(ax, record: Record) -> None:
    xs, ys = record.series("mu")
    if any(y is not None for y in ys):
        ax.plot(
            xs,
            [float("nan") if y is None else y for y in ys],
            color=LIGHT[1],
            linewidth=1.6,
            marker="." if len(xs) == 1 else None,
        )
    if record.warmup:
        ax.axvspan(0, record.warmup, color="#f1f2f4", zorder=0, label="warm-up")
    ax.set_ylim(0, 1.03)


def _time(ax, record: Record) -> None:
    phases = phase_seconds(record)
    edges, bars, _ = in_bars(record, phase_seconds(record))
    widths = [b - a for a, b in itertools.pairwise(edges)]
    total, base = sum(sum(s) for s in phases.values()), [0.0] * len(widths)
    for i, (phase, heights) in enumerate(bars.items()):
        colour = LIGHT[PHASES.get(phase, (5 + i % 3, ""))[0]]
        share = sum(phases[phase]) / total
        label = f"{_text(phase)} {share:.0%}" if share >= 0.005 else None
        ax.bar(edges[:-1], heights, widths, base, align="edge", color=colour, alpha=0.85, label=label)
        base = [b + h for b, h in zip(base, heights)]
