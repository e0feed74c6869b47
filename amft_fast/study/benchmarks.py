"""`amft-fast eval MODEL --benchmarks ...`: answers to benchmarks, one line a sample, and the figures made from them.

A folder holds `NAME.jsonl` for each benchmark, whose first line is the settings and every other one answer, and `results.json`,
`.md` and `.html`. A benchmark that was broken off is gone on with: what is in the file is not drawn again, and since each
sample has a random stream of its own, the result is that of one go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amft_fast.engine.world import ALONE, World
from amft_fast.errors import UserError
from amft_fast.interfaces import Item, RolloutEngine, Sample, Sampling
from amft_fast.rollout import episodes
from amft_fast.rollout.context import check_prompts
from amft_fast.rollout.encoder import Encoder
from amft_fast.run.evaluate import pass_at_k
from amft_fast.run.progress import phase
from amft_fast.run.writers import replace_text
from amft_fast.study.tables import Table, page
from amft_fast.tasks.math.answer import extract
from amft_fast.tasks.math.benchmarks import Benchmark
from amft_fast.tasks.math.task import BenchmarkTask, Prompting
from amft_fast.tasks.math.thinking import opened_thought

if TYPE_CHECKING:
    from amft_fast.config import Config

LENGTH = "--max-new-tokens"


@dataclass(frozen=True)
class Settings:
    """What the answers hang on. `samples` overrides each benchmark's own number; `limit` bounds its problems."""

    model: str
    temperature: float = 0.6
    top_p: float = 1.0
    max_new_tokens: int = 8192
    """Of an answer."""
    seed: int = 0
    samples: int | None = None
    limit: int | None = None
    rope_theta: float | None = None
    system_prompt: str | None = None
    keep_system: bool = False
    thinking: bool = False


@dataclass
class Answers:
    """The answers to one benchmark: `rows[problem id]` holds the lines of its samples."""

    benchmark: Benchmark
    samples: int
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def evaluate(
    engine: RolloutEngine,
    encoder: Encoder,
    benchmarks: Sequence[Benchmark],
    settings: Settings,
    out: Path,
    at_once: int = 512,
    say: Callable[[str], None] = print,
    world: World = ALONE,
) -> dict[str, dict[str, Any]]:
    """Draws what is missing in `out`, writes the results there, and returns the figures of each benchmark.

    `at_once`: samples asked of a rank's engine in one call; a call's answers are on disk before the next. The ranks of `world`
    share them, rank 0 alone reads and writes in `out`. Raises UserError when `out` holds answers drawn with other settings,
    InterruptedError when an engine was stopped.
    """

    def make_folder() -> None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--out {str(out)!r} cannot be written: {e.strerror}") from None

    world.on_main(make_folder)
    prompting = Prompting(settings.system_prompt, settings.keep_system, settings.thinking)
    prompting.opened = opened_thought(encoder.tokenizer)
    results = {}
    for benchmark in benchmarks:
        task = BenchmarkTask(benchmark, prompting, settings.limit)
        for line in (*task.tally.lines(), *check_prompts(encoder, task, ("test",), settings.max_new_tokens, LENGTH)):
            say(line)
        answers = _draw(
            engine, encoder, task, benchmark, settings, out / f"{benchmark.name}.jsonl", at_once, say, world
        )
        results[benchmark.name] = figures(answers) | {"examples": examples(answers)}
        say(f"{benchmark.name}: {_percent(results[benchmark.name]['mean'])}")
    world.on_main(lambda: write_results(out, settings, results))
    return results


