"""An `LLM` of vLLM that the trainer holds: it samples, and carries the calls of a weight transfer (`weight_sync.Target`)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from amft_fast.errors import UserError
from amft_fast.interfaces import Completion, Sampling
from amft_fast.rollout.vllm import adapter_sync
from amft_fast.rollout.vllm.groups import (
    EngineError,
    RequestGroup,
    asked_for,
    check,
    check_experts,
    check_prompt,
    sampling_settings,
    single_places,
)  # fmt: skip


class OfflineTarget:
    """A vLLM `LLM` object that the trainer holds itself."""

    name = "vllm (colocated)"

    def __init__(self, llm: Any, vocabulary: int, image_token: int | None = None, replay: bool = False) -> None:
        self.llm, self.vocabulary, self.image_token, self.replay = llm, vocabulary, image_token, replay
        self.max_model_len = llm.llm_engine.model_config.max_model_len
        self.adapter: Any = None  # the adapter that answers, where the engine has one

    def generate(self, groups: Sequence[RequestGroup], sampling: Sampling, version: int) -> list[list[Completion]]:
        """The samples of every group, in order."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=single_places(g, self.image_token)) for g in groups]
        for prompt, g in zip(prompts, groups):
            if g.images:
                prompt["multi_modal_data"] = {"image": list(g.images)}
        params = [SamplingParams(**sampling_settings(g, sampling), detokenize=False) for g in groups]
        out = []
        results = self.llm.generate(prompts, params, use_tqdm=False, lora_request=self.adapter)
        for group, result in zip(groups, results, strict=True):
            check_prompt(result.prompt_token_ids, group)
            samples = []
            for o in sorted(result.outputs, key=lambda o: o.index):
                ids = list(o.token_ids)
                logprobs = [float(at[i].logprob) for i, at in zip(ids, o.logprobs)]
                drawn = check(ids, logprobs, o.finish_reason, group, self.vocabulary)
                tokens = len(group.prompt_ids) + len(ids)
                routed = check_experts(o.routed_experts, tokens) if self.replay else None
                samples.append(Completion(*drawn, version, experts=routed))
            if len(samples) != asked_for(group, sampling):
                raise EngineError(f"garbage: {len(samples)} samples for a group of {len(group.members)}")
            out.append(samples * (len(group.members) // len(samples)))
        return out

    def sleep(self, level: int) -> None:
        """Gives the GPU's memory to the trainer, weights included: at level 1 the host keeps them, at 2 they must be sent again
        after `wake`."""
        self.llm.sleep(level=level)

    def wake(self) -> None:
        self.llm.wake_up()

    def world_size(self) -> int:
        return self.llm.llm_engine.vllm_config.parallel_config.world_size_across_dp

    def pause(self) -> None:
        """Nothing runs: generate returns when all is drawn."""

    def resume(self) -> None: ...

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        self.llm.shutdown_weight_transfer_engine()

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.llm.update_weights({"update_info": update_info})

    def missing(self) -> list[str]:
        return [name for worker in self.llm.collective_rpc("amft_missing") for name in worker]

    def finish_weight_update(self, version: str | None) -> None:
        self.llm.finish_weight_update(version)

    def load_adapter(self, path: str, version: int) -> None:
        """Raises UserError for an adapter that the engine does not take."""
        from vllm.lora.request import LoRARequest

        new, old = LoRARequest(adapter_sync.name_of(version), version + 1, path), self.adapter
        try:
            self.llm.llm_engine.add_lora(new)
        except (ValueError, RuntimeError) as e:
            raise UserError(f"rollout.vllm.adapter_only: vLLM does not take the adapter: {e}") from e
        self.adapter = new
        if old is not None and old.lora_int_id != new.lora_int_id:
            self.llm.llm_engine.remove_lora(old.lora_int_id)

    def reset_caches(self) -> None:
        """Keys and values (and images' features) of the old weights are of no use any more."""
        if not self.llm.reset_prefix_cache():
            raise EngineError("the prefix cache could not be reset: requests are still running")
        for name in ("reset_mm_cache", "reset_encoder_cache"):
            if hasattr(self.llm.llm_engine, name):
                getattr(self.llm.llm_engine, name)()

    def weight_version(self) -> str:
        return self.llm.get_weight_version()

    def alive(self, timeout_s: float) -> str:
        return "ok"

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.llm.llm_engine.engine_core.shutdown()
