"""The parts of a run, as its config asks for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from amft_fast import own_loss
from amft_fast.config import Config, LoraConfig, TaskConfig
from amft_fast.engine.deepspeed import DeepSpeedEngine, cut_while_loading, import_deepspeed
from amft_fast.engine.local import LocalEngine
from amft_fast.engine.phases import Phases
from amft_fast.engine.world import ALONE, World, join, launched_size
from amft_fast.errors import UserError
from amft_fast.interfaces import RolloutEngine, Task, UpdateEngine
from amft_fast.model import attention, layers, ulysses
from amft_fast.model.base import read_config
from amft_fast.model.policy import Policy, load_model, load_tokenizer, pick_dtype
from amft_fast.ops import OwnLoss
from amft_fast.rollout.buckets import Bucketed
from amft_fast.rollout.context import check_prompts, check_setting
from amft_fast.rollout.encoder import Encoder, load_encoder
from amft_fast.rollout.rollouts import sent
from amft_fast.rollout.transformers import TransformersEngine
from amft_fast.run import threads
from amft_fast.run.progress import phase, weights_loaded
from amft_fast.tasks import shipped
from amft_fast.trainer import Parts


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
    """The task that task.name asks for: a shipped one from its own section, any other from task.options."""
    try:
        return shipped.make(cfg)
    except ValueError as e:
        raise UserError(f"{f'task {cfg.name}' if cfg.section is None else f'task.{cfg.name}'}: {e}") from None


def own_loss_of(cfg: Config) -> OwnLoss | None:
    """The function that objective.loss names, checked; None where it names a loss of ours."""
    return own_loss.load(cfg.objective.loss) if ":" in cfg.objective.loss else None


def build(cfg: Config, should_stop: Callable[[], bool], task: Task | None = None, resume: bool = False) -> Parts:
    """Task, policy, update engine and rollout engine as the config asks for them; `task` takes the place of the config's.
    `resume`: for a run that goes on."""
    device, own = pick_device(cfg.run.device), own_loss_of(cfg)
    world = join_world(cfg, device)
    check_shared_rows(cfg, world)
    encoder, task = read_data(cfg, world, task)
    cut = cut_while_loading(cfg.engine, pick_dtype(cfg.model, device), device)
    with phase("loading the model", shown=world.main, bars=cfg.log.progress) as loading, weights_loaded(loading), cut:
        model = load_model(cfg.model, device)
    if cfg.model.mlp_tile:
        import_deepspeed(device)
        layers.tile_mlps(model, cfg.model.mlp_tile)
    with phase("timing threads", shown=world.main, bars=cfg.log.progress):
        threads.choose(cfg, model, resume)
    policy = Policy(
        model,
        cfg.objective,
        with_value=cfg.advantage.kind == "gae",
        vision=encoder.vision,
        own_loss=own,
        router_aux_coef=cfg.model.router_aux_coef,
    )
    policy.saving = layers.offload(model, cfg.model.offload_activations)
    with phase("starting the engines", shown=world.main, bars=cfg.log.progress):
        engine = make_engine(cfg, policy, world, device)
        rollout_engine = make_rollouts(cfg, policy.model, engine, encoder, should_stop)
    teacher = load_teacher(cfg, encoder, device) if cfg.advantage.teacher else None
    return Parts(task, encoder, policy, engine, rollout_engine, Phases(device), should_stop, teacher)


def read_data(cfg: Config, world: World, task: Task | None = None) -> tuple[Encoder, Task]:
    """The encoder, and the task (the config's, or the one given) as it is asked with it; threads and seed are set before."""
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    torch.manual_seed(cfg.run.seed)
    encoder = load_encoder(cfg.model)
    check_setting(encoder.context, cfg.rollout.max_new_tokens)
    with phase("reading the data", shown=world.main, bars=cfg.log.progress):
        task = make_task(cfg.task) if task is None else task
        said = task.prepare(encoder, cfg.rollout.max_new_tokens) if hasattr(task, "prepare") else []
    splits = [s for s in dict.fromkeys(("train", *(cfg.eval.splits or task.splits))) if s in task.splits]
    said += check_prompts(encoder, task, splits, cfg.rollout.max_new_tokens)
    if said and world.main:
        print("\n".join(said))
    return encoder, task


class FixedWeights:
    """A model that is not trained and whole on every rank, as the rollout engines ask for their weights."""

    cut = False

    def __init__(self, model: torch.nn.Module, world: World) -> None:
        self.model, self.rank, self.world_size = model, world.rank, world.size

    def named_full_params(self, max_bytes: int = 1 << 30) -> Iterator[tuple[str, torch.Tensor]]:
        return self.model.named_parameters()


def join_readers(cfg: Config) -> World:
    """The processes of an evaluation: all that a launcher has started, whatever engine.kind says."""
    return join(pick_device(cfg.run.device)) if launched_size() > 1 else ALONE


def make_reader(cfg: Config, world: World, encoder: Encoder, should_stop: Callable[[], bool]) -> RolloutEngine:
    """The rollout engine of a model that is not trained."""
    plain = cfg.model.model_copy(update={"lora": LoraConfig()})  # fresh adapters change nothing
    with phase("loading the model", shown=world.main, bars=cfg.log.progress) as loading, weights_loaded(loading):
        model = load_model(plain, pick_device(cfg.run.device)).eval()
    return make_rollouts(cfg, model, FixedWeights(model, world), encoder, should_stop)


def load_teacher(cfg: Config, encoder: Encoder, device: torch.device) -> torch.nn.Module:
    """The frozen model that advantage.teacher names, whole on every rank. Raises UserError where it does not read the policy's
    tokens."""
    settings = cfg.model.model_copy(update={"path": cfg.advantage.teacher, "lora": LoraConfig()})
    if load_tokenizer(settings).get_vocab() != encoder.tokenizer.get_vocab():
        raise UserError(
            f"advantage.teacher: {cfg.advantage.teacher!r} has another tokenizer than {cfg.model.path!r}; its log-probs "
            "are of other "
            "tokens: take a teacher of the same family"
        )
    return load_model(settings, device).requires_grad_(False).eval()


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
        weights=sent(cfg, engine) if alone else None,
        rank=engine.rank,
        world_size=engine.world_size,
        in_flight=cfg.rollout.in_flight,
        recompute_kv=cfg.rollout.recompute_kv,
        adapter=cfg.model.lora if cfg.sends_adapter else None,
        image_size=None if encoder.vision is None else dict(encoder.vision.processor.size),
    )
    rollouts = vllm.make(setup)
    rollouts.sync(sent(cfg, engine)(), 0)
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


def check_shared_rows(cfg: Config, world: World) -> None:
    """Raises UserError where engine.sequence_parallel asks for what the processes or the models cannot do."""
    size = cfg.engine.sequence_parallel
    if size == 1:
        return
    if world.size % size:
        raise UserError(
            f"engine.sequence_parallel: {world.size} processes cannot be groups of {size}; start a multiple of {size}"
        )
    for path in filter(None, (cfg.model.path, cfg.advantage.teacher)):
        config = read_config(cfg.model.model_copy(update={"path": path}))
        why = attention.obstacle(config) or ulysses.obstacle(config, size)
        if why:
            raise UserError(f"engine.sequence_parallel: {size} processes cannot share the rows of {path!r}: {why}")


def make_engine(cfg: Config, policy: Policy, world: World, device: torch.device) -> UpdateEngine:
    """The update engine that engine.kind asks for."""
    if cfg.engine.kind == "local":
        return LocalEngine(policy, cfg.train, cfg.advantage.value_lr)
    plain = cfg.model.model_copy(update={"lora": LoraConfig()})
    return DeepSpeedEngine(
        policy, cfg.train, cfg.engine, world, lambda: load_model(plain, device), cfg.advantage.value_lr
    )
