"""vLLM in the colocated mode: an engine for each trainer process, on its device."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from amft_fast.errors import RolloutFailure, UserError
from amft_fast.interfaces import Completion, Request, Sampling
from amft_fast.rollout.vllm.groups import group_requests
from amft_fast.rollout.vllm.offline_target import OfflineTarget
from amft_fast.rollout.vllm.setup import Named, Setup, check_lengths
from amft_fast.rollout.vllm.weight_sync import (
    IncompleteError,
    TransferError,
    check_version,
)


class ColocatedEngine:
    """One vLLM engine per trainer process, on its device.

    On a GPU it is a process of its own that shares the device: it sleeps while the trainer works, and takes weights over CUDA
    IPC. On a CPU with one trainer process it lives in that very process, which starts in seconds.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.wire = setup.wire()
        self.sync_weights = setup.make_sync(self.wire)
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
        blind = self.setup.image_size is None  # vLLM makes pictures' places with the tokenizer
        settings = self.setup.engine_settings(self.wire) | {"skip_tokenizer_init": blind, "disable_log_stats": True}
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
        vocabulary = self.setup.model.config.get_text_config().vocab_size
        return OfflineTarget(llm, vocabulary, self.setup.image_token, self.setup.cfg.router_replay)

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
            self.sync_weights.clear(self.target)
            raise UserError(f"rollout.engine vllm: {e}") from e
        except TransferError as e:
            raise RolloutFailure(f"rollout.engine vllm did not take its weights: {e}") from e
        self.version = version

    def rest(self) -> None:
        """Gives the GPU's memory to the trainer until the next sync."""
        if self.sleeps and not self.asleep:
            self.sync_weights.close()
            self.target.sleep(1 if self.setup.adapter is not None else 2)
            self.version, self.asleep = None, True

    def health(self) -> str:
        return "ok" if self.version is not None else "without weights"

    def close(self) -> None:
        self.sync_weights.close()
        self.target.close()
