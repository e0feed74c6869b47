"""Reading by transformers' own forward pass and its growing cache: any model, pictures included.

Prompts are padded on the left, a cache row is copied when another row ends, and rows join only all together.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from amft_fast.interfaces import Request
from amft_fast.model.vision import Vision
from amft_fast.ops import compute_dtype, logits_into


def cache_name(model: nn.Module) -> str:
    """What the model's forward calls the KV cache: transformers 5.24 has `cache`, where it was `past_key_values`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class ForwardReader:
    """Reads for the rows of one batch of requests."""

    refills = False

    def __init__(self, model: nn.Module, pad: int, vision: Vision | None) -> None:
        self.model, self.pad, self.vision = model, pad, vision
        self.backbone, self.head = getattr(model, model.base_model_prefix), model.get_output_embeddings()
        self.softcap = getattr(model.config, "final_logit_softcapping", None)
        self.cache_name = cache_name(self.backbone)

    def join(self, requests: Sequence[Request], places: Sequence[int], more: bool = False) -> torch.Tensor:
        """Reads the prompts of all rows, each different one once; logits [rows, V].

        The mask is None when nothing was padded: transformers then takes its cheapest attention path.
        """
        from transformers import DynamicCache

        device = self.model.device
        keys = [(tuple(r.prompt_ids), tuple(map(id, r.images))) for r in requests]
        unique = {key: at for at, key in enumerate(dict.fromkeys(keys))}
        which = [unique[key] for key in keys]
        width = max(len(prompt) for prompt, _ in unique)
        ids = np.full((len(unique), width), self.pad, np.int64)
        mask = np.zeros((len(unique), width), np.int64)
        for row, (prompt, _) in enumerate(unique):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        ids_t, mask_t = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        positions = (mask_t.cumsum(1) - 1).clamp(min=0)
        self.cache, seen = DynamicCache(config=self.model.config), {}
        if self.vision is not None:
            shown = {key: r.images for key, r in zip(keys, requests)}
            texts = [(np.asarray(key[0], np.int64), shown[key]) for key in unique]
            inputs = self.vision.inputs(texts, device, left=True, pad=self.pad)
            seen = self.vision.arguments(self.backbone, inputs)
            ids_t = self.vision.readable(ids_t)
        ids_t, positions = seen.pop("input_ids", ids_t), seen.pop("position_ids", positions)
        logits = self._forward(ids_t, None if mask.all() else mask_t, positions, seen)
        positions = positions[0] if positions.dim() == 3 else positions  # a prompt ends with text: all axes are alike
        rows = torch.tensor(which, device=device)
        self.positions, self.mask = positions[rows, -1], None if mask.all() else mask_t[rows]
        self.seen = {k: v[rows] for k, v in self.vision.after_prefill(seen).items()} if seen else {}
        if which != list(range(len(unique))):
            self.cache.batch_select_indices(rows)
        return logits[rows]

    def step(self, tokens: np.ndarray) -> torch.Tensor:
        """Reads the next token of each row; logits [rows, V]."""
        ids = torch.from_numpy(tokens).to(self.positions.device)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], 1)
        if self.vision is not None:
            ids = self.vision.readable(ids)
        self.positions = self.positions + 1
        return self._forward(ids[:, None], self.mask, self.positions[:, None], self.seen)

    def keep(self, order: np.ndarray) -> None:
        """Of the rows those stay that were at these places, and stand in this order."""
        rows = torch.from_numpy(order).to(self.positions.device)
        self.positions, self.mask = self.positions[rows], None if self.mask is None else self.mask[rows]
        self.seen = {k: v[rows] for k, v in self.seen.items()}
        self.cache.batch_select_indices(rows)

    def reserve(self, tokens: int) -> None:
        """The cache grows by itself."""

    def _forward(self, ids, mask, positions, seen: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits in fp32 (fp64 of an fp64 model) behind the last column, as the trainer's loss head has them."""
        cache = {self.cache_name: self.cache}
        out = self.backbone(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **cache, **seen)
        hidden, weight = out.last_hidden_state[:, -1], self.head.weight
        logits = torch.empty(len(hidden), len(weight), dtype=compute_dtype(weight.dtype), device=weight.device)
        logits_into(logits, hidden, weight, getattr(self.head, "bias", None))
        return logits if not self.softcap else self.softcap * torch.tanh(logits / self.softcap)
