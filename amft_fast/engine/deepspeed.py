"""The update engine of many processes: DeepSpeed ZeRO 1, 2 and 3 partition and communicate, flat.py updates.

DeepSpeed cuts the parameters, gathers them for the passes (stage 3) and brings every micro-batch's gradient, reduced, to the
rank that owns it. From there on this engine does what the local one does, on shards: the reduced gradient is added into a flat
fp32 shard, AdamW updates a flat fp32 master, and the low-precision parameters follow. So both sweeps of a probed step and the
utility gradient add up as they do locally, at every stage, and the probe's dot-products are taken on shards: only their sums
travel. DeepSpeed's own step, its clipping and its accumulation are not used.

With `offload` masters, moments, gradients and the utility gradient live in host memory, and the optimizer runs there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amft_fast.config import EngineConfig, ObjectiveConfig, TrainConfig
from amft_fast.data.batch import Batch
from amft_fast.engine.flat import FlatEngine, Piece, split_parameters
from amft_fast.engine.world import World
from amft_fast.errors import UserError
from amft_fast.model import lora
from amft_fast.model.policy import Policy, PolicyOutput, fill
from amft_fast.model.ulysses import Ulysses
from amft_fast.model.vision import Vision

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def import_deepspeed(device: torch.device) -> Any:
    """The library, quiet, for the accelerator of `device`. Raises UserError when it is not installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise UserError(
            "engine.kind deepspeed needs DeepSpeed: DS_BUILD_OPS=0 pip install 'amft-fast[deepspeed]'"
        ) from None
    from deepspeed.ops import __compatible_ops__

    # It would be compiled at the first collective on a CPU (47 s and a compiler); gloo serves.
    __compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls torch.distributed by names that torch 2.13 announces the end of, at every collective.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed


