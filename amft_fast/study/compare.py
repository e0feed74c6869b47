"""The study: several methods, several seeds, equal compute; one table, one picture, whichever wins.

`amft-fast compare CONFIG --methods rl,fixed:0.05,amft --seeds 5` runs every method with every seed as a process of its own,
several at a time within the core budget. All get the same token budget (tokens sampled plus tokens trained on, the
controller's own included), so a method with cheap steps takes more of them. It may begin with a sweep of a setting (sweep.py),
and give the later seeds to some methods only (stages.py). Finished runs are kept: the same command goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from amft_fast import config_file
from amft_fast.errors import UserError
from amft_fast.run.writers import replace_text
from amft_fast.study.jobs import Clock, Job, Method, duration, overridden, parse_method, run_all, slug
from amft_fast.study.stages import Scores, Seeds, Standing, standing
from amft_fast.study.stats import reported_split
from amft_fast.study.sweep import Chosen, Sweep, choose


@dataclass(frozen=True)
class Design:
    """What is run: the methods' specifications, the seeds, a sweep beforehand, tokens a run (None: what `train.steps` of
    fixed:0.5 take) and runs at a time."""

    methods: Sequence[str]
    seeds: Seeds = field(default_factory=Seeds)
    sweep: Sweep | None = None
    budget: int | None = None
    cores: int = 1


def compare(path: str, design: Design, out: Path, flags: list[str], plan_only: bool = False) -> int:
    """Prints the plan, runs what is missing, and writes compare.json, compare.md, compare.png and compare.html under `out`
    after each round. Returns the exit code: 1 when a run failed."""
    study = Study(path, design, out, flags)
    print(study.plan(), flush=True)
    return 0 if plan_only else study.run()


class Study:
    """A study in its folder. Raises UserError for every mistake in its design, before the first run."""

    def __init__(self, path: str, design: Design, out: Path, flags: list[str]) -> None:
        self.path, self.design, self.out, self.flags = path, design, out, flags
        self.methods = [parse_method(m) for m in design.methods]
        self.seeds, self.sweep = design.seeds, design.sweep
        labels = [m.label for m in self.methods]
        if self.seeds.baseline not in (None, *labels):
            raise UserError(f"--baseline: {self.seeds.baseline!r} is none of --methods, {', '.join(labels)}")
        for method in self.methods:
            swept = [] if self.sweep is None or method.sets(self.sweep.setting) else self.sweep.values
            for own in [self.sweep.flags(value) for value in swept] or [()]:
                config_file.load(path, overridden(flags, [*method.flags, *own]))
        given = config_file.load(path, flags).train.token_budget
        self.kept = out / "budget.json"
        measured = json.loads(self.kept.read_text())["tokens"] if self.kept.exists() else None
        self.budget: int | None = design.budget or given or measured
        self.chosen = Chosen()
        self.choose()

    # ------------------------------------------------------------------------------------------------------------ what is run

    def choose(self) -> None:
        """Takes each method's value from the runs of the sweep that are done."""
        if self.sweep is not None and self.budget is not None:
            self.chosen = choose(self.sweep, self.methods, self.out, self.budget)

    def sweep_jobs(self) -> list[Job]:
        if self.sweep is None:
            return []
        return [job for method in self.methods for job in self.sweep.jobs(method, self.out, self.budget or 0)]

    def job(self, method: Method, seed: int) -> Job:
        """A run of the study itself, with the value that the sweep has chosen."""
        value = self.chosen.value.get(method.label)
        own = () if value is None else self.sweep.flags(value)
        folder = self.out / slug(method.label) / f"seed-{seed}"
        return Job(method.label, seed, folder, self.budget, (*method.flags, *own), method.label)

    def jobs(self, labels: Sequence[str], seeds: range) -> list[Job]:
        return [self.job(m, seed) for seed in seeds for m in self.methods if m.label in labels]

    def labels(self) -> list[str]:
        return [m.label for m in self.methods]

    def finalists(self, labels: Sequence[str]) -> int:
        """How many of these may get the last seeds, at most."""
        return min(len(labels), self.seeds.finalists + (self.seeds.baseline is not None))

    def left(self, labels: Sequence[str], done: int) -> list[Job]:
        """The runs of the seeds from `done` on, as if none of these methods were stopped."""
        first, last = self.seeds.first, self.seeds.last
        ahead = labels[: self.finalists(labels)]
        return self.jobs(labels, range(done, first)) + self.jobs(ahead, range(max(done, first), last))

    # ---------------------------------------------------------------------------------------------------------------- the plan

    def plan(self) -> str:
        """How many runs of how many tokens, and how long they take at the rate of those that have ended."""
        labels, first, last = self.labels(), self.seeds.first, self.seeds.last
        tokens = "as many tokens as fixed:0.5 takes" if self.budget is None else f"{self.budget:,} tokens"
        lines = [f"plan for {self.out}: {len(labels)} method{'s' * (len(labels) > 1)}, {tokens} a run"]
        swept = self.sweep_jobs()
        if self.sweep is not None:
            lines.append(
                f"  sweep of {self.sweep.setting} over {', '.join(self.sweep.values)}: {_count(swept)}, "
                f"of {self.sweep.share:g} times the tokens, seed 0, judged on val"
            )
        lines.append(f"  {first} seed{'s' * (first > 1)} each: {_count(self.jobs(labels, range(first)))}")
        if last > first:
            more = self.jobs(labels, range(first, last))
            most = (last - first) * self.finalists(labels)
            lines.append(f"  {last - first} more for the {self.seeds.finalists} ahead: {_count(more, most)}")
        if self.seeds.stop_behind is not None:
            lines.append(
                "  from two seeds on, none more for a method whose whole 95 % interval is over "
                f"{self.seeds.stop_behind:g} points behind the best"
            )
        done, now = self.progress(labels)
        missing = [job for job in [*swept, *self.left(now.active, done)] if not job.done]
        seconds = Clock([*swept, *self.jobs(labels, range(last))]).seconds(missing) if self.budget else None
        cores = self.design.cores
        time = "the first to end tells how long" if seconds is None else f"about {duration(seconds / cores)}"
        most = "at most " * (self.seeds.stop_behind is not None)
        lines.append(f"  {len(missing)} left, {cores} at a time: {most + time if missing else 'nothing to do'}")
        return "\n".join(lines)

    def progress(self, labels: Sequence[str]) -> tuple[int, Standing]:
        """The first seed of which a run is missing, and the standing before it."""
        for done in range(self.seeds.last + 1):
            now = standing(labels, self.scores(labels, done), done, self.seeds)
            if done == self.seeds.last or not all(job.done for job in self.jobs(now.active, range(done, done + 1))):
                break
        return done, now

    # ----------------------------------------------------------------------------------------------------------------- the runs

    def run(self) -> int:
        self.out.mkdir(parents=True, exist_ok=True)
        labels, cores, last = self.labels(), self.design.cores, self.seeds.last
        if self.budget is None:
            self.budget = self._measure_budget()
        swept = self.sweep_jobs()
        clock = Clock([*swept, *self.jobs(labels, range(last))])
        well = run_all(self.path, swept, cores, self.flags, clock, self.left(labels, 0))
        self.choose()
        if self.sweep is not None:
            for label, value in self.chosen.value.items():
                print(f"sweep: {label} takes {self.sweep.setting} {value}", flush=True)
            swept_out = {job.arm for job in swept} - self.chosen.value.keys()  # all of its runs failed
            labels = [label for label in labels if label not in swept_out]
        for done in range(last):
            now = standing(labels, self.scores(labels, done), done, self.seeds)
            jobs = [job for job in self.jobs(now.active, range(done, done + 1)) if not job.done]
            well = run_all(self.path, jobs, cores, self.flags, clock, self.left(now.active, done + 1)) and well
            if jobs and done + 1 < last and any(job.done for job in jobs):
                self.write(labels, done + 1)
        print(self.write(labels, last))
        return 0 if well else 1

    def _measure_budget(self) -> int:
        """The tokens that `train.steps` steps of fixed mu 0.5 take: what the config's own length means in tokens."""
        quiet = ("--eval.every", "0", "--checkpoint.keep_best", "false", "--eval.max_prompts", "8")
        half = parse_method("fixed:0.5")
        reference = Job("the token budget", 0, self.out / "reference", None, (*half.flags, *quiet), half.label)
        steps = config_file.load(self.path, self.flags).train.steps
        print(f"measuring the token budget: {steps} steps of fixed:0.5", flush=True)
        if not run_all(self.path, [reference], 1, self.flags, Clock(), ()):
            raise UserError(f"the reference run failed; see {reference.folder / 'log.txt'}")
        tokens = reference.summary()["tokens"]
        replace_text(self.kept, json.dumps({"tokens": tokens}))
        return tokens

    # ------------------------------------------------------------------------------------------------------------- the results

    def finished(self, labels: Sequence[str]) -> list[Job]:
        """The runs that are done. Raises UserError for one of another budget, or of another value than the sweep's."""
        done = [job for job in self.jobs(labels, range(self.seeds.last)) if job.done]
        for job in done:
            value = self.chosen.value.get(job.label)
            job.check(self.sweep.setting if self.sweep and value is not None else None, value)
        return done

    def scores(self, labels: Sequence[str], seeds: int) -> Scores:
        """Sampled success at the end by method and seed, of the runs that are done with the first `seeds` seeds."""
        out: Scores = {}
        for job in self.finished(labels):
            if job.seed < seeds:
                end = job.summary()["end"]
                out.setdefault(job.label, {})[job.seed] = end[reported_split(end)]["sampled"]
        return out

    def write(self, labels: Sequence[str], done: int) -> str:
        """The pages of what is there, as it stands after `done` seeds; returns what the terminal shows."""
        from amft_fast.study.pages import Page, write_comparison

        now: Standing = standing(labels, self.scores(labels, done), done, self.seeds)
        runs = [(job.label, job.folder) for job in self.finished(labels)]
        page = Page(self.path, self.budget, self.seeds, now, self.sweep, self.chosen)
        return write_comparison(self.out, page, runs)


def _count(jobs: Sequence[Job], most: int | None = None) -> str:
    """ "12 runs, 4 done"; with `most`, of which only so many are to come."""
    done = sum(job.done for job in jobs)
    number = len(jobs) if most is None else most
    return f"{'at most ' * (most is not None)}{number} run{'s' * (number != 1)}, {done} done"
