"""The plots of report.html: each section is a function from the `Record` to a `Section`, or None when it has nothing for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment
from markupsafe import Markup

from amft_fast.methods import METHODS
from amft_fast.report import charts, templates
from amft_fast.report.charts import Guide, Line, line_chart, number
from amft_fast.report.reader import Record, finite, splits_of

SPLIT_COLOURS = {"val": 1, "test": 2, "ood": 3, "train": 4}
# Phase of a step: colour, words. "rest" is what of the step's seconds no phase claims.
PHASES = {
    "rollout": (1, "sampling the policy's own answers"),
    "update": (2, "forward, backward, optimizer"),
    "eval": (3, "scheduled evaluations"),
    "utility": (4, "utility gradient of the controller"),
    "advantage": (5, "old and reference log-probs, advantages"),
    "checkpoint": (6, "writing checkpoints"),
    "sync": (7, "new weights to the rollout engine"),
    "rest": (0, "everything else in a step: drawing data, tokenising, logging"),
}
# Of tokens, what they were for: colour.
BUDGET = {"imitating": 1, "exploring": 2, "both": 4, "controller": 0}


@dataclass(frozen=True)
class Section:
    """A part of the page. `body` is HTML, `intro` a sentence or two of plain text."""

    title: str
    body: Markup
    intro: str = ""


def success_section(record: Record) -> Section | None:
    """Success over the steps: evaluations per split and the rollouts of training."""
    note = "Lines: scheduled evaluations, on some of the problems. Circles: full ones."
    body = line_chart(
        "Sampled success",
        [*success_lines(record, "sampled"), *rollout_lines(record)],
        note.replace("ones.", "ones with 95 % intervals.")
        + " Rollouts: the answers trained on, smoothed; where prompts are passed over, as if all had been asked alike.",
        percent=True,
        log=False,
        include=(0.0,),
        shaded=warmup(record),
    )
    for name, title in (("greedy", "Greedy success"), ("pass_at_k", "pass@k")):
        note_k = " The scheduled ones may have a smaller k." if name == "pass_at_k" else ""
        lines = success_lines(record, name)
        body += line_chart(title, lines, note + note_k, percent=True, log=False, include=(0.0,), shaded=warmup(record))
    return grid("Success", body)


def rollout_lines(record: Record) -> list[Line]:
    """Success of the answers that were trained on; where prompts are passed over, as if all had been asked alike."""
    field = "success_all" if record.series("success_all")[0] else "success"
    return smoothed(record, field, "rollouts", 0, faint=False)


def success_lines(record: Record, name: str) -> list[Line]:
    """For each split a line through the scheduled evaluations and circles at the full ones (dotted between, if no line)."""
    out = []
    splits = record.splits()
    for i, split in enumerate(splits):
        colour = SPLIT_COLOURS.get(split, 5 + i % 3)
        shift = 4.0 * (i - (len(splits) - 1) / 2) if name == "sampled" else 0.0
        points = [(e["at"], bool(e.get("full")), splits_of(e)[split]) for e in record.evals if split in splits_of(e)]
        lines = {
            full: [(x, finite(row.get(name)), finite(row.get("stderr")) or 0.0) for x, f, row in points if f is full]
            for full in (False, True)
        }
        for full, style in ((False, "solid"), (True, "open")):
            xs, ys, errors = zip(*lines[full]) if lines[full] else ((), (), ())
            if full and not lines[False] and len(xs) > 1:
                out.append(Line(split, xs, ys, colour, "dotted", in_legend=False, shift=shift))
            bars = [1.96 * e for e in errors] if full and name == "sampled" else ()
            newest = bool(xs) and xs[-1] == points[-1][0]  # the legend shows the newest figure of a split, once
            out.append(Line(split, xs, ys, colour, style, bars, newest, shift if full else 0.0))
    return out


# ---------------------------------------------------------------------------------------------- what the steps measured


def smooth(ys: Sequence[float | None], half: int) -> list[float | None]:
    """Mean over a window of 2·half + 1 centred on each value; values that are None are left out of it."""
    sums, counts = [0.0], [0]
    for y in ys:
        sums.append(sums[-1] + (y or 0.0))
        counts.append(counts[-1] + (y is not None))
    out: list[float | None] = []
    for i in range(len(ys)):
        a, b = max(0, i - half), min(len(ys), i + half + 1)
        n = counts[b] - counts[a]
        out.append((sums[b] - sums[a]) / n if n else None)
    return out


def smoothed(record: Record, field: str, label: str, colour: int = 1, faint: bool = True) -> list[Line]:
    """A field as a smoothed line with its raw values faint behind it; short series as they are."""
    xs, ys = record.series(field)
    if len(xs) < 25:
        return [Line(label, xs, ys, colour)]
    mean = Line(label, xs, smooth(ys, max(2, len(xs) // 50)), colour)
    return [Line(label, xs, ys, colour, "faint", in_legend=False), mean] if faint else [mean]


def warmup(record: Record) -> tuple[float, float] | None:
    return (0, record.warmup) if record.warmup else None


@dataclass(frozen=True)
class Plot:
    """A chart of fields of metrics.jsonl: (field, label) pairs. One that never changes is told in words instead."""

    title: str
    fields: tuple[tuple[str, str], ...]
    note: str = ""
    percent: bool = False
    guides: tuple[tuple[str, str], ...] = ()  # (name, dotted setting)
    log: bool | None = False
    include: tuple[float, ...] = ()

    def draw(self, record: Record) -> Markup:
        fields = [
            (i, f, label)
            for i, (f, label) in enumerate(self.fields)
            if len(self.fields) == 1 or any(record.series(f)[1])
        ]
        lines = [line for i, f, label in fields for line in smoothed(record, f, label, 1 + i)]
        top = max((y for line in lines for _, y in line.finite()), default=0.0)
        values = [(name, finite(record.setting(setting))) for name, setting in self.guides]
        # A bound far above the data would flatten it: it is drawn only where it is near.
        guides = [Guide(name, v) for name, v in values if v is not None and v <= 3 * top]
        shaded = warmup(record) if any(line.xs and line.xs[0] < record.warmup for line in lines) else None
        return line_chart(
            self.title,
            lines,
            self.note,
            guides=guides,
            percent=self.percent,
            log=self.log,
            include=self.include,
            shaded=shaded,
        )

    def constant(self, record: Record) -> str:
        """'clip fraction 0' when nothing here changes by more than 0.1 % over several steps, else ''."""
        parts = []
        for field, label in self.fields:
            values = [y for y in record.series(field)[1] if y is not None]
            if not values:
                continue
            if len(values) == 1 or max(values) - min(values) > 1e-3 * abs(max(values)):
                return ""
            parts.append(f"{label} {number(values[-1], self.percent)}")
        return ", ".join(parts)


def draw_all(record: Record, plots: Sequence[Plot]) -> Markup:
    """The charts of all plots, and a sentence on those that never change."""
    flat = [text for plot in plots if (text := plot.constant(record))]
    body = Markup("").join(plot.draw(record) for plot in plots if not plot.constant(record))
    if flat:
        body += Markup('<p class="note wide">Constant throughout: {}.</p>').format("; ".join(flat))
    return body


def grid(title: str, body: Markup, intro: str = "") -> Section | None:
    """A section of charts side by side, None when there are none."""
    return Section(title, Markup('<div class="grid">{}</div>').format(body), intro) if body else None


def mix_section(record: Record) -> Section | None:
    """μ, entropy against H*, reward: what the method is about."""
    xs, mus = record.series("mu")
    method = METHODS.get(str(record.setting("train.method")))
    signal = record.setting("controller.signal")
    bounds = [Guide(n, v) for n in ("mu_min", "mu_max") if (v := finite(record.setting(f"controller.{n}"))) is not None]
    body = line_chart(
        "Mixing weight μ",
        [Line("μ", xs, mus, 1)],
        "1 imitates demonstrations alone, 0 learns from rewards alone.",
        guides=bounds if method is not None and method.learned and signal not in ("blocks", "lot") else (),
        log=False,
        include=(0.0, 1.0),
        shaded=warmup(record),
    )
    body += budget_chart(record)
    target = record.last("entropy_target")
    body += line_chart(
        "Entropy of the policy",
        smoothed(record, "entropy", "entropy", 2),
        "Nats per token of its own rollouts. H* is the entropy right after the warm-up.",
        guides=[] if target is None else [Guide("H*", target)],
        log=False,
        include=(0.0,),
    )
    reward = Plot("Reward", (("reward", "reward"),), "Mean over the step's rollouts.")
    return grid("Imitation and exploration", body + draw_all(record, (reward,)))


def budget(record: Record) -> dict[str, list[float]]:
    """Tokens of each step on record by what they were for: steps that imitate (μ = 1), that explore (μ = 0), that do both, and
    the controller's own; what took none is left out."""
    out = {name: [0.0] * len(record.metrics) for name in BUDGET}
    for i, m in enumerate(record.metrics):
        mu, whole = finite(m.get("mu")), finite(m.get("tokens")) or 0.0
        used = sum(finite(m.get(f"tokens_{kind}")) or 0.0 for kind in ("sampled", "trained"))
        out["imitating" if mu == 1 else "exploring" if mu == 0 else "both"][i] = used
        out["controller"][i] = max(whole - used, 0.0)
    return {name: tokens for name, tokens in out.items() if sum(tokens) > 0}


