"""report.html of a run: one page without network or script, made from the run's files alone; report.png beside it. While
the run goes, a few lines of script load the page anew.

The page is a row of sections in the order of `SECTIONS`; the plots among them are in report_plots.py.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from amft_fast.data.pictures import shown_picture
from amft_fast.errors import UserError
from amft_fast.methods import METHODS
from amft_fast.report import charts, templates
from amft_fast.report.charts import number
from amft_fast.report.controller import controller_section
from amft_fast.report.plots import (
    Section,
    answers_section,
    mix_section,
    success_section,
    task_section,
    time_section,
    updates_section,
)
from amft_fast.report.reader import Record, finite, read

PROMPT_CHARS, COMPLETION_CHARS, ANSWER_CHARS = 600, 1500, 300
# Splits that are not benchmarks, as far as tiles go: the most telling first.
OWN_SPLITS = ("test", "ood", "visual_ood", "val", "train")


def write_report(folder: Path, live: bool = False) -> Path:
    """Writes report.html and report.png into the run's folder and returns the path of the page.

    `live`: the run goes on, so the page alone is written, and loads itself anew. Raises UserError when there is no such run or
    its folder cannot be written.
    """
    from amft_fast.report.picture import write_picture

    folder = Path(folder)
    record = read(folder)
    text = render(record, live)
    path = folder / "report.html"
    try:
        aside = path.with_suffix(".part")
        aside.write_text(text, encoding="utf-8", errors="replace")
        os.replace(aside, path)
        if not live:
            write_picture(record, folder / "report.png")
    except OSError as e:
        raise UserError(f"the report cannot be written into {str(folder)!r}: {e.strerror}") from None
    return path


def render(record: Record, live: bool = False) -> str:
    """The page as text; `live` as in `write_report`."""
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(templates.TEMPLATE)
    sections = [section for make in SECTIONS if (section := make(record)) is not None]
    return template.render(
        name=record.folder.resolve().name,
        style=Markup(templates.STYLE + charts.STYLE),
        refresh=templates.REFRESH_SECONDS if live else None,
        script=Markup(templates.REFRESH),
        script_hash=base64.b64encode(hashlib.sha256(templates.REFRESH.encode()).digest()).decode(),
        warnings=warnings(record, live),
        sentence=sentence(record),
        tiles=tiles(record),
        sections=sections,
        environment=record.environment,
        config=record.config_text,
        damaged=record.damaged,
    )


# ------------------------------------------------------------------------------------------------------------ headline


def duration(seconds: float | None) -> str:
    """8.2 s, 3 min 05 s, 2 h 07 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes} min {s:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def warnings(record: Record, live: bool = False) -> list[str]:
    """What a reader must know before the figures."""
    out = []
    if live:
        steps = f"{record.done} of {record.planned}" if record.planned else f"{record.done}"
        out.append(f"This run goes on: {steps} steps are done, and the page loads itself anew.")
    elif not record.metrics:
        out.append("No step of this run is on record yet.")
    elif not record.finished:
        steps = f"{record.done} of {record.planned} steps" if record.planned else f"{record.done} steps"
        if record.done == record.planned:
            out.append(f"This run is not finished: all {record.done} steps are done, its last evaluation is not.")
        else:
            out.append(f"This run is not finished: {steps} are done, and the figures are those so far.")
    skipped = record.last("skipped_total")
    if skipped:
        out.append(f"{skipped:.0f} update(s) were skipped because the loss or the gradient was not finite.")
    for row in record.metrics:
        alarms = row.get("alarms")
        if isinstance(alarms, dict):
            out += [f"Alarm at step {row['step']}: {shown_text(text, COMPLETION_CHARS)}." for text in alarms.values()]
    return out


def sentence(record: Record) -> str:
    """The run in one sentence."""
    method = str(record.summary.get("method") or record.setting("train.method", "unknown method"))
    words = METHODS[method].words if method in METHODS else method
    task = str(record.summary.get("task") or record.setting("task.name", "unknown task"))
    task = task if ":" in task else task.replace("_", " ").title()  # FILE.py:CLASS as it is
    steps = f"{record.done} steps" if record.done != 1 else "1 step"
    if record.warmup:
        steps += f" ({record.warmup} of them warm-up)"
    device = str(record.environment.get("device", "an unknown device"))
    threads = str(record.environment.get("threads", ""))
    if threads and "cuda" not in device.lower() and not device.startswith(("NVIDIA", "AMD Instinct")):
        device += f", {threads} threads"
    return f"{words}, on {task}: {steps} in {duration(record.wall_s)} on {device}; {number(record.tokens)} tokens."


def tiles(record: Record) -> list[tuple[str, str, str]]:
    """(label, figure, detail) of what matters most: success on benchmarks and the held-out splits, μ, entropy, speed."""
    start, end, _ = record.ends()
    out = []
    benchmarks = [s for s in end if s not in OWN_SPLITS][:6]
    own = [s for s in OWN_SPLITS if s in end]
    for split in benchmarks + own[: max(3 - len(benchmarks), 1)]:
        after = finite(end[split].get("sampled"))
        before = finite(start.get(split, {}).get("sampled"))
        figure = number(after, True) if before is None else f"{number(before, True)} → {number(after, True)}"
        out.append((f"{split}, sampled success", figure, change(start.get(split, {}), end[split], "sampled")[0]))
    steps, mus = record.series("mu")
    mus = [m for s, m in zip(steps, mus) if s >= record.warmup and m is not None]
    if mus:
        moved = f"{mus[0]:.3g} → {mus[-1]:.3g}" if mus[0] != mus[-1] or min(mus) != max(mus) else f"{mus[0]:.3g}"
        out.append(("μ, the weight of imitation", moved, "first and last step" if "→" in moved else "held fixed"))
    entropy, target = record.last("entropy"), record.last("entropy_target")
    if entropy is not None:
        out.append(("entropy at the end", number(entropy), "" if target is None else f"H* = {number(target)}"))
    for name, label in (("rollout", "rollouts"), ("update", "updates")):
        speed = [y for y in record.series(f"{name}_tokens_per_s")[1] if y is not None]
        if speed:
            out.append((f"{label}, tokens per second", number(statistics.median(speed)), "median over steps"))
    return out


def change(before: dict[str, Any], after: dict[str, Any], name: str) -> tuple[str, str]:
    """The change in points as text (± 1.96 standard errors where known), and its class: up, down, or "" within noise."""
    a, b = finite(before.get(name)), finite(after.get(name))
    if a is None or b is None or (name == "pass_at_k" and before.get("k") != after.get("k")):
        return "", ""
    noise, text = 0.0, f"{100 * (b - a):+.1f}".replace("-", "−")
    if name == "sampled":
        noise = 1.96 * math.hypot(finite(before.get("stderr")) or 0.0, finite(after.get("stderr")) or 0.0)
        text += f" ± {100 * noise:.1f}"
    sure = name == "sampled" and abs(b - a) > noise
    return f"{text} points", ("up" if b > a else "down") if sure else ""


# -------------------------------------------------------------------------------------------------------------- results


def results_section(record: Record) -> Section | None:
    """Success per split at the start, after the warm-up where it was evaluated, and at the end, with the change."""
    start, end, source = record.ends()
    warmup = record.after_warmup() if source is None or source["at"] > record.warmup else {}
    splits = list(dict.fromkeys([*start, *end]))
    if not splits:
        return None
    ks = {row.get("k") for rows in (start, end) for row in rows.values()}
    rows = []
    for split in splits:
        before, after = start.get(split, {}), end.get(split, {})
        cells = []
        for name in ("greedy", "sampled", "pass_at_k"):
            text, kind = change(before, after, name)
            stages = [_cell(row, name) for row in (before, *([warmup.get(split, {})] if warmup else []), after)]
            cells.append((stages, text.removesuffix(" points"), kind))
        rows.append((split, after.get("prompts", before.get("prompts", "")), cells))
    intro = "Share of problems solved, before and after; changes, from start to end, are in percentage points. "
    intro += "Sampled success is the mean over k answers per problem, ± 1.96 standard errors over problems; "
    intro += "a change of it in bold is larger than its noise."
    if source is not None:
        kind = "" if source.get("full") else " It is a scheduled one, with fewer problems and answers than the first."
        intro += f" The run is not finished: “end” is the evaluation at step {source['at']}.{kind}"
    k = f"pass@{ks.pop()}" if len(ks) == 1 else "pass@k"
    stages = ["start", *(["warm-up"] if warmup else []), "end"]
    table = Environment(autoescape=True).from_string(templates.RESULTS).render(rows=rows, k=k, stages=stages)
    return Section("Start and end", Markup(table), intro)


def _cell(row: dict[str, Any], name: str) -> str:
    value = finite(row.get(name))
    text = number(value, True)
    stderr = finite(row.get("stderr"))
    return f"{text} ± {196 * stderr:.1f}" if name == "sampled" and value is not None and stderr is not None else text


# ---------------------------------------------------------------------------------------------------------- completions


def samples_section(record: Record) -> Section | None:
    """Completions of the earliest and the latest step that kept any, right and wrong ones."""
    steps = sorted({s["step"] for s in record.samples})
    chosen = {f"Step {i}": [s for s in record.samples if s["step"] == i] for i in dict.fromkeys(steps[:1] + steps[-1:])}
    return _cards("Completions", "Answers of the policy in training, early and late.", chosen)


def eval_samples_section(record: Record) -> Section | None:
    """Sampled answers of the last evaluation of each split."""
    last = {str(s.get("split")): s["at"] for s in record.eval_samples}
    chosen = {
        f"{split}, at {at}": [s for s in record.eval_samples if s["at"] == at and str(s.get("split")) == split]
        for split, at in last.items()
    }
    return _cards("Answers in evaluations", "Of each split's last evaluation, sampled.", chosen)


def _cards(title: str, intro: str, chosen: dict[str, list[dict[str, Any]]]) -> Section | None:
    """Kept answers as cards under headings, at most four under each, right and wrong ones."""
    groups = []
    for heading, kept in chosen.items():
        right = [s for s in kept if s.get("success") is True]
        wrong = [s for s in kept if s.get("success") is not True]
        take = max(2, 4 - len(wrong))
        shown = right[:take] + wrong[: 4 - len(right[:take])]
        words = f"{len(right)} of the {len(kept)} completions kept here are correct"
        groups.append((f"{heading}: {words}", [_card(s) for s in shown]))
    if not groups:
        return None
    html = Environment(autoescape=True).from_string(templates.SAMPLES).render(groups=groups)
    return Section(title, Markup(html), intro)


def _card(s: dict[str, Any]) -> dict[str, Any]:
    """What a card shows of a kept answer; rows of earlier versions have neither gold nor answer nor advantage."""
    advantage = finite(s.get("advantage"))
    texts = [("Prompt", shown_text(s.get("prompt"), PROMPT_CHARS, keep_end=True))]
    texts.append(("Completion", shown_text(s.get("completion"), COMPLETION_CHARS) or "(empty)"))
    if "answer" in s:
        read = "(none could be read)" if s["answer"] is None else shown_text(s["answer"], ANSWER_CHARS)
        texts.append(("Answer as read", read))
    if "gold" in s:
        texts.append(("Gold answer", shown_text(s["gold"], ANSWER_CHARS)))
    return {
        "right": s.get("success") is True,
        "reward": number(finite(s.get("reward"))),
        "advantage": None if advantage is None else f"{advantage:+.3g}".replace("-", "−"),
        "picture": shown_picture(s.get("picture")),
        "texts": texts,
    }


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def shown_text(text: Any, limit: int, keep_end: bool = False) -> str:
    """Text of a model for the page: control characters replaced, long text cut with a word on how much is missing."""
    text = _CONTROL.sub("\ufffd", str(text if text is not None else "").replace("\r\n", "\n"))
    if len(text) <= limit:
        return text
    missing = f"[{len(text) - limit} characters left out]"
    return f"{missing} … {text[-limit:]}" if keep_end else f"{text[:limit]} … {missing}"


SECTIONS: tuple[Callable[[Record], Section | None], ...] = (
    results_section,
    success_section,
    mix_section,
    controller_section,
    updates_section,
    answers_section,
    task_section,
    time_section,
    samples_section,
    eval_samples_section,
)
