"""Our part inside a vLLM worker: loaded there as `worker_extension_cls`, never by the trainer.

Importing it registers the weight-transfer engine "gloo" with vLLM's factory. It goes through the very same calls as vLLM's NCCL
engine, over a gloo group, and works on a CPU. `Extension` adds to every worker, whatever its backend, the question which
modules have not got all of their parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from amft_fast.rollout.vllm.channels import broadcast, gloo_group, meet
from amft_fast.rollout.vllm.weight_sync import TensorSpec, plan_buckets, unpack


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where to meet, as whom, and how the buckets are cut."""

    address: str
    host: str
    rank_offset: int
    world_size: int
    bucket_bytes: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The tensors of one update, in order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    @property
    def specs(self) -> list[TensorSpec]:
        dtypes = [getattr(torch, name) for name in self.dtype_names]
        return [TensorSpec(n, d, tuple(s)) for n, d, s in zip(self.names, dtypes, self.shapes, strict=True)]


class GlooEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives packed buckets, loads each while the next one travels."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = None
        self.info: GlooInitInfo | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        store = meet(init_info.address, init_info.world_size, init_info.timeout_s)
        self.group = gloo_group(store, init_info.host, rank, init_info.world_size, init_info.timeout_s)
        self.info = init_info

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            _prepack_experts(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's own waits for an accelerator after this, which a CPU is not.
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            self.shutdown()  # the trainer waits for us no longer
            raise

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        if self.group is None:
            raise RuntimeError("no trainer has joined: init_weight_transfer_engine comes first")
        specs = update_info.specs
        buckets = plan_buckets(specs, self.info.bucket_bytes)

        def post(bucket):
            # A new buffer each time: vLLM keeps views of it until the layer they belong to is complete.
            buffer = torch.empty(bucket.size, dtype=torch.uint8)
            return buffer, broadcast(self.group, buffer)

        ahead = post(buckets[0])
        for k, bucket in enumerate(buckets):
            buffer, work = ahead
            work.wait(timedelta(seconds=self.info.timeout_s))
            ahead = post(buckets[k + 1]) if k + 1 < len(buckets) else None
            self.model.load_weights(iter(unpack(buffer, bucket, specs)))

    def shutdown(self) -> None:
        self.group = None


def _prepack_experts(model: torch.nn.Module) -> None:
    """On a CPU experts are kept in the order of a grouped product; vLLM 0.32 brings them into it at the first loading alone."""
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)


if "gloo" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("gloo", GlooEngine)


class Extension:
    """Methods that vLLM adds to its worker class; called through collective_rpc."""

    def amft_missing(self) -> list[str]:
        """Modules that an open update has not given all of their elements. Asked between the last update and finish."""
        names = []
        for name, module in self.model_runner.model.named_modules():
            info = get_layerwise_info(module)
            # Buffers that no checkpoint holds (the rotary tables) are computed, not sent; others hold noise until they come.
            held = [*module._parameters.values(), *_kept_buffers(module)]
            total = sum(p.numel() for p in held if p is not None)
            if not info.can_load() or not total or is_deferred_attention_layer(module):
                continue
            padded = hasattr(module, "num_embeddings_padded")  # a vocabulary's rows are padded: never all of them come
            if info.load_numel < (1 if padded else total):
                names.append(name)
        return names


def _kept_buffers(module: torch.nn.Module) -> list[torch.Tensor | None]:
    kept = module._buffers.keys() - module._non_persistent_buffers_set
    return [b for n, b in module._buffers.items() if n in kept and b is not None and b.is_floating_point()]