def zero_config(cfg: EngineConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's own configuration: one backward is one accumulation step for it, and the update is ours."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # clipping is ours; since DeepSpeed 0.19 the default is no longer 0
        "steps_per_print": 1 << 60,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": cfg.reduce_dtype,
        "data_types": {"grad_accum_dtype": NAMES[dtype]},
        "zero_optimization": {"stage": cfg.zero_stage, "overlap_comm": device.type == "cuda" and cfg.zero_stage > 1},
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    return config


class _Stage3:
    """What transformers asks of its own DeepSpeed configuration object while it loads a model (that one needs accelerate)."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True


@contextmanager
def cut_while_loading(cfg: EngineConfig, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """At stage 3 models that transformers loads inside are cut as they come: no process ever holds a whole one."""
    if cfg.kind != "deepspeed" or cfg.zero_stage < 3:
        yield
        return
    import_deepspeed(device)
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    config = _Stage3(zero_config(cfg, dtype, device))
    set_hf_deepspeed_config(config)  # a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


class ShardGroup:
    """This rank's shard of the parameters that share a learning rate."""

    def __init__(self, low: torch.Tensor, owner: torch.Tensor, pieces: list[Piece], offload: bool) -> None:
        self.low = low  # the shard in the forward pass's type, as DeepSpeed holds it
        self.pieces = [p for p in pieces if p.size]
        self.master = owner.detach()
        if offload:  # without a GPU too, where it saves nothing: so that every test takes this way
            self.master = self.master.to("cpu", copy=True)
            owner.data = owner.data.new_empty(0)
        self.grad = torch.zeros_like(self.master)
        if offload and low.device.type == "cuda":
            self.master, self.grad = self.master.pin_memory(), self.grad.pin_memory()
        self.master.grad = self.grad

    def publish(self) -> None:
        if self.low.data_ptr() != self.master.data_ptr():
            self.low.copy_(self.master, non_blocking=True)


class DeepSpeedEngine(FlatEngine):
    """Updates a `Policy` that is cut over the processes of `world`; see `UpdateEngine` in interfaces.py.

    `build_model` makes a plain model of the policy's kind, without adapters, for copies that are not cut.
    """

    def __init__(
        self,
        policy: Policy,
        cfg: TrainConfig,
        engine: EngineConfig,
        world: World,
        build_model: Callable[[], nn.Module],
        value_lr: float = 0.0,
    ) -> None:
        super().__init__(policy, cfg, policy.head.weight.device)
        self.world, self.stage, self.build_model = world, engine.zero_stage, build_model
        self.offload = engine.offload
        self.cut = self.stage == 3
        self.library = import_deepspeed(self.device)
        # A parameter that no row of a micro-batch reaches would be reduced on some ranks and not on others.
        policy.reach_all = True
        if policy.vision is not None and world.size > 1 and policy.vision.binds(policy.backbone, self.cut):
            policy.most = self._most_over_ranks(policy.vision)
        self.sequence = world.neighbours(engine.sequence_parallel)
        if self.sequence.size > 1:
            policy.ulysses = Ulysses(self.sequence.size, self.sequence.group)
        named = split_parameters(policy, cfg)
        # Tells DeepSpeed the groups; it never steps. The optimizer proper is made of the shards.
        groups = torch.optim.SGD([{"params": [p for _, p in n.params]} for n in named], lr=0.0)
        dtype = policy.head.weight.dtype
        logger = self.library.utils.logger
        logger.setLevel("ERROR")  # it calls an optimizer untested that it never steps
        self.zero, *_ = self.library.initialize(
            model=policy, optimizer=groups, config=zero_config(engine, dtype, self.device), dist_init_required=False
        )
        logger.setLevel("WARNING")
        self.shards: Any = self.zero.optimizer
        names = {id(p): n for x in named for n, p in x.params}
        make = self._stage3_groups if self.stage == 3 else self._stage12_groups
        self.made = list(make(names, engine.offload))  # (index of the named group, its shard)
        self.groups = [g for i, g in self.made if not named[i].is_value]
        self.value_groups = [g for i, g in self.made if named[i].is_value]
        decays = [named[i].weight_decay for i, _ in self.made if not named[i].is_value]
        self.optimizer = self._make_optimizer(decays, value_lr)

    def _most_over_ranks(self, vision: Vision) -> Callable[[list[int]], list[int]]:
        """What `Policy.most` is: with cross-attention layers are passed over where there are no pictures, so ranks agree about
        their passes. Raises UserError where this model's ranks cannot take the same way."""
        if why := vision.unshared(self.policy.backbone):
            raise UserError(f"engine.kind deepspeed with pictures on {self.world.size} processes: {why}; update it")
        aside = self.world.aside()  # on the host, so that no GPU is waited for
        return lambda numbers: aside.max(torch.tensor(numbers)).tolist()

    def _stage12_groups(self, names: dict[int, str], offload: bool) -> Iterator[tuple[int, ShardGroup]]:
        z = self.shards
        for i, owner in enumerate(z.single_partition_of_fp32_groups):
            owned = [p for p in z.bit16_groups[i] if p._hp_mapping is not None]
            pieces = []
            for p in owned:
                here, there = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
                pieces.append(Piece(names[id(p)], tuple(p.shape), here.start, there.start, here.numel))
            yield i, ShardGroup(z.parallel_partitioned_bit16_groups[i][self.rank], owner, pieces, offload)

    def _stage3_groups(self, names: dict[int, str], offload: bool) -> Iterator[tuple[int, ShardGroup]]:
        z = self.shards
        for i, (params, owner) in enumerate(zip(z.fp16_groups, z.fp32_partitioned_groups_flat)):
            pieces, offset = [], 0
            for p in params:
                length = p.partition_numel()  # the last rank's share is padded
                start = min(self.rank * length, p.ds_numel)
                size = min(length, p.ds_numel - start)
                pieces.append(Piece(names[id(p)], tuple(p.ds_shape), offset, start, size))
                offset += length
            yield z.sub_group_to_group_id[i], ShardGroup(z.fp16_partitioned_groups_flat[i], owner, pieces, offload)

    # ---------------------------------------------------------------------------------------------- passes and steps

    def backward(self, batch: Batch, objective: ObjectiveConfig | None = None) -> PolicyOutput:
        """Forward and backward of one micro-batch; every rank must call it equally often."""
        out = self.zero(self._mine(batch), objective)
        self.zero.backward(out.loss * self.world.size)  # DeepSpeed takes the mean over ranks, our losses add up
        self._collect()
        return out._replace(loss=out.loss.detach())

    @torch.no_grad()
    def _collect(self) -> None:
        """Adds the reduced gradient of the micro-batch into our fp32 shards, and clears DeepSpeed's."""
        z = self.shards
        for i, (_, g) in enumerate(self.made):
            parts, offset = z.averaged_gradients[i], 0
            if self.offload:  # one transfer to the host, not one per parameter
                parts = [torch.cat([part.reshape(-1) for part in parts]).to(g.grad.device)]
            for part in parts:
                into = g.grad[offset : offset + part.numel()]
                into.add_(part.reshape(-1))
                offset += part.numel()
        if self.stage == 3:
            z.grad_partitions_flat_buffer.zero_()
        else:
            z.averaged_gradients = dict.fromkeys(z.averaged_gradients)
            z.micro_step_id = -1
        z.zero_grad()

    def _own_logprobs(self, batch: Batch, temperature: float | None) -> PolicyOutput:
        with torch.no_grad():
            return self.zero(batch, scores_only=True, temperature=temperature)

    def _norm(self) -> torch.Tensor:
        squares = sum(torch.linalg.vector_norm(g.grad).double().square() for g in self.all_groups)
        return self.all_reduce(squares.to(self.device)).sqrt().float()

    @torch.no_grad()
    def publish(self) -> None:
        """Low-precision shards follow their masters, and whole parameters are put together again where a rank holds them."""
        z = self.shards
        if self.stage == 3:
            z._partition_all_parameters()
        for _, g in self.made:
            g.publish()
        if self.stage == 3:
            for i in range(len(self.made)):
                z._unflatten_partitioned_parameters(i)
            if z.persistent_parameters:
                z.persistent_parameters[0].all_gather(z.persistent_parameters)
            return
        from deepspeed.runtime.utils import all_gather_dp_groups

        all_gather_dp_groups(
            groups_flat=z.bit16_groups_flat,
            partitioned_param_groups=z.parallel_partitioned_bit16_groups,
            dp_process_group=z.real_dp_process_group,
            start_alignment_factor=z.nccl_start_alignment_factor,
            allgather_bucket_size=z.allgather_bucket_size,
        )

    # ----------------------------------------------------------------------------------------------- whole parameters

    def named_full_params(self, max_bytes: int = 1 << 30) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, tensor) of the whole model in layer order; every rank must take them all.

        At stage 3 they are gathered in groups of at most `max_bytes` (or one parameter), and a tensor is valid until the
        next one is asked for.
        """
        if self.stage < 3:
            yield from super().named_full_params()
            return
        for group in self._runs(max_bytes):
            with self.library.zero.GatheredParameters([p for x in group for p in x.sources]):
                for x in group:
                    yield x.name, x.value()

    def named_factors(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.stage < 3:
            yield from super().named_factors()
            return
        for name, p in lora.named_factors(self.policy.model):
            with self.library.zero.GatheredParameters([p]):
                yield name, p

    def _runs(self, max_bytes: int) -> Iterator[list[lora.Plain]]:
        """Neighbouring parameters of at most `max_bytes` in all, with the factors that belong to them."""
        group: list[lora.Plain] = []
        size = 0
        for x in lora.plain(self.policy.model):
            bytes_ = sum(p.ds_numel * p.element_size() for p in x.sources)
            if group and size + bytes_ > max_bytes:
                yield group
                group, size = [], 0
            group.append(x)
            size += bytes_
        if group:
            yield group

    def export(self, folder: Path) -> None:
        """Rank 0 writes the model as a plain transformers folder, from a whole copy in its host memory."""
        state = {n: p.cpu().clone() for n, p in self.named_full_params() if self.world.main}
        if self.world.main:
            self.policy.model.save_pretrained(folder, state_dict=state)
        self.world.barrier()

    def plain_copy(self) -> nn.Module:
        """The model as it is now, adapters merged, whole on this rank and frozen. At stage 3 it takes the memory that ZeRO
        saves."""
        model = self.build_model().requires_grad_(False).eval()
        fill(model, self.named_full_params())
        return model
