"""Puts a run together: its folder and files, its parts, the signals that end it, and what it leaves behind."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amft_fast import __version__
from amft_fast.config import Config, TaskConfig
from amft_fast.config_file import to_toml
from amft_fast.controller import inert
from amft_fast.engine.deepspeed import DeepSpeedEngine, cut_while_loading
from amft_fast.engine.local import LocalEngine
from amft_fast.engine.watch import Watch
from amft_fast.engine.world import ALONE, World, join, launched_rank, launched_size
from amft_fast.errors import UserError
from amft_fast.interfaces import RolloutEngine, Task, UpdateEngine
from amft_fast.model import layers
from amft_fast.model.policy import Policy, load_model, load_tokenizer, pick_dtype
from amft_fast.model.vision import load_vision
from amft_fast.rollout.buckets import Bucketed
from amft_fast.rollout.encoder import Encoder
from amft_fast.rollout.transformers import TransformersEngine
from amft_fast.run import checkpoint, state
from amft_fast.run.writers import JsonLines, Phases, Progress, TensorBoard


class StopSignal:
    """Remembers a first SIGINT or SIGTERM, for the loop to save and stop; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.at = 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:
            # A launcher passes on the signal that the terminal has sent to all processes already.
            if launched_size() == 1 or time.monotonic() - self.at > 2:
                os._exit(128 + number)
            return
        self.received, self.at = number, time.monotonic()
        if launched_rank() == 0:
            print(f"\n{signal.Signals(number).name}: saving and stopping (once more: stop at once)", flush=True)

    def __call__(self) -> bool:
        return self.received is not None


@dataclass
class Parts:
    """What a trainer works with."""

    task: Task
    encoder: Encoder
    policy: Policy
    engine: UpdateEngine
    rollouts: RolloutEngine
    phases: Phases
    should_stop: Callable[[], bool]


class RunFiles:
    """The files of a run that grow while it goes."""

    def __init__(self, folder: Path, cfg: Config, total: int, resume_step: int) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.metrics: Any = JsonLines(folder / "metrics.jsonl", resume_step)
        self.evals: Any = JsonLines(folder / "evals.jsonl", resume_step)
        self.samples: Any = JsonLines(folder / "samples.jsonl", resume_step)
        self.tensorboard: Any = TensorBoard(folder / "tb", cfg.log.tensorboard, resume_step)
        self.progress: Any = Progress(total, resume_step, cfg.log.every, cfg.log.progress)

    def say(self, text: str) -> None:
        self.progress.say(text)

    def close(self) -> None:
        for part in (self.metrics, self.evals, self.samples, self.tensorboard, self.progress):
            part.close()


class NoFiles(RunFiles):
    """What ranks other than 0 have instead: nothing is written and nothing said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.metrics = self.evals = self.samples = self.tensorboard = self.progress = self

    def write(self, *record: Any) -> None: ...
    def step(self, done: int, figures: dict[str, float | None]) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


def pick_device(name: str) -> torch.device:
    """The device that run.device asks for, of this process when there are several on a machine.

    Raises UserError when CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "run.device is cuda, but torch sees no CUDA device; see amft-fast doctor, or use run.device cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and launched_size() > 1:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        name = f"cuda:{torch.cuda.current_device()}"
    return torch.device(name)


def make_task(cfg: TaskConfig) -> Task:
    """The task that task.name asks for, from its own section."""
    from amft_fast.tasks.general_points.vision import make_general_points
    from amft_fast.tasks.math.task import MathTask
    from amft_fast.tasks.virl.task import Virl

    settings = getattr(cfg, cfg.name).model_dump()
    try:
        return {"general_points": make_general_points, "virl": Virl, "math": MathTask}[cfg.name](**settings)
    except ValueError as e:
        raise UserError(f"task.{cfg.name}: {e}") from None