def _draw(
    engine, encoder, task, benchmark: Benchmark, settings: Settings, path: Path, at_once: int, say, world: World
) -> Answers:
    """All answers to one benchmark, the ones in its file and new ones, which go there."""
    n = settings.samples or benchmark.samples
    head = {"settings": asdict(settings) | {"samples": n, "source": benchmark.source, "keep": benchmark.keep}}
    items = list(task.prompts("test"))
    done = world.on_main(lambda: _read(path, head, n))
    answers = Answers(benchmark, n, {i.id: done[i.id] for i in items if i.id in done})
    left = [item for item in items if item.id not in done]
    if answers.rows and left:
        say(f"{benchmark.name}: going on, {len(answers.rows)} of {len(items)} problems are answered in {path}")
    sampling = Sampling(settings.temperature, settings.top_p, stop_token_ids=encoder.stop_token_ids)
    mine = len(world.share(len(left) * n))
    drawing = phase(benchmark.name, mine, "answers", shown=world.main, say=say)
    with path.open("a", encoding="utf-8") if world.main else nullcontext() as file, drawing as progress:
        for chunk in _chunks(left, max(1, at_once * world.size // n)):
            drawn = world.spread(
                len(chunk) * n,
                lambda mine, chunk=chunk: episodes.run(
                    engine,
                    task,
                    chunk,
                    encoder,
                    sampling,
                    num_generations=n,
                    max_new_tokens=settings.max_new_tokens,
                    seed_parts=(settings.seed, "benchmark", benchmark.name),
                    only=mine,
                    on_answer=progress.advance,
                ),
            )
            for i, item in enumerate(chunk):
                rows = [_row(item, k, sample) for k, sample in enumerate(drawn[i * n : (i + 1) * n])]
                answers.rows[item.id] = rows
                if file is not None:
                    file.write("".join(json.dumps(row) + "\n" for row in rows))
            if file is not None:
                file.flush()
            say(f"{benchmark.name}: {len(answers.rows)} of {len(items)} problems")
    return answers


def _chunks(items: list[Item], size: int) -> Iterator[list[Item]]:
    for i in range(0, len(items), size):
        yield items[i : i + size]


def _row(item: Item, k: int, sample: Sample) -> dict[str, Any]:
    return {
        "id": item.id,
        "sample": k,
        "problem": item.data.problem,
        "gold": item.data.answer,
        "answer": extract(sample.text),
        "right": sample.success,
        "reward": sample.reward,
        "tokens": sum(sample.loss_mask),
        "truncated": sample.finish_reason == "length",
        "response": sample.text,
    }


def _read(path: Path, head: dict[str, Any], n: int) -> dict[str, list[dict[str, Any]]]:
    """The problems whose `n` answers are all in the file, which is left with those alone; it is begun when there is none."""
    rows: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        first = _object(lines[0]) if lines else None
        if first is not None and first.get("settings") != head["settings"]:
            theirs = first.get("settings") or {}
            apart = [k for k in head["settings"] if theirs.get(k) != head["settings"][k]]
            raise UserError(
                f"{str(path)!r} holds answers drawn with other settings ({', '.join(apart)}): take another --out, or delete it"
            )
        for row in map(_object, lines[1:]):
            if row is not None and "id" in row:
                rows.setdefault(row["id"], []).append(row)
    whole = {i: found for i, found in rows.items() if [row.get("sample") for row in found] == list(range(n))}
    kept = [head, *(row for found in whole.values() for row in found)]
    replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return whole


def _object(line: str) -> dict[str, Any] | None:
    """A line as written; None for one that a crash cut off."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


# ----------------------------------------------------------------------------------------------------------------- figures


def figures(answers: Answers) -> dict[str, Any]:
    """What one benchmark came to; all but counts and tokens are fractions.

    `mean` is avg@n: the mean over problems of the share of right answers; `stderr` its standard error over problems;
    `pass_at` the unbiased pass@k for k = 1, 2, 4, ... n; `tokens` the mean length of an answer, `truncated` the share that hit
    the bound, `no_answer` the share in which no answer was found.
    """
    n, rows = answers.samples, [row for found in answers.rows.values() for row in found]
    right = [sum(row["right"] for row in found) for found in answers.rows.values()]
    problems = len(right)
    mean = sum(right) / (n * problems)
    variance = sum((r / n - mean) ** 2 for r in right) / max(problems - 1, 1)
    ks = sorted({k for k in (2**i for i in range(20)) if k <= n} | {n})
    return {
        "problems": problems,
        "samples": n,
        "mean": mean,
        "stderr": sqrt(variance / problems),
        "pass_at": {k: sum(pass_at_k(n, r, k) for r in right) / problems for k in ks},
        "tokens": sum(row["tokens"] for row in rows) / len(rows),
        "truncated": sum(row["truncated"] for row in rows) / len(rows),
        "no_answer": sum(row["answer"] is None for row in rows) / len(rows),
    }


EXAMPLES = 8


def examples(answers: Answers) -> list[list[str]]:
    """[gold, answer found, verdict] of the first answer to some problems, the wrong ones first."""
    first = (answers.rows[problem][0] for problem in sorted(answers.rows))
    shown = sorted(first, key=lambda row: bool(row["right"]))[:EXAMPLES]
    return [
        [row["gold"], "(none)" if row["answer"] is None else row["answer"], "right" if row["right"] else "wrong"]
        for row in shown
    ]


HEAD = ("benchmark", "problems", "n", "avg@n", "± s.e.", "pass@n", "tokens", "truncated", "no answer")


def table(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row of cells for each benchmark, and the plain mean over them where there are several."""
    rows = [
        [
            name,
            str(f["problems"]),
            str(f["samples"]),
            _percent(f["mean"]),
            _percent(f["stderr"]),
            _percent(f["pass_at"][f["samples"]]),
            f"{f['tokens']:,.0f}",
            _percent(f["truncated"]),
            _percent(f["no_answer"]),
        ]
        for name, f in results.items()
    ]
    if len(results) > 1:
        mean = sum(f["mean"] for f in results.values()) / len(results)
        error = sqrt(sum(f["stderr"] ** 2 for f in results.values())) / len(results)
        rows.append(["mean", "", "", _percent(mean), _percent(error), "", "", "", ""])
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def aligned(rows: list[list[str]]) -> str:
    """The table as text for a terminal."""
    widths = [max(len(row[i]) for row in [list(HEAD), *rows]) for i in range(len(HEAD))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        for row in [list(HEAD), *rows]
    )


NOTE = (
    "In percent, but for counts and tokens. avg@n: the mean over problems of the share of right answers among n; its standard "
    "error is over problems. pass@k: the unbiased estimate of at least one right among k. Truncated: the answer reached the "
    "bound on its length."
)


def _short(text: str) -> str:
    """A text that fits into a cell of a table."""
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def write_results(out: Path, settings: Settings, results: dict[str, dict[str, Any]]) -> None:
    """results.json, results.md and results.html."""
    replace_text(out / "results.json", json.dumps({"settings": asdict(settings), "results": results}, indent=1))
    rows = table(results)
    ks = sorted({k for f in results.values() for k in f["pass_at"]})
    curve = [
        [name, *(_percent(f["pass_at"][k]) if k in f["pass_at"] else "" for k in ks)] for name, f in results.items()
    ]
    beside = [[name, *(_short(cell) for cell in example)] for name, f in results.items() for example in f["examples"]]
    tables = [
        Table("Results", HEAD, rows),
        Table("pass@k", ("benchmark", *(f"k = {k}" for k in ks)), curve),
        Table("Answers beside their golds", ("benchmark", "gold", "answer", "judged"), beside),
    ]
    sentence = (
        f"Temperature {settings.temperature:g}, top-p {settings.top_p:g}, seed {settings.seed}, at most "
        f"{settings.max_new_tokens:,} tokens an answer."
    )
    parts = [f"# {settings.model}", sentence]
    parts += [f"## {t.title}\n\n{t.markdown()}" for t in tables]
    replace_text(out / "results.md", "\n\n".join([*parts, NOTE]) + "\n")
    replace_text(out / "results.html", page("benchmarks", settings.model, sentence, tables, [NOTE]))


# ------------------------------------------------------------------------------------------------------------- the command


def run(cfg: Config, names: Sequence[str], benchmarks_file: str | None, settings: Settings, out: Path) -> int:
    """Evaluates the model of `cfg` on the benchmarks `names`, in all processes of the launcher; returns the exit code."""
    import torch

    from amft_fast.engine.watch import AGAIN, watched
    from amft_fast.rollout.encoder import load_encoder
    from amft_fast.run.build import join_readers, make_reader
    from amft_fast.run.signals import StopSignal
    from amft_fast.tasks.math.benchmarks import chosen, default_benchmarks_file

    benchmarks = chosen(benchmarks_file or default_benchmarks_file(), names)
    with StopSignal() as stop, watched(join_readers(cfg), AGAIN) as world:
        say = print if world.main else lambda text: None
        if cfg.run.threads:
            torch.set_num_threads(cfg.run.threads)
        encoder = load_encoder(cfg.model, vision=False)
        engine = make_reader(cfg, world, encoder, stop)
        try:
            results = evaluate(engine, encoder, benchmarks, settings, out, cfg.rollout.max_batch, say, world)
        except InterruptedError:
            say(f"stopped; the same command goes on from what is in {out}")
            return stop.exit_code
        finally:
            engine.close()
    say(aligned(table(results)))
    say(f"results: {out / 'results.html'}")
    return 0
