"""vLLM as the rollout engine: what an engine is told at its start, and the colocated mode; vllm_fleet.py has the served one.

The engine starts with no weights of its own (`load_format="dummy"`): the first sync brings them, as every later one does. It
may not answer before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amft_fast.config import VllmConfig
from amft_fast.interfaces import Completion, Request, RolloutEngine, RolloutFailure, Sampling, UserError
from amft_fast.rollout import channels
from amft_fast.rollout.head_padding import CPU_MULTIPLE, padding_for
from amft_fast.rollout.vllm_targets import Group, OfflineTarget, group_requests
from amft_fast.rollout.weight_sync import (
    Channel,
    FanOut,
    IncompleteError,
    TensorSpec,
    TransferError,
    WeightSync,
    Wire,
    check_version,
    clear_update,
)

Named = Iterable[tuple[str, torch.Tensor]]


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

    @property
    def backend(self) -> str:
        if self.cfg.backend != "auto":
            return self.cfg.backend
        if self.device.type != "cuda":
            return "gloo"
        return "ipc" if self.cfg.mode == "colocate" else "nccl"

    def wire(self) -> Wire:
        """Raises UserError for a model that the engine cannot be given."""
        try:
            padding = padding_for(self.model.config, CPU_MULTIPLE) if self.device.type == "cpu" else None
            return Wire(self.model, padding)
        except ValueError as e:
            raise UserError(f"rollout.engine vllm: {e}; use rollout.engine transformers") from None

    def engine_settings(self, wire: Wire) -> dict[str, Any]:
        """vLLM's engine arguments, offline and on its command line alike."""
        cfg, cpu = self.cfg, self.device.type == "cpu"
        text = {"tie_word_embeddings": False} | ({"head_dim": wire.padding.padded} if wire.padding else {})
        text |= changed_positions(self.model.config, self.path)
        nested = self.model.config.get_text_config() is not self.model.config
        return {
            "model": self.path,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "load_format": "dummy",
            "hf_overrides": {"tie_word_embeddings": False, "text_config": text} if nested else text,
            # The distribution sampled from, not the raw one; and no defaults out of generation_config.json.
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "weight_transfer_config": {"backend": self.backend},
            "worker_extension_cls": "amft_fast.rollout.vllm_worker.Extension",
            "max_model_len": cfg.max_model_len,
            "max_num_seqs": cfg.max_num_seqs,
            "tensor_parallel_size": cfg.tensor_parallel_size,
            "enforce_eager": cpu if cfg.enforce_eager is None else cfg.enforce_eager,
            **({} if cpu else {"gpu_memory_utilization": cfg.gpu_memory_utilization}),
            **_kv_cache(cfg, cpu),
        }

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


def _kv_cache(cfg: VllmConfig, cpu: bool) -> dict[str, int]:
    size = cfg.kv_cache_bytes or (256 << 20 if cpu else None)
    return {} if size is None else {"kv_cache_memory_bytes": size}


def make(setup: Setup) -> RolloutEngine:
    """The engine that rollout.vllm asks for; it has no weights yet."""
    if setup.cfg.mode == "colocate":
        return ColocatedEngine(setup)
    from amft_fast.rollout.vllm_fleet import ServedEngine

    return ServedEngine(setup)


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


def check_lengths(groups: Sequence[Group], max_model_len: int) -> list[Group]:
    """The groups with their length bound cut to what the engine can hold. Raises UserError when a prompt leaves no room."""
    longest = max((len(g.prompt_ids) for g in groups), default=0)
    if longest >= max_model_len:
        raise UserError(
            f"rollout.vllm.max_model_len {max_model_len} leaves no room for an answer to a prompt of {longest} tokens: raise it"
        )
    return [
        Group(g.prompt_ids, g.seed, min(g.max_new_tokens, max_model_len - len(g.prompt_ids)), g.images, g.members)
        for g in groups
    ]


class ColocatedEngine:
    """One vLLM engine per trainer process, on its device.

    On a GPU it is a process of its own that shares the device: it sleeps while the trainer works, and takes weights over CUDA
    IPC. On a CPU with one trainer process it lives in that very process, which starts in seconds.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.wire = setup.wire()
        self.sync_weights = WeightSync(self.wire, setup.channel)
        self.version: int | None = None
        self.sleeps = setup.device.type == "cuda" and setup.cfg.sleep
        self.asleep = False
        self.target = self._start()

    def _start(self) -> OfflineTarget:
        inside = self.setup.device.type == "cpu" and self.setup.world_size == 1
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if inside else "1"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns at each sync that rotary tables are not sent
        # Cores are the trainer's to give out; IPC handles are sent to the engine's own process alone.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if self.setup.backend == "ipc":
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        settings = self.setup.engine_settings(self.wire) | {"skip_tokenizer_init": True, "disable_log_stats": True}
        if self.sleeps:
            settings["enable_sleep_mode"] = True
        set_num_threads = torch.set_num_threads
        try:
            import vllm
            from vllm.platforms import current_platform

            check_version(vllm.__version__)
            if inside and settings["enforce_eager"]:  # else a function of its sampler is compiled, 20 s for nothing
                current_platform.simple_compile_backend = "eager"
            llm = vllm.LLM(**settings)
        except ImportError as e:
            raise UserError(
                f"rollout.engine vllm: vLLM is not installed ({e}); see docs/rollouts.md, or use rollout.engine transformers"
            ) from None
        except (ValueError, RuntimeError) as e:
            raise UserError(f"rollout.engine vllm did not start: {str(e).strip().splitlines()[-1]}") from e
        finally:
            torch.set_num_threads = set_num_threads  # its CPU worker puts a function there that does nothing
        config = self.setup.model.config
        return OfflineTarget(llm, config.get_text_config().vocab_size, getattr(config, "image_token_id", None))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order."""
        if self.version is None:
            raise RolloutFailure("rollout.engine vllm has no whole set of weights to answer with")
        if self.setup.should_stop():
            raise InterruptedError("stopped before sampling")
        groups = check_lengths(group_requests(requests), self.target.max_model_len)
        out: list[Completion | None] = [None] * len(requests)
        for group, samples in zip(groups, self.target.generate(groups, sampling, self.version)):
            for i, completion in zip(group.members, samples):
                out[i] = completion
        return out

    def sync(self, named_tensors: Named, version: int) -> None:
        """New weights in place. Raises RolloutFailure when they do not arrive, UserError when they are not all there."""
        self.version = None
        if self.asleep:
            self.target.wake()
            self.asleep = False
        try:
            self.sync_weights.send([self.target], named_tensors, version)
        except IncompleteError as e:
            clear_update(self.target)
            raise UserError(f"rollout.engine vllm: {e}") from e
        except TransferError as e:
            raise RolloutFailure(f"rollout.engine vllm did not take its weights: {e}") from e
        self.version = version

    def rest(self) -> None:
        """Gives the GPU's memory to the trainer until the next sync."""
        if self.sleeps and not self.asleep:
            self.sync_weights.close()
            self.target.sleep()
            self.version, self.asleep = None, True

    def health(self) -> str:
        return "ok" if self.version is not None else "without weights"

    def close(self) -> None:
        self.sync_weights.close()
        self.target.close()