def build(cfg: Config, should_stop: Callable[[], bool]) -> Parts:
    """Task, policy, update engine and rollout engine as the config asks for them."""
    device = pick_device(cfg.run.device)
    world = join_world(cfg, device)
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    torch.manual_seed(cfg.run.seed)
    tokenizer = load_tokenizer(cfg.model)
    encoder = Encoder(tokenizer, load_vision(cfg.model, tokenizer.pad_token_id or 0))
    task = make_task(cfg.task)
    if hasattr(task, "prepare"):
        said = "\n".join(task.prepare(encoder.tokenizer))
        if world.main:
            print(said)
    with cut_while_loading(cfg.engine, pick_dtype(cfg.model, device), device):
        model = load_model(cfg.model, device)
    policy = Policy(model, cfg.objective, with_value=cfg.advantage.kind == "gae", vision=encoder.vision)
    policy.saving = layers.offload(model, cfg.model.offload_activations)
    engine = make_engine(cfg, policy, world, device)
    rollouts = make_rollouts(cfg, policy.model, engine, encoder, should_stop)
    return Parts(task, encoder, policy, engine, rollouts, Phases(device), should_stop)


def make_rollouts(
    cfg: Config, model: torch.nn.Module, engine: UpdateEngine, encoder: Encoder, should_stop: Callable[[], bool]
) -> RolloutEngine:
    """The rollout engine that rollout.engine asks for, with the policy's present weights."""
    if cfg.rollout.engine == "transformers":
        pad = encoder.tokenizer.pad_token_id or 0
        whole = engine.plain_copy() if engine.cut else model
        rollouts = TransformersEngine(whole, pad, cfg.rollout.max_batch, should_stop, encoder.vision, engine.cut)
        return Bucketed(rollouts, cfg.rollout.max_batch_tokens) if cfg.rollout.max_batch_tokens else rollouts
    from amft_fast.rollout import vllm
    from amft_fast.rollout.vllm.setup import Setup

    # A lone process that trains on what it has just drawn still holds the weights that were sent.
    alone = engine.world_size == 1 and cfg.rollout.async_steps == 0
    setup = Setup(
        cfg.rollout.vllm,
        model,
        cfg.model.path,
        model.device,
        Path(cfg.run.dir),
        should_stop=should_stop,
        weights=engine.named_full_params if alone else None,
        rank=engine.rank,
        world_size=engine.world_size,
    )
    rollouts = vllm.make(setup)
    rollouts.sync(engine.named_full_params(), 0)
    return rollouts


def join_world(cfg: Config, device: torch.device) -> World:
    """The processes of the run. Raises UserError when several were started for an engine of one process."""
    if cfg.engine.kind == "deepspeed":
        return join(device)
    if launched_size() > 1:
        raise UserError(
            f"{launched_size()} processes were started (WORLD_SIZE), but engine.kind local is for one: "
            "use --engine.kind deepspeed"
        )
    return ALONE


def make_engine(cfg: Config, policy: Policy, world: World, device: torch.device) -> UpdateEngine:
    """The update engine that engine.kind asks for."""
    if cfg.engine.kind == "local":
        return LocalEngine(policy, cfg.train, cfg.advantage.value_lr)
    if policy.vision is not None and (cfg.engine.zero_stage == 3 or cfg.model.vision != "frozen"):
        # Pictures make ranks pass through different parts of the model, and each waits for the others at every part.
        raise UserError(
            "engine.kind deepspeed trains vision-language models with model.vision frozen and engine.zero_stage 1 or 2 only, "
            f"got {cfg.model.vision} and {cfg.engine.zero_stage}"
        )
    return DeepSpeedEngine(
        policy, cfg.train, cfg.engine, world, lambda: load_model(cfg.model, device), cfg.advantage.value_lr
    )


def prepare_folder(cfg: Config, resume: bool) -> Path:
    """The run's folder. An earlier run there is an error, unless it is resumed or may be overwritten."""
    folder = Path(cfg.run.dir)
    try:
        if (folder / "metrics.jsonl").exists() and not resume:
            if not cfg.run.overwrite:
                raise UserError(
                    f"run.dir {str(folder)!r} holds an earlier run: go on with --resume, take another --run.dir, or delete it "
                    "with --run.overwrite"
                )
            for name in ("checkpoints", "tb", "model"):
                shutil.rmtree(folder / name, ignore_errors=True)
            for name in ("metrics.jsonl", "evals.jsonl", "samples.jsonl", "summary.json", "report.html", "report.png"):
                (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(to_toml(cfg))
        (folder / "environment.json").write_text(json.dumps(environment(), indent=1))
    except OSError as e:
        raise UserError(f"run.dir {str(folder)!r} cannot be written: {e.strerror}") from None
    return folder


def environment() -> dict[str, str]:
    """Versions and device, for the record."""
    import transformers

    from amft_fast.doctor.installed import cpu_name

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "amft_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "threads": str(torch.get_num_threads()),
    }


