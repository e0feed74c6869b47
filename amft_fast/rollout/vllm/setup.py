"""vLLM as the rollout engine: what an engine is told at its start, and the colocated mode; vllm_fleet.py has the served one.

The engine starts with no weights of its own (`load_format="dummy"`): the first sync brings them, as every later one does. It
may not answer before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amft_fast.config import LoraConfig, VllmConfig
from amft_fast.errors import UserError
from amft_fast.model import experts
from amft_fast.rollout.vllm import adapter_sync, channels
from amft_fast.rollout.vllm.adapter_sync import AdapterSync
from amft_fast.rollout.vllm.groups import RequestGroup
from amft_fast.rollout.vllm.head_padding import CPU_MULTIPLE, HeadPadding, padding_for
from amft_fast.rollout.vllm.weight_sync import (
    Channel,
    FanOut,
    TensorSpec,
    WeightSync,
    Wire,
)

Named = Iterable[tuple[str, torch.Tensor]]
CPU_CACHE = (256 << 20, 2 << 30)  # bytes of keys and values on a CPU, least and most by default


@dataclass
class Setup:
    """What both modes need to know. `weights` gives the present weights again, where that needs no other rank's help."""

    cfg: VllmConfig
    model: torch.nn.Module
    path: str
    device: torch.device
    folder: Path
    should_stop: Callable[[], bool] = lambda: False
    weights: Callable[[], Named] | None = None
    rank: int = 0
    world_size: int = 1
    say: Callable[[str], None] = print
    in_flight: bool = False  # servers are given weights in the midst of answers
    recompute_kv: bool = False  # and then compute what was drawn before anew
    image_size: dict[str, int] | None = None  # the image processor's bounds, where the model sees pictures
    adapter: LoraConfig | None = None  # of the model, where it is all that is sent

    @property
    def backend(self) -> str:
        if self.cfg.backend != "auto":
            return self.cfg.backend
        if self.device.type != "cuda":
            return "gloo"
        return "ipc" if self.cfg.mode == "colocate" else "nccl"

    @property
    def image_token(self) -> int | None:
        """What stands in a prompt for pictures, in models that vLLM makes the run of an image's tokens for."""
        return getattr(self.model.config, "image_token_id", None)

    def wire(self) -> Wire:
        """Raises UserError for a model that the engine cannot be given."""
        try:
            padding = padding_for(self.model.config, CPU_MULTIPLE) if self.device.type == "cpu" else None
            if padding and self.adapter is not None:
                raise ValueError("adapter_only does not pad attention heads, as a CPU needs it here")
            return Wire(self.model, padding)
        except ValueError as e:
            raise UserError(f"rollout.engine vllm: {e}; use rollout.engine transformers") from None

    def _check_replay(self) -> None:
        if self.cfg.router_replay and not experts.routers(self.model):
            raise UserError("rollout.vllm.router_replay: the model has no routers; leave it off")

    def engine_settings(self, wire: Wire) -> dict[str, Any]:
        """vLLM's engine arguments, offline and on its command line alike."""
        self._check_replay()
        cfg, cpu = self.cfg, self.device.type == "cpu"
        text: dict[str, Any] = {"head_dim": wire.padding.padded} if wire.padding else {}
        text |= changed_positions(self.model.config, self.path)
        nested = self.model.config.get_text_config() is not self.model.config
        eyes: dict[str, Any] = {}
        if self.image_size is not None:
            # vLLM would scale pixels inside the model, by buffers that "dummy" fills with noise and nobody sends.
            eyes = {"mm_device_do_normalize": False, "mm_processor_kwargs": {"size": self.image_size}}
        tied = {"tie_word_embeddings": False}
        sent = {
            "load_format": "dummy",
            "hf_overrides": tied | {"text_config": text | tied} if nested else text | tied,
            "weight_transfer_config": {"backend": self.backend},
            "worker_extension_cls": "amft_fast.rollout.vllm.worker.Extension",
        }
        if self.adapter is not None:  # the base is read, as it lies there
            sent = {"hf_overrides": {"text_config": text} if nested else text} | adapter_sync.engine_settings(
                self.adapter
            )
        return {
            "model": self.path,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **sent,
            # The distribution sampled from, not the raw one; and no defaults out of generation_config.json.
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "max_num_seqs": cfg.max_num_seqs,
            "tensor_parallel_size": cfg.tensor_parallel_size,
            **({"enable_return_routed_experts": True} if cfg.router_replay else {}),
            **eyes,
            "enforce_eager": cpu if cfg.enforce_eager is None else cfg.enforce_eager,
            **({} if cpu else {"gpu_memory_utilization": cfg.gpu_memory_utilization}),
            **_kv_cache(cfg, cpu, self.model.config.get_text_config(), self.model.dtype.itemsize, wire.padding),
        }

    def make_sync(self, wire: Wire) -> WeightSync | AdapterSync:
        if self.adapter is None:
            return WeightSync(wire, self.channel)
        return AdapterSync(self.model, self.adapter, self.path, self.folder / "adapters" / f"rank-{self.rank}")

    def channel(self, fan: FanOut, specs: list[TensorSpec]) -> Channel:
        args = self.cfg.host, self.cfg.bucket_bytes, self.cfg.call_timeout_s
        if self.backend == "gloo":
            return channels.GlooChannel(fan, specs, *args)
        return channels.VllmChannel(fan, specs, self.backend, *args)