def budget_chart(record: Record) -> Markup:
    """Where the tokens went."""
    tokens = budget(record)
    total = sum(map(sum, tokens.values()))
    edges, bars, size = in_bars(record, tokens)
    note = ", ".join(f"{name} {sum(tokens[name]) / total:.1%}" for name in tokens)
    note = f"Sampled and trained on; of all {total:,.0f}: {note}." + (
        f" A bar is the mean of {size} steps." * (size > 1)
    )
    return charts.stacked_bars("Tokens per step", edges, [(name, BUDGET[name], h) for name, h in bars.items()], note)


UPDATES = (
    Plot("Imitation loss", (("sft_loss", "NLL of demonstrations"),), "Nats per token.", log=None),
    Plot("Policy loss", (("pg_loss", "policy gradient"),), "The surrogate; its level means little, its spikes do."),
    Plot("Total loss", (("loss", "loss"),), "μ · imitation + (1 − μ) · exploration, entropy bonus included."),
    Plot("Value loss", (("value_loss", "value loss"),), log=None),
    Plot("Busiest expert", (("router_load_max", "share of the update's tokens"),), "Of any layer.", log=None),
    Plot(
        "Gradient norm",
        (("grad_norm", "before clipping"),),
        guides=(("max_grad_norm", "train.max_grad_norm"),),
        log=None,
        include=(0.0,),
    ),
    Plot("Learning rate", (("lr", "lr"),), include=(0.0,)),
    Plot(
        "Clip fraction", (("clip_fraction", "clip fraction"),), "Tokens whose gradient the clip removes.", percent=True
    ),
    Plot(
        "KL",
        (("approx_kl", "KL to the policy that sampled"), ("ref_kl", "KL to the reference")),
        "Nats per token, estimated on the rollouts.",
        include=(0.0,),
    ),
    Plot("Largest ratio", (("ratio_max", "largest ratio"),), "New to old probability of one token.", log=None),
    Plot(
        "Mismatch to the sampler",
        (("mismatch_mean", "mean |Δ log-prob|"), ("mismatch_max", "largest |Δ log-prob|")),
        "Trainer's against rollout engine's log-probs of the same tokens; rounding alone should show.",
        log=None,
    ),
    Plot(
        "Mismatch, effective samples",
        (("mismatch_ess", "effective share of samples"),),
        "All when trainer and rollout engine agree.",
        percent=True,
        include=(0.0, 1.0),
    ),
)
ANSWERS = (
    Plot(
        "Response length",
        (("response_length", "tokens per answer"),),
        "The policy's own tokens, all turns.",
        guides=(("max_new_tokens", "rollout.max_new_tokens"),),
        include=(0.0,),
    ),
    Plot("Cut off", (("truncated", "truncated answers"),), "Answers that ran into the bound on tokens.", percent=True),
    Plot(
        "Groups without spread",
        (("groups_without_spread", "all answers earn the same"), ("passed_over", "prompts that this pass leaves out")),
        "Share of prompts whose answers all earn the same: they teach a group-relative method nothing, and later passes over "
        "the prompts may leave them out (rollout.ask_again).",
        percent=True,
        include=(0.0,),
    ),
    Plot("No answer", (("no_answer", "answers that cannot be read"),), "By the task's own reader.", percent=True),
    Plot("Turns", (("turns", "turns per problem"),)),
)


