"""Evaluation: greedy success, sampled success and pass@k on splits of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb, sqrt
from typing import Any

from amft_fast.config import Config
from amft_fast.data.stream import choose
from amft_fast.engine.world import ALONE, World
from amft_fast.errors import UserError
from amft_fast.interfaces import Item, RolloutEngine, Sample, Sampling, Task
from amft_fast.rollout import episodes
from amft_fast.rollout.encoder import Encoder
from amft_fast.run import answers
from amft_fast.trainer import Parts, Trainer

WHOLE = ("start", "warmup", "end")  # of the evaluations on all splits


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k answers is right, from `correct` of n (Chen et al., arXiv 2107.03374).

    Raises ValueError unless 1 <= k <= n and 0 <= correct <= n.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"need 1 <= k <= n and 0 <= correct <= n, got n={n}, correct={correct}, k={k}")
    return 1.0 - comb(n - correct, k) / comb(n, k)


def check_splits(name: str, splits: Sequence[str] | None, task: Task) -> list[str]:
    """The splits that the setting `name` asks for, all of the task's by default. Raises UserError for one it does not have."""
    for split in splits or ():
        if split not in task.splits:
            raise UserError(f"{name}: {split!r} is not a split of this task, which has {', '.join(task.splits)}")
    return list(task.splits if splits is None else splits)


def count_answers(task: Task, splits: Sequence[str], max_prompts: int | None, num_samples: int) -> int:
    """How many answers `evaluate` draws."""
    prompts = (len(task.prompts(split)) for split in splits)
    return (1 + num_samples) * sum(n if max_prompts is None else min(n, max_prompts) for n in prompts)


def evaluate(
    engine: RolloutEngine,
    task: Task,
    encoder: Encoder,
    splits: Sequence[str],
    *,
    num_samples: int,
    max_new_tokens: int,
    seed: int,
    max_prompts: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    on_split: Callable[[str], None] = lambda split: None,
    on_sampled: Callable[[str, list[Item], list[Sample]], None] = lambda split, items, samples: None,
    on_answer: Callable[[], object] = lambda: None,
    world: World = ALONE,
) -> dict[str, dict[str, float]]:
    """`{split: {greedy, sampled, pass_at_k, ...}}`, all fractions; the seeds are the same at each call.

    Beside them: `prompts`, `k`, `stderr` (standard error of `sampled` over prompts), `length` (tokens per sampled answer),
    `truncated`, `no_answer` (where the task says what it read), and the mean of every float a task reports in its info.
    `on_sampled` is given each split's items and sampled answers, `num_samples` an item, in order; `on_answer` is called for
    each answer that this rank has drawn.
    The ranks of `world` share the work, and each gets all figures.
    """
    stop = encoder.stop_token_ids
    out: dict[str, dict[str, float]] = {}
    for split in splits:
        items = choose(task.prompts(split), max_prompts)
        on_split(split)
        common = {"max_new_tokens": max_new_tokens, "seed_parts": (seed, "eval", split)}

        def draw(sampling: Sampling, k: int, items=items, common=common) -> list[Sample]:
            return world.spread(
                len(items) * k,
                lambda mine: episodes.run(
                    engine, task, items, encoder, sampling, num_generations=k, only=mine, on_answer=on_answer, **common
                ),
            )

        greedy = draw(Sampling(temperature=0.0, stop_token_ids=stop), 1)
        sampled = draw(Sampling(temperature=temperature, top_p=top_p, stop_token_ids=stop), num_samples)
        on_sampled(split, items, sampled)
        out[split] = summarise(greedy, sampled, num_samples)
    return out


def of_config(cfg: Config) -> dict[str, Any]:
    """What a config says of an evaluation of whole splits, as `evaluate` takes it."""
    e = cfg.eval
    drawn = {"num_samples": e.num_samples, "temperature": e.temperature, "top_p": e.top_p, "max_prompts": e.max_prompts}
    return {**drawn, "max_new_tokens": cfg.rollout.max_new_tokens, "seed": cfg.run.seed}