def changed_positions(config: Any, path: str) -> dict[str, Any]:
    """What model.rope_theta and the like made of the checkpoint's configuration, which vLLM reads for itself."""
    from transformers import AutoConfig

    now, then = config.get_text_config(), AutoConfig.from_pretrained(path).get_text_config()
    names = ("rope_parameters", "max_position_embeddings")
    return {n: getattr(now, n) for n in names if getattr(now, n, None) != getattr(then, n, None)}


def _kv_cache(
    cfg: VllmConfig, cpu: bool, config: Any, width: int, padding: HeadPadding | None
) -> dict[str, int | None]:
    """Memory for keys and values, and the longest sequence. vLLM takes no less memory than that sequence needs; on a CPU, which
    has no share of a GPU to take, the default holds two of them within bounds, and a longer context than it holds is cut."""
    size, longest = cfg.kv_cache_bytes, cfg.max_model_len
    if cpu and size is None:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * (padding.padded if padding else head) * width
        longest = longest or config.max_position_embeddings
        size = min(max(int(2.2 * longest * token), CPU_CACHE[0]), CPU_CACHE[1])
        longest = min(longest, int(size / (1.1 * token)))  # vLLM keeps some of it to itself
    return {"max_model_len": longest} | ({} if size is None else {"kv_cache_memory_bytes": size})


class Copy:
    """The last weights sent, in host memory, for an engine that has to be given them again."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def tee(self, named: Named) -> Iterator[tuple[str, torch.Tensor]]:
        """Passes the tensors on and keeps a copy of each; the memory is used again from transfer to transfer."""
        for name, tensor in named:
            kept = self.tensors.get(name)
            if kept is None:
                self.tensors[name] = tensor.detach().to("cpu", copy=True)
            else:
                kept.copy_(tensor)
            yield name, tensor

    def __call__(self) -> Named:
        return self.tensors.items()


def check_lengths(groups: Sequence[RequestGroup], max_model_len: int) -> list[RequestGroup]:
    """The groups with their length bound cut to what the engine can hold. Raises UserError when a prompt leaves no room."""
    longest = max((len(g.prompt_ids) for g in groups), default=0)
    if longest >= max_model_len:
        raise UserError(
            f"rollout.vllm.max_model_len {max_model_len} leaves no room for an answer to a prompt of {longest} tokens: raise it"
        )
    return [
        RequestGroup(
            g.prompt_ids, g.seed, min(g.max_new_tokens, max_model_len - len(g.prompt_ids)), g.images, g.members
        )
        for g in groups
    ]
