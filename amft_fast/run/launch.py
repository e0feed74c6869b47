"""A run from its config to its exit code, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from amft_fast.config import Config
from amft_fast.controller import inert
from amft_fast.engine.watch import AGAIN, watched
from amft_fast.engine.world import launched_rank
from amft_fast.errors import UserError
from amft_fast.interfaces import Task
from amft_fast.report.page import write_report
from amft_fast.rollout.context import check_demos
from amft_fast.run import checkpoint, trackers
from amft_fast.run.build import build, join_readers, make_reader, read_data
from amft_fast.run.evaluate import WHOLE, check_splits, count_answers, of_config
from amft_fast.run.evaluate import evaluate as evaluate_splits
from amft_fast.run.export import save_encoder
from amft_fast.run.folder import check_folder, check_room, take_folder
from amft_fast.run.live_report import LiveReport
from amft_fast.run.lock import locked
from amft_fast.run.loop import Loop
from amft_fast.run.progress import phase
from amft_fast.run.signals import StopSignal
from amft_fast.run.writers import NoFiles, RunFiles, replace_text
from amft_fast.trainer import Parts

# How long a run that a launcher starts again waits for the process before it to leave the folder.
PATIENCE_S = 60.0


def train(
    cfg: Config, resume: bool | Literal["auto"] = False, task: Task | None = None, listeners: Sequence[Any] = ()
) -> int:
    """Runs (or goes on with) the training that `cfg` describes; returns the process's exit code.

    `resume`: go on from the newest checkpoint, or begin where there is none; "auto": so that a launcher may start the same
    command again, a process that is just ending there is waited for.
    `task` takes the place of the one that the config names; `listeners` are told how it goes (run/listeners.py). 0: done; 129,
    130 or 143: stopped by SIGHUP, SIGINT or SIGTERM with the state saved. Signal handlers are as before when this returns.
    Raises UserError for what the user can mend.
    """
    folder = Path(cfg.run.dir)
    patience, resume = PATIENCE_S if resume == "auto" else 0.0, bool(resume)
    with StopSignal() as stop, locked(folder, patience=patience) if launched_rank() == 0 else nullcontext():
        if launched_rank() == 0:
            check_folder(cfg, resume)
            trackers.check(cfg)
        parts = build(cfg, stop, task, resume)
        world = parts.engine.world
        if cfg.train.method != "rl" or cfg.train.warmup_steps:
            check_demos(parts.encoder, parts.task)
        with watched(world):
            if world.main:
                warn = getattr(parts.task, "warn_of_base", lambda path: None)
                print(*filter(None, (inert(cfg), warn(cfg.model.path))), sep="\n", end="")
            name = cfg.task.name if task is None or cfg.task.name == "data" else type(task).__name__
            code = go(cfg, resume, folder, parts, stop, listeners, name)
            world.barrier()
            return code


def go(
    cfg: Config,
    resume: bool,
    folder: Path,
    parts: Parts,
    stop: StopSignal,
    listeners: Sequence[Any] = (),
    task_name: str = "",
) -> int:
    """The run itself, on every rank; returns the exit code."""
    world = parts.engine.world
    say = print if world.main else lambda text: None
    found = checkpoint.latest(folder / "checkpoints", say, world) if resume else None
    if resume and found is None:
        say(f"--resume: no whole checkpoint under {folder / 'checkpoints'}, starting from the beginning")
    total = cfg.train.warmup_steps + cfg.train.steps
    files = RunFiles(folder, cfg, total) if world.main else NoFiles(folder)
    if world.main:
        # The report first: trackers keep it. Then they, for one's own callbacks may raise.
        files.listen([LiveReport(folder, files.say), *trackers.make(cfg, files.say), *listeners])
    started = finished = False
    try:
        loop = Loop(cfg, parts, files)
        if found:
            path, tensors, state = found
            try:
                loop.load(state, tensors)
            except ValueError as e:
                raise UserError(f"--resume: {path} does not fit this config: {e}") from None
        if world.main:
            check_room(folder, world.size * parts.engine.state_bytes())
        changes = take_folder(cfg, resume) if world.main else []
        files.open(loop.trainer.step, loop.evaluator.evaluated_step)
        started = True
        files.tell("on_start", folder, loop.trainer.step)
        if changes:
            files.say(f"resumed with other settings: {', '.join(changes)}")
        if found:
            files.say(f"resumed from {path} at step {loop.trainer.step} of {total}")
        try:
            loop.run()
        except InterruptedError:
            files.say(f"stopped at step {loop.trainer.step} of {total}; go on with --resume")
            return stop.exit_code
        finish(cfg, parts, loop, folder, task_name or cfg.task.name)
        finished = True
    finally:
        if started:
            files.tell("on_end", folder, finished)
        files.close()
        parts.rollout_engine.close()
    return 0


def finish(cfg: Config, parts: Parts, loop: Loop, folder: Path, task_name: str) -> None:
    """The exported model, summary.json, report.html, and the table on the terminal."""
    trainer = loop.trainer
    if cfg.checkpoint.export:
        _export(parts, folder / "model")
    if not parts.engine.world.main:
        return
    summary = {
        "method": cfg.train.method,
        "task": task_name,
        "seed": cfg.run.seed,
        "steps": trainer.step,
        "wall_s": loop.wall,
        "tokens": trainer.tokens,
        "mu_first": trainer.mus[0] if trainer.mus else None,
        "mu_last": trainer.mus[-1] if trainer.mus else None,
        "entropy_target": trainer.entropy_target,
        **loop.evaluator.results,
    }
    replace_text(folder / "summary.json", json.dumps(summary, indent=1))
    loop.files.say(results_table(summary))
    report = write_report(folder)
    loop.files.say(f"report:  {report}\nsummary: {folder / 'summary.json'}")


def _export(parts: Parts, folder: Path) -> None:
    """The policy as a transformers folder with all that loads it. Raises UserError when it cannot be written."""
    try:
        parts.engine.export(folder)
        if parts.engine.world.main:
            save_encoder(parts.encoder, folder)
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"{folder} could not be written: {getattr(e, 'strerror', None) or e}; the last checkpoint is whole: make room, "
            "and --resume writes it from that"
        ) from None


def evaluate(
    cfg: Config,
    task: Task | None = None,
    on_results: Callable[[dict[str, dict[str, float]], list[str]], None] = lambda results, missing: None,
    say: Callable[[str], None] | None = None,
) -> dict[str, dict[str, float]]:
    """{split: figures} of `model.path` on the config's task or on `task`, by the settings of `eval`.

    `on_results` is given, before the first split and after each, the results so far and the splits that are still missing;
    `say` is told how it goes. The processes of a launcher share the answers; each gets all figures, and rank 0 alone calls
    `on_results` and `say`. Raises UserError, and InterruptedError with the exit code when it was stopped.
    """
    with StopSignal() as stop, watched(join_readers(cfg), AGAIN) as world:
        encoder, task = read_data(cfg, world, task)
        engine = make_reader(cfg, world, encoder, stop)
        e = cfg.eval
        splits = check_splits("eval.splits", e.splits, task)
        answers = len(world.share(count_answers(task, splits, e.max_prompts, e.num_samples)))
        shown = say is not None and world.main
        tell = say if shown else lambda text: None
        keep = on_results if world.main else lambda results, missing: None
        results: dict[str, dict[str, float]] = {}
        try:
            with phase("evaluating", answers, "answers", shown=shown, bars=cfg.log.progress, say=tell) as progress:
                for i, split in enumerate(splits):
                    keep(results, splits[i:])
                    tell(f"evaluating {split} ...")
                    results |= evaluate_splits(
                        engine, task, encoder, [split], **of_config(cfg), on_answer=progress.advance, world=world
                    )
                keep(results, [])
            return results
        except InterruptedError:
            raise InterruptedError(stop.exit_code) from None
        finally:
            engine.close()


def results_table(summary: dict[str, Any]) -> str:
    """Success per split before and after, where it was evaluated after the warm-up too, as aligned text."""
    end, warmup = summary.get("end", {}), "warmup" in summary
    stages = [summary.get(name, {}) for name in WHOLE if name != "warmup" or warmup]
    k = next((row["k"] for row in end.values()), 0)
    wide, column = max(len(split) + 1 for split in ("success", *end)), 13 + 9 * (len(stages) - 1)
    lines = [f"{'success':<{wide}}" + "".join(f"{name:>{column}}" for name in ("greedy", "sampled", f"pass@{k}"))]
    for split in end:
        rows = [stage.get(split, {}) for stage in stages]
        cells = [
            [f"{row[name]:.1%}" if name in row else "–" for row in rows] for name in ("greedy", "sampled", "pass_at_k")
        ]
        lines.append(f"{split:<{wide}}" + "".join(f"{' -> '.join(_aligned(c)):>{column}}" for c in cells))
    return "\n".join([*lines, "start -> after the warm-up -> end"] if warmup else lines)


def _aligned(cells: list[str]) -> list[str]:
    """Of one column's stages, so that arrows stand one below the other."""
    return [f"{cell:>5}" for cell in cells[:-1]] + [f"{cells[-1]:<5}"]