def train(cfg: Config, resume: bool = False) -> int:
    """Runs (or goes on with) the training that `cfg` describes; returns the process's exit code.

    0: done; 130 or 143: stopped by SIGINT or SIGTERM with the state saved.
    """
    from amft_fast.tasks.general_points.pretrain import leak

    stop = StopSignal()
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    folder = prepare_folder(cfg, resume) if launched_rank() == 0 else Path(cfg.run.dir)
    parts = build(cfg, stop)
    world = parts.engine.world
    watch = Watch(world)
    try:
        if world.main:
            for sentence in (inert(cfg), leak(cfg.model.path, parts.task)):
                if sentence:
                    print(sentence)
        code = go(cfg, resume, folder, parts, stop)
        world.barrier()
        return code
    except RuntimeError:
        watch.explain()
        raise
    finally:
        watch.leave()


def go(cfg: Config, resume: bool, folder: Path, parts: Parts, stop: StopSignal) -> int:
    """The run itself, on every rank; returns the exit code."""
    from amft_fast.train import Trainer

    world = parts.engine.world
    say = print if world.main else lambda text: None
    found = checkpoint.latest(folder / "checkpoints", say, world) if resume else None
    if resume and found is None:
        say(f"--resume: no whole checkpoint under {folder / 'checkpoints'}, starting from the beginning")
    total = cfg.train.warmup_steps + cfg.train.steps
    files = RunFiles(folder, cfg, total, found[2]["step"] if found else 0) if world.main else NoFiles(folder)
    try:
        trainer = Trainer(cfg, parts, files)
        if found:
            try:
                state.load(trainer, *found[1:])
            except ValueError as e:
                raise UserError(f"--resume: {found[0]} does not fit this config: {e}") from None
            files.say(f"resumed from {found[0]} at step {trainer.step} of {total}")
        try:
            trainer.run()
        except InterruptedError:
            files.say(f"stopped at step {trainer.step} of {total}; go on with --resume")
            return 128 + (stop.received or signal.SIGINT)
        finish(cfg, trainer, folder)
    finally:
        files.close()
        parts.rollouts.close()
    return 0


def finish(cfg: Config, trainer: Any, folder: Path) -> None:
    """The exported model, summary.json, report.html, and the table on the terminal."""
    from amft_fast.report.page import write_report

    if cfg.checkpoint.export:
        trainer.engine.export(folder / "model")
    if not trainer.world.main:
        return
    summary = {
        "method": cfg.train.method,
        "task": cfg.task.name,
        "seed": cfg.run.seed,
        "steps": trainer.step,
        "wall_s": trainer.wall(),
        "tokens": trainer.tokens,
        "mu_first": trainer.mus[0] if trainer.mus else None,
        "mu_last": trainer.mus[-1] if trainer.mus else None,
        "entropy_target": trainer.entropy_target,
        **trainer.results,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    if cfg.checkpoint.export:
        trainer.encoder.tokenizer.save_pretrained(folder / "model")
        if trainer.encoder.vision is not None:
            trainer.encoder.vision.processor.save_pretrained(folder / "model")
    trainer.files.say(results_table(summary))
    report = write_report(folder)
    trainer.files.say(f"report:  {report}\nsummary: {folder / 'summary.json'}")


def results_table(summary: dict[str, Any]) -> str:
    """Success per split before and after, as aligned text."""
    start, end = summary.get("start", {}), summary.get("end", {})
    k = next((row["k"] for row in end.values()), 0)
    wide = max(len(split) + 1 for split in ("success", *end))
    head = f"{'success':<{wide}}" + "".join(f"{name:>22}" for name in ("greedy", "sampled", f"pass@{k}"))
    lines = [head]
    for split, after in end.items():
        before = start.get(split, {})
        cells = (
            f"{before.get(name, float('nan')):>13.1%} -> {after[name]:<5.1%}"
            for name in ("greedy", "sampled", "pass_at_k")
        )
        lines.append(f"{split:<{wide}}" + "".join(f"{c:>22}" for c in cells))
    return "\n".join(lines)