def updates_section(record: Record) -> Section | None:
    return grid("Losses and updates", draw_all(record, UPDATES))


def answers_section(record: Record) -> Section | None:
    return grid("Answers", draw_all(record, ANSWERS))


def task_section(record: Record) -> Section | None:
    """What the task reports of its own, its rewards among it, each in a chart."""
    plots = [Plot(name.removeprefix("task/"), ((name, "mean over answers"),)) for name in record.fields("task/")]
    return grid(
        "The task's own figures", draw_all(record, plots), "Means over the answers of a step that have the figure."
    )


# ----------------------------------------------------------------------------------------------------------------- time


THROUGHPUT = Plot(
    "Throughput",
    (("tokens_per_s", "whole step"), ("rollout_tokens_per_s", "rollouts"), ("update_tokens_per_s", "updates")),
    "Tokens per second: of a step over all of it, of those sampled over its rollouts, of those trained on over its updates.",
    include=(0.0,),
)


def phase_seconds(record: Record) -> dict[str, list[float]]:
    """Seconds per phase, one value for each step on record, phases without any left out."""
    names = [f.removeprefix("time/") for f in record.fields("time/")]
    names = [p for p in PHASES if p in names] + [p for p in names if p not in PHASES]
    out = {p: [max(finite(m.get(f"time/{p}")) or 0.0, 0.0) for m in record.metrics] for p in names}
    # Evaluations and checkpoints lie between steps, outside their `seconds`.
    inside = [sum(out[p][i] for p in names if p not in ("eval", "checkpoint")) for i in range(len(record.metrics))]
    rest = [max((finite(m.get("seconds")) or 0.0) - s, 0.0) for m, s in zip(record.metrics, inside)]
    out["rest"] = rest
    return {p: seconds for p, seconds in out.items() if sum(seconds) > 0}


