"""Attention heads padded with zeros to a width that an engine has kernels for, without changing what the model computes.

vLLM's CPU attention takes heads whose width d is a multiple of 32 alone; the demo's heads are 16 wide. The engine is given
heads of width D = r d (its config says so), and the weights are padded on their way:

    dimension i of a head goes to  i r  in the first half,  D/2 + (i − d/2) r  in the second,

so that each rotary pair (i, i + d/2) with its angle θ^(−2i/d) lands on the pair of width D with the very same angle. The rest
is zero. Attention divides by √D instead of √d: queries are made √r larger. Where queries and keys are normalised (Qwen3) both
projections are made √r larger, so that their mean of squares over D numbers, and what epsilon does to it, is what it was over
d: the norms then return √r times what they did, which queries want, and the keys' norm is made √r smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Architectures whose attention is as described: separate projections, rotary over the whole head, scale 1/√d.
FITTING = ("qwen3", "qwen3_moe", "llama", "mistral")
CPU_MULTIPLE = 32


@dataclass(frozen=True)
class HeadPadding:
    """Pads heads of `size` to `padded`. `query_norm`: the model normalises queries and keys per head."""

    size: int
    padded: int
    query_norm: bool

    @property
    def places(self) -> torch.Tensor:
        """[size]: where each dimension of a head goes."""
        half = torch.arange(self.size // 2) * (self.padded // self.size)
        return torch.cat([half, half + self.padded // 2])

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the tensor `name` of this shape gets."""
        axis = self._axis(name)
        if axis is None:
            return shape
        return (*shape[:axis], shape[axis] // self.size * self.padded, *shape[axis + 1 :])

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as the padded model has it; one that no head is part of is returned as it is."""
        axis = self._axis(name)
        if axis is None:
            return tensor
        shape = self.shape(name, tuple(tensor.shape))
        heads = tensor.shape[axis] // self.size
        wide = tensor.new_zeros(*shape[:axis], heads, self.padded, *shape[axis + 1 :])
        narrow = tensor.unflatten(axis, (heads, self.size)) * self._scale(name)
        return wide.index_copy_(axis + 1, self.places.to(tensor.device), narrow.to(tensor.dtype)).view(shape)

    def _axis(self, name: str) -> int | None:
        """The axis along which the heads of this tensor lie, or None."""
        module = name.rpartition(".")[0].rpartition(".")[2]
        if module in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"):
            return 0
        return 1 if module == "o_proj" and name.endswith(".weight") else None

    def _scale(self, name: str) -> float:
        module = name.rpartition(".")[0].rpartition(".")[2]
        root = (self.padded / self.size) ** 0.5
        if not self.query_norm:
            return root if module == "q_proj" else 1.0
        return {"q_proj": root, "k_proj": root, "k_norm": 1 / root}.get(module, 1.0)


def padding_for(config, multiple: int) -> HeadPadding | None:
    """What this transformers config needs on an engine whose heads must be a `multiple` wide; None when nothing.

    Raises ValueError for a model that cannot be padded without changing it.
    """
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if size % multiple == 0:
        return None
    rotary = (getattr(text, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    if text.model_type not in FITTING or multiple % size or rotary != 1.0:
        raise ValueError(
            f"the engine takes attention heads whose width is a multiple of {multiple}; heads of {size} of a "
            f"{text.model_type!r} model cannot be padded to that without changing the model"
        )
    return HeadPadding(size, multiple, query_norm=text.model_type in ("qwen3", "qwen3_moe"))
