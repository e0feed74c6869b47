"""Sequence parallelism by DeepSpeed's Ulysses: ranks that share a packed row, each with a run of its tokens.

All that works token by token (embedding, norms, MLP, loss head) has the rank's own tokens. Around attention an all-to-all
turns [tokens / S, heads] into [tokens, heads / S], so that our own attention sees the whole row, with its segments and shared
prompts, for some of the heads; a second one turns its output back.

Legend: S ranks of the group, T tokens of the row, T' tokens of all ranks together (T, padded to a multiple of S), A heads, D
size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Ulysses:
    """The `size` processes of torch.distributed's `group`, which share a row."""

    size: int
    group: Any

    def copies(self, groups: int) -> int:
        """Of each head of keys and values: where there are fewer than ranks, each rank has one that others have too."""
        return max(1, self.size // groups)

    @cached_property
    def _exchange(self) -> Callable[..., torch.Tensor]:
        from deepspeed.sequence.layer import DistributedAttention

        return DistributedAttention(_on_whole_row, self.group, scatter_idx=2, gather_idx=1)

    def attend(
        self, whole: Callable, q_1ATD: torch.Tensor, k_1ATD: torch.Tensor, v_1ATD: torch.Tensor, tokens: int
    ) -> torch.Tensor:
        """[1, T'/S, A, D]: `whole`, which takes q, k, v [1, A/S, T, D] and gives [1, T, A/S, D], on the T tokens of a row."""
        q, k, v = (x.transpose(1, 2) for x in (q_1ATD, k_1ATD, v_1ATD))
        copies = self.copies(k.shape[2])
        if copies > 1:
            k, v = (x.repeat_interleave(copies, dim=2) for x in (k, v))
        return self._exchange(q, k, v, 0, None, whole, tokens)


def _on_whole_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, whole: Callable, tokens: int) -> torch.Tensor:
    """[1, T', A/S, D] of tensors of that kind: the padding at the end sees nothing, and nothing sees it."""
    out = whole(*(x[:, :tokens].transpose(1, 2) for x in (q, k, v)))
    padding = q.shape[1] - tokens
    return F.pad(out, (0, 0, 0, 0, 0, padding)) if padding else out


def obstacle(config: Any, size: int) -> str | None:
    """Why `size` ranks cannot share the rows of a model of this transformers config; None when they can."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
        return f"its rotary embedding ({rope['rope_type']}) hangs on the longest position that a rank sees"
    heads = text.num_attention_heads
    return undealt(heads, getattr(text, "num_key_value_heads", None) or heads, size)


def undealt(heads: int, groups: int, size: int) -> str | None:
    """Why so many heads, of queries and of keys and values, cannot be dealt to `size` ranks; None when they can."""
    if heads % size:
        return f"its {heads} attention heads cannot be dealt to {size} ranks"
    if groups % size and size % groups:
        return f"its {groups} heads of keys and values cannot be dealt to {size} ranks"
    return None
