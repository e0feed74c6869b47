"""The section "why μ moved" of report.html, for runs with a learned controller."""

from __future__ import annotations

from markupsafe import Markup

from amft_fast.report.charts import Guide, Line, line_chart
from amft_fast.report.plots import Plot, Section, draw_all, grid, phase_seconds, smoothed
from amft_fast.report.reader import Record, finite

CONTROLLER = (
    Plot(
        "Gate",
        (("controller/gate", "gate"),),
        "Share of the meta step let through: near 0 the signal was too noisy to be followed.",
        include=(0.0, 1.0),
    ),
    Plot(
        "Alignment with the utility",
        (("controller/cos_sft", "imitation"), ("controller/cos_rl", "exploration")),
        "Cosine of the utility gradient with each part's step: the higher line is the part that helps held-out prompts more.",
        include=(0.0,),
    ),
    Plot(
        "Cache, effective samples",
        (("controller/ess", "effective share of samples"),),
        "How much the cached validation rollouts still say about the present policy; below min_ess they are redrawn.",
        percent=True,
        guides=(("min_ess", "meta.min_ess"),),
        include=(0.0, 1.0),
    ),
    Plot(
        "Cache, success",
        (("controller/success", "success"),),
        "Of the cached validation rollouts: where all fail (or none), the reward has nothing to say about μ.",
        include=(0.0,),
        percent=True,
    ),
    Plot(
        "Cache, groups",
        (
            ("controller/useful_groups", "of mixed success"),
            ("controller/demo_groups", "failed, demonstration instead"),
            ("controller/drawn", "redrawn"),
        ),
        "Only prompts whose answers earn different rewards tell the two steps apart.",
        include=(0.0,),
    ),
)
BLOCKS = (
    Plot(
        "Held-out reward",
        (("controller/reward", "reward"),),
        "Mean over answers to held-out prompts, at each look: before a block of imitation and after it.",
    ),
    Plot(
        "Rise of the held-out reward",
        (("controller/rise_t", "Student's t"),),
        "Over the block that has ended, paired by prompt. Together with the likelihood of held-out demonstrations it decides: "
        "the first block of imitation stays where it shows (above the line), later ones unless they are seen to harm.",
        guides=(("confidence", "controller.confidence"),),
        include=(0.0,),
    ),
    Plot(
        "Held-out prompts",
        (("controller/alive", "alive"), ("controller/right", "answers right"), ("controller/luck", "luck")),
        "A prompt is alive when its answers earned differently or are all right. Where few are, there is nothing to explore. "
        "Luck is the share of the rewards' variance between answers to one prompt: the more, the sooner exploring takes over.",
        guides=(("min_alive", "controller.min_alive"), ("solved", "controller.solved")),
        include=(0.0, 1.0),
        percent=True,
    ),
)
# Told by other charts already, or counted in the section's first sentence.
_TOLD = {"controller/mu_next", "controller/entropy", "controller/tokens", "controller/stderr"}


def controller_section(record: Record) -> Section | None:
    """Why μ moved: the parts of its moves, and what the meta-gradient was worth. For runs with `controller/` fields.

    `controller/mu_meta` and `controller/mu_entropy` are the two parts of one move of μ (of its logit with
    `controller.space` logit). Fields without a chart of their own get a plain one.
    """
    fields = record.fields("controller/")
    if not fields:
        return None
    if "controller/alive" in fields:
        return grid("Why μ moved", draw_all(record, BLOCKS), _controller_cost(record, "The looks at held-out prompts"))
    body = _moves(record) + _signal(record)
    shown = {f for plot in CONTROLLER for f, _ in plot.fields} | _TOLD
    shown |= {f"controller/{name}" for name in ("mu_meta", "mu_entropy", "signal", "snr")}
    others = [
        Plot(f.removeprefix("controller/"), ((f, f.removeprefix("controller/")),)) for f in fields if f not in shown
    ]
    return grid(
        "Why μ moved", body + draw_all(record, (*CONTROLLER, *others)), _controller_cost(record, "The utility gradient")
    )


def _moves(record: Record) -> Markup:
    """Running sums of the two parts of μ's moves."""
    what = "logit(μ)" if record.setting("controller.space") == "logit" else "μ"
    lines = []
    for i, (field, label) in enumerate((("mu_meta", "by the meta-gradient"), ("mu_entropy", "by the entropy term"))):
        xs, ys = record.series(f"controller/{field}")
        total, sums = 0.0, []
        for y in ys:
            total += y or 0.0
            sums.append(total)
        lines.append(Line(label, xs, sums, 1 + i))
    note = f"Running sum of each part: together they are how far {what} has gone, except where a bound held it."
    return line_chart(f"Change of {what} since the start", lines, note, log=False, include=(0.0,))


def _signal(record: Record) -> Markup:
    """The signal with its standard error, and their ratio against the gate's threshold."""
    xs, ys = record.series("controller/signal")
    steps, errors = record.series("controller/stderr")
    by_step = dict(zip(steps, errors))
    bars = [by_step.get(x) or 0.0 for x in xs] if len(xs) <= 60 else ()
    note = "Above 0 the utility asks for more imitation, below 0 for more exploration."
    note += " Bars: one standard error." if any(bars) else ""
    lines = (
        [Line("signal", xs, ys, 1, "points", bars)] if any(bars) else smoothed(record, "controller/signal", "signal")
    )
    out = line_chart("Signal", lines, note, log=False, include=(0.0,))
    gate = finite(record.setting("controller.snr_gate"))
    guides = [Guide(name, v) for name, v in (("snr_gate", gate), ("−snr_gate", -gate))] if gate else []
    return out + line_chart(
        "Signal to noise",
        smoothed(record, "controller/snr", "SNR"),
        "Signal over its standard error, which the two halves of the held-out prompts give; near 0 it is noise.",
        guides=guides,
        log=False,
        include=(0.0,),
    )


def _controller_cost(record: Record, what: str) -> str:
    """What the controller took, in a sentence."""
    seconds = sum(sum(s) for s in phase_seconds(record).values())
    utility = sum(y or 0.0 for y in record.series("time/utility")[1])
    tokens = sum(y or 0.0 for y in record.series("controller/tokens")[1])
    parts = [f"{utility / seconds:.1%} of the recorded time"] if utility and seconds else []
    parts += [f"{tokens / record.tokens:.1%} of the tokens"] if tokens and record.tokens else []
    return f"{what} took {' and '.join(parts)}." if parts else ""
