"""The AMFT loop, top to bottom as the paper has it.

warm up on demos; H* ← entropy of the warmed-up policy on its own rollouts
for each step:
    rollouts ← engine.generate(prompts, G per prompt)
    A ← advantages(rewards)
    backward SFT micro-batches · μ,  RL micro-batches · (1−μ)
    optimizer.step();  engine.sync(weights)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from amft_fast import controller, objective
from amft_fast.config import Config
from amft_fast.data.batch import Batch, TokenSequence, micro_batches, scatter
from amft_fast.data.loader import Loader
from amft_fast.data.pictures import data_uri
from amft_fast.data.stream import Stream
from amft_fast.errors import RolloutFailure, UserError
from amft_fast.interfaces import Item, Sample, Sampling
from amft_fast.meta_gradient import Utility, UtilityGradient
from amft_fast.model import attention
from amft_fast.model.policy import MAXES, SUMS, Scores
from amft_fast.rollout import episodes
from amft_fast.rollout.ahead import Ahead
from amft_fast.rollout.dynamic import draw_with_spread
from amft_fast.run import checkpoint, state
from amft_fast.run.build import Parts, RunFiles
from amft_fast.run.evaluate import check_splits, choose, evaluate
from amft_fast.run.figures import StepFigures, read_step, rollout_figures
from amft_fast.run.profiling import StepProfiler, static_bytes
from amft_fast.run.writers import PHASES


class Trainer:
    """One run: its parts, its state, its loop. `run()` returns when all steps are done or a stop was asked for."""

    def __init__(self, cfg: Config, parts: Parts, files: RunFiles) -> None:
        self.cfg, self.files = cfg, files
        self.task, self.encoder, self.policy = parts.task, parts.encoder, parts.policy
        self.engine, self.rollouts, self.phases = parts.engine, parts.rollouts, parts.phases
        self.world = self.engine.world
        self.controller = controller.make(cfg)
        self.should_stop = parts.should_stop
        self.prompts = self.task.prompts("train")
        self.demos = self.task.demos("train")
        self.prompt_stream = Stream(len(self.prompts), cfg.run.seed, "prompts")
        self.demo_stream = Stream(max(len(self.demos), 1), cfg.run.seed, "demos")
        self.demo_loader = Loader(self.demo_stream, self.make_demo, cfg.train.data_workers)
        self.dynamic_figures: dict[str, float] = {}
        self.utility_gradient = self._make_utility() if self.controller.learned else None
        self.utility: Utility | None = None  # u of the present window
        self.ahead = Ahead() if cfg.rollout.async_steps else None
        self.sync_failure: RolloutFailure | None = None
        self.mismatch_warnings = 0
        self.reference: torch.nn.Module | None = None
        self.total = cfg.train.warmup_steps + cfg.train.steps
        self.step, self.saved_step = 0, -1
        self.entropy_target: float | None = None
        self.evaluated_step, self.evaluations = -1, 0
        self.warmup_tokens = 0
        self.mus: list[float] = []
        self.tokens = 0
        self.wall_before = 0.0
        self.started = time.perf_counter()
        self.best: float | None = None
        self.results: dict[str, Any] = {}
        self.profiler = None
        if cfg.profile.steps:
            self.profiler = StepProfiler(
                files.folder / "profile", cfg.profile.steps, cfg.profile.skip, self.engine.device
            )
        self._check_needs()

    def _make_utility(self) -> UtilityGradient:
        """The held-out prompts that μ is learned on, with their demonstrations."""
        items = choose(self.task.prompts("val"), self.cfg.meta.prompts)
        if len(items) < 2:
            raise UserError(
                f"method {self.cfg.train.method!r} needs at least 2 validation prompts, the task has {len(items)}"
            )
        return UtilityGradient(
            self.cfg.meta,
            items,
            {d.id: d for d in self.task.demos("val")} if self.cfg.meta.utility != "reward" else {},
            self.encoder,
            self.engine,
            self.batches,
            self.cfg.rollout.temperature,
        )

    def _check_needs(self) -> None:
        """What the method needs must be there, before any time is spent."""
        needs_demos = self.cfg.train.warmup_steps > 0 or any(
            self.controller.mu(t) > 0 for t in range(self.cfg.train.steps)
        )
        if needs_demos and not self.demos:
            raise UserError(
                f"train.method {self.cfg.train.method!r} (or its warm-up) needs demonstrations and the task has none"
            )
        if not self.prompts:
            raise UserError("the task has no training prompts")
        self.splits = check_splits("eval.splits", self.cfg.eval.splits, self.task)
        check_splits("eval.schedule_splits", self.cfg.eval.schedule_splits, self.task)

    @property
    def finished(self) -> bool:
        budget = self.cfg.train.token_budget
        return self.step >= self.total if budget is None else self.tokens >= budget

    @property
    def clock(self) -> float:
        """The position of the run on a scale of `train.steps`: steps after the warm-up, or the token budget's used share."""
        cfg = self.cfg.train
        if cfg.token_budget is None:
            return self.step - cfg.warmup_steps
        if self.step < cfg.warmup_steps:
            return -1
        used = (self.tokens - self.warmup_tokens) / max(cfg.token_budget - self.warmup_tokens, 1)
        return min(used, 1.0) * cfg.steps

    # ------------------------------------------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Trains to the end, or until a stop was asked for: then the state is saved and InterruptedError raised."""
        try:
            while True:
                if self.evaluation_due():
                    self.evaluate()
                if self.finished:
                    break
                if self.checkpoint_due():
                    state.save(self)
                if self.world.any(self.should_stop()):
                    raise InterruptedError
                if self.step == self.cfg.train.warmup_steps and self.entropy_target is None:
                    self.warmup_tokens = self.tokens
                    self.after_warmup()
                self.profiled(self.train_step)
                if self.sync_failure is not None:
                    raise self.sync_failure
        except InterruptedError:
            state.save(self)
            raise
        except RolloutFailure as e:
            raise UserError(f"{e}; the state is saved in {state.save(self)}, go on with --resume") from e
        state.save(self)

    def profiled(self, step: Callable[[], dict[str, Any]]) -> None:
        """One step and its record, profiled where `profile.steps` asks for it."""
        if self.profiler is not None:
            self.profiler.begin()
        record = step()
        self.record(record)
        if self.profiler is not None:
            report = self.profiler.done(record, static_bytes(self.engine, self.utility))
            if report is not None:
                self.files.say(report)

    def train_step(self) -> dict[str, Any]:
        """One step: rollouts, advantages, `minibatches_per_rollout` updates, new weights to the rollout engine."""
        cfg = self.cfg.train
        begin = time.perf_counter()
        t = self.step - cfg.warmup_steps
        mu = 1.0 if t < 0 else self.controller.mu(self.clock)
        rewind = self.prompt_stream.position, self.demo_stream.position
        try:
            self.dynamic_figures = {}
            samples = self.draw_rollouts() if mu < 1 else []
            utility_figures = self.begin_window(t)
        except (
            InterruptedError,
            RolloutFailure,
        ):  # nothing has changed yet: on resume the same step draws the same samples
            self.prompt_stream.position, self.demo_stream.position = rewind
            raise
        self.draw_ahead(mu)
        sft = self.draw_demos() if mu > 0 else []
        with self.phases("advantage"):
            rl = self.judge(samples)
            extra = self.implicit_rewards(sft, rl) | self.entropy_at_one(rl)
        lr = self.learning_rate(t, mu)
        self.engine.set_lr(lr)

        sums, maxes, norms = [], [], []
        probe = None
        for k in range(cfg.minibatches_per_rollout):
            m = cfg.minibatches_per_rollout
            probed = k == 0 and t >= 0 and self.controller.learned and self.controller.probes(t)
            with self.phases("update"):
                s, x, norm, sweep = self.update(_share(sft, k, m), _share(rl, k, m), mu, probed)
            sums.append(s), maxes.append(x), norms.append(norm)
            probe = sweep if probed else probe
        self.step += 1
        with self.phases("sync"):
            self.sync_weights()
        figures = self.read_figures(sums, maxes, norms, probe)
        figures.record |= extra
        if self.controller.learned and t >= 0:
            entropy, seen = figures.record["entropy"], figures.probe or (None, 1.0)
            figures.record |= self.controller.observe(t, *seen, lr, entropy, self.entropy_target) | utility_figures
            self.warn_at_bound()
        record = {"step": self.step - 1, "phase": "warmup" if t < 0 else "train", "mu": mu, "lr": lr, **figures.record}
        record |= rollout_figures(samples) | self.dynamic_figures
        if samples and self.ahead is not None:
            record["staleness"] = sum(record["step"] - s.weight_version for s in samples) / len(samples)
        self.warn_of_mismatch(record)
        if t >= 0:
            self.mus = [*(self.mus[:1] or [mu]), mu]
        seconds = time.perf_counter() - begin
        tokens = int(sum(len(s.ids) for s in sft + rl) + sum(sum(s.loss_mask) for s in samples))
        tokens += int(utility_figures.get("controller/tokens", 0) + self.dynamic_figures.get("dynamic/tokens", 0))
        self.tokens += tokens
        record |= {"entropy_target": self.entropy_target, "tokens": tokens, "tokens_per_s": tokens / seconds}
        record |= {"seconds": seconds, **{f"time/{k}": v for k, v in self.phases.read().items() if k in PHASES}}
        self.keep_samples(samples)
        return record

    def begin_window(self, t: int) -> dict[str, float]:
        """At the start of a window: the utility gradient u that the probes of its steps are taken with."""
        if t < 0 or not self.controller.learned or not self.controller.starts_window(t):
            return {}

        def draw(items: list[Item], step: int) -> list[Sample]:
            return self.sample(items, self.cfg.rollout.temperature, ("utility", step), self.cfg.meta.num_generations)

        with self.phases("utility"):
            self.utility = self.utility_gradient.compute(self.step, draw)
        return {f"controller/{k}": v for k, v in self.utility.figures.items()}

    def draw_rollouts(self) -> list[Sample]:
        """G answers to each of the step's prompts, judged by the task; those that were drawn ahead, where they were."""
        cfg = self.cfg.rollout
        if self.ahead is not None:
            with self.phases("rollout"):
                drawn = self.world.together(self.ahead.take)
            if drawn[0] is not None:
                return [sample for part in drawn for sample in part]

        def take(n: int) -> list[Item]:
            return [self.prompts[i] for i in self.prompt_stream.take(n)]

        def draw(items: list[Item], redraw: int) -> list[Sample]:
            # A prompt that comes again in the same step must not draw the same samples again.
            purpose = ("train", self.step, redraw) if redraw else ("train", self.step)
            return self.sample(items, cfg.temperature, purpose, cfg.num_generations)

        count = self.cfg.train.prompts_per_step
        if not cfg.dynamic_sampling:
            return draw(take(count), 0)
        samples, self.dynamic_figures = draw_with_spread(draw, take, count, cfg.max_redraws)
        return samples

    def draw_ahead(self, mu: float) -> None:
        """All rollouts of this step are there: the next step's begin in a thread, or the engine may rest until the sync."""
        if self.ahead is None:
            self.rollouts.rest()
            return
        if mu == 1 or self.step + 1 >= self.total:
            return
        cfg = self.cfg
        items = [self.prompts[i] for i in self.prompt_stream.take(cfg.train.prompts_per_step)]
        purpose = ("train", self.step + 1)
        mine = self.world.share(len(items) * cfg.rollout.num_generations)
        self.ahead.start(
            lambda: self.run_episodes(items, cfg.rollout.temperature, purpose, cfg.rollout.num_generations, mine)
        )

    def sync_weights(self) -> None:
        """The new weights to the rollout engine, once nothing is drawn with the old ones; a failure waits for the record."""
        try:
            if self.ahead is not None:
                try:
                    self.world.together(self.ahead.wait)
                except (InterruptedError, RolloutFailure):  # its prompts are drawn again by the next step
                    self.ahead.drop()
                    self.prompt_stream.position -= self.cfg.train.prompts_per_step
                    raise
            self.world.together(self.send_weights)
        except RolloutFailure as e:
            self.sync_failure = e

    def send_weights(self) -> None:
        params = self.engine.named_full_params()
        try:
            self.rollouts.sync(params, self.step)
        except RolloutFailure:
            for _ in params:  # other ranks go on gathering them
                pass
            raise

    def sample(self, items: list[Item], temperature: float, purpose: tuple, num_generations: int) -> list[Sample]:
        with self.phases("rollout"):
            return self.world.spread(
                len(items) * num_generations,
                lambda mine: self.run_episodes(items, temperature, purpose, num_generations, mine),
            )

    def run_episodes(
        self, items: list[Item], temperature: float, purpose: tuple, num_generations: int, mine: range
    ) -> list[Sample]:
        """This rank's samples of all that are drawn."""
        return episodes.run(
            self.rollouts,
            self.task,
            items,
            self.encoder,
            Sampling(temperature=temperature, stop_token_ids=self.encoder.stop_token_ids),
            num_generations=num_generations,
            max_new_tokens=self.cfg.rollout.max_new_tokens,
            seed_parts=(self.cfg.run.seed, *purpose),
            only=mine,
        )

    def draw_demos(self) -> list[TokenSequence]:
        """The step's demonstrations, tokenised."""
        return self.demo_loader.take(self.cfg.train.demos_per_step)

    def make_demo(self, i: int) -> TokenSequence:
        return objective.demo_sequence(*self.encoder.demo(self.demos[i]))

    def judge(self, samples: list[Sample]) -> list[TokenSequence]:
        """Rollouts as sequences with all that the loss reads: advantages, and old and reference log-probs where needed."""
        rl = [objective.rollout_sequence(s, self.cfg.rollout.temperature) for s in samples]
        if not rl:
            return rl
        gae = self.cfg.advantage.kind == "gae"
        # One update per rollout is on-policy by construction: the ratio is 1 and old log-probs would be a wasted pass.
        off_policy = self.cfg.train.minibatches_per_rollout > 1 or self.ahead is not None
        if off_policy or gae:
            scores = self.forward_only(rl)
            if off_policy:
                scatter(rl, scores, [s.logprobs for s in scores], "old_logprobs")
            if gae:
                scatter(rl, scores, [s.values for s in scores], "values")
        if self.cfg.objective.kl_coef > 0:
            scores = self.forward_only(rl, self.reference)
            scatter(rl, scores, [s.logprobs for s in scores], "ref_logprobs")
        objective.set_advantages(rl, samples, self.cfg.advantage)
        return rl

    def entropy_at_one(self, rl: list[TokenSequence]) -> dict[str, float]:
        """The policy's entropy at temperature 1, as H* has it, where rollouts are drawn at another temperature."""
        if self.cfg.rollout.temperature == 1 or not rl:
            return {}
        entropies = torch.cat([s.entropy for s in self.forward_only(rl, temperature=1.0)])
        return {"entropy": entropies.double().mean().item()}

    def implicit_rewards(self, sft: list[TokenSequence], rl: list[TokenSequence]) -> dict[str, float]:
        """Mean over sequences of log π/π_ref along the whole answer: the reward that imitation implies (docs/method.md)."""
        if not self.cfg.log.implicit_reward or self.reference is None:
            return {}
        figures = {}
        for name, sequences in (("demos", sft), ("rollouts", rl)):
            now, then = self.forward_only(sequences), self.forward_only(sequences, self.reference)
            total = sum((a.logprobs - b.logprobs).double().sum() for a, b in zip(now, then))
            if sequences:
                figures[f"implicit_reward/{name}"] = float(total) / len(sequences)
        return figures

    def forward_only(
        self, sequences: list[TokenSequence], model: torch.nn.Module | None = None, temperature=None
    ) -> list[Scores]:
        """Log-probs, entropies and values of all trained tokens, without gradients; on every rank those of all ranks."""
        batches = self.batches(sequences)
        outs = [self.engine.logprobs(b, model, temperature) for b in batches]
        scores = [Scores(b.members, b.counts, o.logprobs, o.entropy, o.values) for b, o in zip(batches, outs)]
        return self.world.gather([s.cpu() for s in scores if s.members]) if self.world.size > 1 else scores

    def batches(self, sequences: list[TokenSequence]) -> list[Batch]:
        """This rank's micro-batches of sequences that all ranks hold: equally many on each."""
        cfg = self.cfg.train
        return micro_batches(
            sequences, cfg.micro_batch_tokens, self.packed, rank=self.world.rank, ranks=self.world.size
        )

    @property
    def packed(self) -> bool:
        """As the config says, else where the attention takes packed rows without a dense mask."""
        packing = self.cfg.train.packing
        return attention.packs(self.policy.model.config) if packing is None else packing

    def update(self, sft: list[TokenSequence], rl: list[TokenSequence], mu: float, probed: bool = False):
        """One optimizer update on L = μ L_SFT + (1−μ) L_RL.

        Plain: SFT and RL rows ride in the same calls of the head. Probed: two sweeps, with the dot-products taken after.
        """
        value_coef = self.cfg.advantage.value_coef if self.policy.value_head is not None else 0.0
        counts = objective.count_tokens(sft, rl)
        sft = objective.weigh_sft(sft, mu, counts.sft)
        rl = objective.weigh_rl(rl, mu, counts.rl, self.cfg.objective, value_coef)
        if not probed:
            return *self.sweep(sft + rl), self.engine.step(), None
        sft_sums, sft_maxes = self.sweep(sft)
        self.engine.end_sweep("sft")
        rl_sums, rl_maxes = self.sweep(rl)
        self.engine.end_sweep("rl")
        probe = self.engine.probe(self.utility.halves)
        return sft_sums + rl_sums, torch.maximum(sft_maxes, rl_maxes), self.engine.step(), probe

    def sweep(self, sequences: list[TokenSequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """Backward over all micro-batches of these sequences; statistics as device sums and maxima."""
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.engine.device)
        maxes = torch.zeros(len(MAXES), dtype=torch.float64, device=self.engine.device)
        for batch in self.batches(sequences):
            out = self.engine.backward(batch)
            sums += out.sums
            maxes = torch.maximum(maxes, out.maxes)
        return sums, maxes

    def learning_rate(self, t: int, mu: float) -> float:
        """The learning rate of step t after the warm-up (negative: in it)."""
        cfg = self.cfg.train
        if mu == 1:
            return cfg.sft_lr or cfg.lr
        ramp = min(1.0, (t + 1) / cfg.lr_warmup_steps) if cfg.lr_warmup_steps else 1.0
        progress = self.clock / cfg.steps
        shape = {
            "constant": 1.0,
            "linear": 1 - 0.9 * progress,
            "cosine": 0.1 + 0.45 * (1 + float(np.cos(np.pi * progress))),
        }[cfg.lr_schedule]
        return cfg.lr * ramp * shape

    def after_warmup(self) -> None:
        """H*, the entropy of the warmed-up policy on its own rollouts, and the reference of the KL term."""
        chosen = self.prompts[: self.cfg.train.prompts_per_step]
        samples = self.sample(list(chosen), 1.0, ("entropy target",), self.cfg.rollout.num_generations)
        rl = [objective.rollout_sequence(s, 1.0) for s in samples]
        outs = [s.entropy for s in self.forward_only(rl)]
        self.entropy_target = torch.cat(outs).double().mean().item()
        if self.cfg.objective.kl_coef > 0 or self.cfg.log.implicit_reward:
            self.reference = self.engine.plain_copy()

    # ------------------------------------------------------------------------------------------------- what is recorded

    def read_figures(self, sums: list, maxes: list, norms: list, probe: tuple | None) -> StepFigures:
        guard = torch.stack([self.engine.bad_in_row, self.engine.bad_total])
        kl, value = self.cfg.objective.kl_coef > 0, self.policy.value_head is not None
        sums, maxes = [self.world.sum(s) for s in sums], [self.world.max(x) for x in maxes]
        figures = read_step(sums, maxes, norms, guard, probe, kl, value)
        self.engine.skipped = figures.bad_total
        self.guard(figures.record, figures.bad_in_row)
        return figures

    def warn_of_mismatch(self, record: dict[str, Any]) -> None:
        """Says when engine and trainer disagree on log-probs: at the first such step, then at every fiftieth."""
        apart = record.get("mismatch_mean", 0.0)
        if self.ahead is None and apart > self.cfg.rollout.mismatch_warn:
            if self.mismatch_warnings % 50 == 0:
                self.files.say(
                    f"step {record['step']}: rollout engine and trainer differ by {apart:.3g} in log-prob on the mean (largest "
                    f"{record['mismatch_max']:.3g}), over rollout.mismatch_warn; objective.tis_cap bounds what that does"
                )
            self.mismatch_warnings += 1

    def warn_at_bound(self) -> None:
        if self.controller.at_bound == 3:
            self.files.say(
                f"step {self.step - 1}: mu has sat at its bound {self.controller.value:g} for 3 windows: the controller would "
                "go further than controller.mu_min and mu_max allow"
            )

    def guard(self, figures: dict[str, Any], bad_in_row: int) -> None:
        """Names an update that was skipped because something was not finite; gives up after several in a row."""
        if not bad_in_row:
            return
        which = "loss" if not np.isfinite(figures["loss"]) else "gradient"
        self.files.say(
            f"step {self.step - 1}: the {which} was not finite, the update was skipped ({bad_in_row} in a row)"
        )
        if bad_in_row >= self.cfg.train.max_bad_steps:
            path = state.save(self)
            raise UserError(
                f"stopped after {bad_in_row} updates in a row whose {which} was not finite (train.max_bad_steps); the state "
                f"is saved in {path}. Lower train.lr or train.max_grad_norm and go on with --resume"
            )

    def record(self, record: dict[str, Any]) -> None:
        self.files.metrics.write(record)
        self.files.tensorboard.write(record["step"], record)
        shown = ("mu", "success", "sft_loss", "entropy", "grad_norm")
        budget = self.cfg.train.token_budget
        done = self.step if budget is None else self.cfg.train.warmup_steps + int(self.clock)
        self.files.progress.step(done, {k: record.get(k) for k in shown})

    def keep_samples(self, samples: list[Sample]) -> None:
        """A few completions of this step for the report: the first group, then one of each following."""
        every = self.cfg.log.samples_every
        if not samples or not every or (self.step - 1) % every:
            return
        groups = {s.group_id: s for s in reversed(samples)}
        draws = getattr(self.task, "picture", None)
        items = {item.id: item for item in self.prompts} if draws else {}
        for s in list(groups.values())[::-1][: self.cfg.log.samples]:
            prompt = self.encoder.tokenizer.decode(s.prompt_ids)
            kept = {
                "step": self.step - 1,
                "prompt": prompt,
                "completion": s.text,
                "reward": s.reward,
                "success": s.success,
            }
            if draws:
                kept["picture"] = data_uri(draws(items[s.prompt_id], s))
            self.files.samples.write(kept)

    # --------------------------------------------------------------------------------------------------------- evaluation

    def evaluation_due(self) -> bool:
        """At the start, at the end, and each time the clock has passed another `eval.every`."""
        if self.evaluated_step == self.step:
            return False
        every = self.cfg.eval.every
        passed = int(self.clock // every) if every and self.clock >= 0 else -1
        return self.step == 0 or self.finished or passed >= self.evaluations

    def evaluate(self) -> None:
        """All splits with all prompts at the start and the end, the scheduled ones in between."""
        cfg, whole = self.cfg.eval, self.step == 0 or self.finished
        splits = self.splits if whole else cfg.schedule_splits
        with self.phases("eval"):
            result = evaluate(
                self.rollouts,
                self.task,
                self.encoder,
                splits,
                num_samples=cfg.num_samples if whole else cfg.schedule_num_samples,
                max_prompts=cfg.max_prompts if whole else cfg.schedule_max_prompts,
                max_new_tokens=self.cfg.rollout.max_new_tokens,
                seed=self.cfg.run.seed,
                temperature=cfg.temperature,
                top_p=cfg.top_p,
                world=self.world,
            )
        self.evaluated_step = self.step
        if cfg.every and self.clock >= 0:
            self.evaluations = int(self.clock // cfg.every) + 1
        if whole:
            self.results["start" if self.step == 0 else "end"] = result
        wall = self.wall()
        self.files.evals.write(
            {"step": self.step - 1, "at": self.step, "tokens": self.tokens, "wall_s": wall, "full": whole, **result}
        )
        flat = {f"{split}/{k}": v for split, row in result.items() for k, v in row.items()}
        self.files.tensorboard.write(self.step, {f"eval/{k}": v for k, v in flat.items()})
        self.files.say(
            f"eval at {self.step}: " + "  ".join(f"{s} {r['greedy']:.1%}/{r['sampled']:.1%}" for s, r in result.items())
        )
        self._track_best(flat, whole)

    def _track_best(self, flat: dict[str, float], whole: bool) -> None:
        value = flat.get(self.cfg.checkpoint.metric)
        if not self.cfg.checkpoint.keep_best or value is None or whole or self.step <= self.cfg.train.warmup_steps:
            return
        if self.best is None or value > self.best:
            self.best = value
            path = state.save(self)
            if self.world.main:
                checkpoint.mark_best(self.files.checkpoints, path)

    def wall(self) -> float:
        """Seconds of work so far, over all resumptions."""
        return self.wall_before + time.perf_counter() - self.started

    # -------------------------------------------------------------------------------------------------------- checkpoints

    def checkpoint_due(self) -> bool:
        every = self.cfg.checkpoint.every
        return every > 0 and self.step > 0 and self.step % every == 0 and self.saved_step != self.step


def _share(sequences: list[TokenSequence], k: int, m: int) -> list[TokenSequence]:
    """The k-th of m equal runs of the list."""
    n = len(sequences)
    return sequences[k * n // m : (k + 1) * n // m]