def in_bars(record: Record, layers: Mapping[str, list[float]]) -> tuple[list[float], dict[str, list[float]], int]:
    """Edges of at most 48 bars, the mean of each layer's steps in each, and steps per bar.

    Where that leaves a dozen bars, each holds whole intervals between evaluations: else their seconds make a comb.
    """
    n, every = len(record.metrics), int(finite(record.setting("eval.every")) or 1)
    size = max(-(-n // 48), 1)
    if size > 1 and n >= 12 * every:
        size = -(-size // every) * every
    starts = range(0, n, size)
    edges = [record.metrics[i]["step"] for i in starts] + [record.metrics[-1]["step"] + 1 if n else 0]
    bars = {p: [sum(s[i : i + size]) / len(s[i : i + size]) for i in starts] for p, s in layers.items()}
    return edges, bars, size


def time_section(record: Record) -> Section | None:
    """Where the time went: seconds per step by phase, and each phase's share."""
    phases = phase_seconds(record)
    total = sum(sum(s) for s in phases.values())
    if not total:
        return None
    colours = {p: PHASES.get(p, (5 + i % 3, ""))[0] for i, p in enumerate(phases)}
    edges, heights, size = in_bars(record, phases)
    bars = [(p, colours[p], h) for p, h in heights.items()]
    note = f"Each bar is the mean of {size} steps." if size > 1 else ""
    left = charts.stacked_bars("Seconds per step", edges, bars, note)
    shares = [(p, colours[p], sum(s) / total) for p, s in phases.items()]
    outside = (record.wall_s or 0.0) - total
    rows = [(charts.swatch(c), p, PHASES.get(p, (0, ""))[1], sum(phases[p]), share) for p, c, share in shares]
    right = (
        Environment(autoescape=True)
        .from_string(templates.TIME)
        .render(
            bar=charts.share_bar("Share of each phase", shares),
            rows=rows,
            total=total,
            outside=max(outside, 0.0),
        )
    )
    return grid("Time", left + Markup(right) + draw_all(record, (THROUGHPUT,)))