class Evaluator:
    """Evaluations of a run: when they are due, what they cover, and what came of them."""

    def __init__(self, cfg: Config, parts: Parts) -> None:
        self.cfg, self.parts = cfg, parts
        self.splits = check_splits("eval.splits", cfg.eval.splits, parts.task)
        check_splits("eval.schedule_splits", cfg.eval.schedule_splits, parts.task)
        # At the clock's 0, where there is no warm-up, stands the evaluation at the start, on the schedule too.
        self.evaluated_step, self.evaluations = -1, int(not (cfg.eval.at_start or cfg.train.warmup_steps))
        self.after_warmup = cfg.eval.after_warmup and cfg.train.warmup_steps > 0
        self.best: float | None = None
        self.best_step: int | None = None  # which has it
        self.results: dict[str, Any] = {}  # of the whole evaluations, by their names in WHOLE

    def due(self, trainer: Trainer) -> bool:
        """At the start (`eval.at_start`), after the warm-up (`eval.after_warmup`), at the end, and each time the clock has
        passed another `eval.every`."""
        if self.evaluated_step == trainer.step:
            return False
        whole = self.whole(trainer)
        if whole is not None:
            return whole != "start" or self.cfg.eval.at_start
        every = self.cfg.eval.every
        passed = int(trainer.clock // every) if every and trainer.clock >= 0 else -1
        return passed >= self.evaluations

    def whole(self, trainer: Trainer) -> str | None:
        """Which of WHOLE an evaluation now is, of all splits with all prompts; None: a scheduled one."""
        if trainer.step == 0:
            return "start"
        if trainer.finished:
            return "end"
        return "warmup" if self.after_warmup and trainer.step == self.cfg.train.warmup_steps else None

    def answers(self, whole: bool) -> int:
        """How many answers an evaluation draws, of all ranks."""
        cfg, task = self.cfg.eval, self.parts.task
        most, k = (cfg.max_prompts, cfg.num_samples) if whole else (cfg.schedule_max_prompts, cfg.schedule_num_samples)
        return count_answers(task, self.splits if whole else cfg.schedule_splits, most, k)

    def answers_left(self) -> int:
        """How many the evaluations to come draw, in the rest of the schedule and at the end."""
        every, steps = self.cfg.eval.every, self.cfg.train.steps
        scheduled = max(-(-steps // every) - max(self.evaluations, int(self.after_warmup)), 0) if every else 0
        whole = 1 + int(self.after_warmup and "warmup" not in self.results)
        return scheduled * self.answers(whole=False) + whole * self.answers(whole=True)

    def evaluate(
        self, trainer: Trainer, on_answer: Callable[[], object] = lambda: None
    ) -> tuple[dict[str, dict[str, float]], bool, list[dict[str, Any]]]:
        """The figures by split; whether it was a whole one; and a few answers of each split as people read them."""
        cfg, whole = self.cfg.eval, self.whole(trainer)
        kept: list[dict[str, Any]] = []

        def keep(split: str, items: list[Item], samples: list[Sample]) -> None:
            k = len(samples) // max(len(items), 1)
            for item, sample in list(zip(items, samples[::k] if k else []))[: self.cfg.log.samples]:
                kept.append({"split": split, **answers.kept(self.parts.task, item, sample)})

        result = evaluate(
            self.parts.rollout_engine,
            self.parts.task,
            self.parts.encoder,
            self.splits if whole else cfg.schedule_splits,
            num_samples=cfg.num_samples if whole else cfg.schedule_num_samples,
            max_prompts=cfg.max_prompts if whole else cfg.schedule_max_prompts,
            max_new_tokens=self.cfg.rollout.max_new_tokens,
            seed=self.cfg.run.seed,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            on_sampled=keep,
            on_answer=on_answer,
            world=self.parts.engine.world,
        )
        self.evaluated_step = trainer.step
        if cfg.every and trainer.clock >= 0:
            self.evaluations = int(trainer.clock // cfg.every) + 1
        if whole:
            self.results[whole] = result
        return result, whole is not None, kept

    def is_best(self, figures: dict[str, float]) -> bool:
        """Whether `checkpoint.metric` is the best so far, where the best is kept."""
        value = figures.get(self.cfg.checkpoint.metric)
        if not self.cfg.checkpoint.keep_best or value is None or (self.best is not None and value <= self.best):
            return False
        self.best, self.best_step = value, self.evaluated_step
        return True

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("evaluated_step", "evaluations", "best", "best_step", "results")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.state_dict():
            setattr(self, name, state.get(name))  # older checkpoints have no `best_step`


def summarise(greedy: list[Sample], sampled: list[Sample], k: int) -> dict[str, float]:
    """The figures of one split from its greedy samples (one per prompt) and its sampled ones (k per prompt, in order)."""
    n = len(greedy)
    if not n:
        return {"prompts": 0, "k": k, "greedy": 0.0, "sampled": 0.0, "pass_at_k": 0.0, "stderr": 0.0}
    right = [sum(s.success for s in sampled[i : i + k]) for i in range(0, len(sampled), k)]
    rates = [r / k for r in right]
    mean = sum(rates) / n
    variance = sum((r - mean) ** 2 for r in rates) / max(n - 1, 1)
    figures: dict[str, Any] = {
        "prompts": n,
        "k": k,
        "greedy": sum(s.success for s in greedy) / n,
        "sampled": mean,
        "pass_at_k": sum(pass_at_k(k, r, k) for r in right) / n,
        "stderr": sqrt(variance / n),
        "reward": sum(s.reward for s in sampled) / len(sampled),
        "length": sum(sum(s.loss_mask) for s in sampled) / len(sampled),
        "truncated": sum(s.finish_reason == "length" for s in sampled) / len(sampled),
    }
    read = [s.info["answer"] for s in sampled if "answer" in s.info]
    if read:
        figures["no_answer"] = sum(answer is None for answer in read) / len(read)
    names = {name for s in sampled for name, v in s.info.items() if isinstance(v, float)}
    for name in sorted(names):
        values = [s.info[name] for s in sampled if name in s.info]
        figures[name] = sum(values) / len(values)
    return figures
