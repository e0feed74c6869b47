"""The policy's adapter alone into running vLLM engines: a peft folder that each reads into its LoRA slot.

The base is what `model.path` holds, read by the engines themselves, and never sent: an update is the factors, a hundredth of
the weights. Each version is a folder of its own under the run's, which servers must see, and an adapter of its own name, so
that an answer can come from no other: one that has not arrived is not found.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from amft_fast.errors import UserError
from amft_fast.model import lora
from amft_fast.rollout.vllm.weight_sync import FanOut, IncompleteError, Target, TransferError

if TYPE_CHECKING:
    from amft_fast.config import LoraConfig

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for


def engine_settings(cfg: LoraConfig) -> dict[str, Any]:
    """vLLM's engine arguments for one adapter of this rank. Raises UserError for one that is too large."""
    rank = next((r for r in RANKS if r >= cfg.rank), None)
    if rank is None:
        raise UserError(f"rollout.vllm.adapter_only: vLLM takes a rank of at most {RANKS[-1]}, got {cfg.rank}")
    # Two on the host: the next one is read before the last one goes.
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": rank}


def name_of(version: int) -> str:
    return f"amft-{version}"


class AdapterSync:
    """What `WeightSync` is for whole weights. `model` has the adapters, `base` is the checkpoint that they belong to."""

    def __init__(self, model: torch.nn.Module, cfg: LoraConfig, base: str, folder: Path) -> None:
        self.model, self.cfg, self.base, self.folder = model, cfg, base, folder
        self.wanted = [name for name, _ in lora.named_factors(model)]

    def send(self, targets: list[Target], named: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Gives all `targets` the factors of `named`; they answer with these afterwards. Raises as `WeightSync.send`."""
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in named}
        if missing := [name for name in self.wanted if name not in state]:
            raise IncompleteError(f"adapter: {len(missing)} factors are missing, the first is {missing[0]}")
        path = self._written(state, version)
        fan = FanOut(list(targets))
        try:
            fan.each(lambda t: t.pause())
            fan.each(lambda t: t.load_adapter(str(path.absolute()), version))
            fan.each(lambda t: t.reset_caches())
            fan.each(lambda t: t.resume())
        finally:
            fan.close()
        for old in self.folder.glob("amft-*"):
            if old != path:
                shutil.rmtree(old, ignore_errors=True)

    def _written(self, state: dict[str, torch.Tensor], version: int) -> Path:
        path = self.folder / name_of(version)
        shutil.rmtree(path, ignore_errors=True)
        try:
            path.mkdir(parents=True)
            lora.save_adapter(self.model, self.cfg, self.base, path, state)
        except (OSError, SafetensorError) as e:  # a full disk: nothing has been sent
            shutil.rmtree(path, ignore_errors=True)
            raise TransferError(f"the adapter could not be written to {path}: {e}") from e
        return path

    def clear(self, target: Target) -> None:
        """An adapter that was not read whole is in no slot."""

    def close(self) -> None:
        """Nothing is kept open."""
