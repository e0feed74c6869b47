"""The shape of a model without its weights: from a folder, the hub's cache, or a small table, built on torch's meta device.

Legend: H hidden size, Q heads·head_dim, K kv_heads·head_dim, I width of the MLP (of one expert), L layers, V vocabulary.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amft_fast.errors import UserError

if TYPE_CHECKING:
    from torch import nn

ALIGN = 64  # elements: what engine/local.py rounds each parameter up to in its flat buffers

_QWEN_7B = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
}
_QWEN_1_5B = {
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_QWEN_72B = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 29568,
    "vocab_size": 152064,
}
_QWEN3_30B_A3B = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
}
_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}

# The fields of published config.json files that decide sizes, by the last part of the hub name without "-Instruct".
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5-1.5B": ("qwen2", _QWEN_1_5B),
    "Qwen2.5-Math-1.5B": ("qwen2", _QWEN_1_5B),
    "Qwen2.5-7B": ("qwen2", _QWEN_7B),
    "Qwen2.5-Math-7B": ("qwen2", _QWEN_7B),
    "Qwen2.5-72B": ("qwen2", _QWEN_72B),
    "Qwen2.5-Math-72B": ("qwen2", _QWEN_72B),
    "Qwen3-30B-A3B": ("qwen3_moe", _QWEN3_30B_A3B),
    "Qwen3-30B-A3B-Base": ("qwen3_moe", _QWEN3_30B_A3B),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", {"text_config": _QWEN_7B, "vision_config": _VISION}),
}


@dataclass(frozen=True)
class Tower:
    """A stack of equal layers: attention, then a gated MLP, or a router and `experts` of them, `chosen` for each token."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    norms: int  # RMS norms of width H in a layer
    qk_norm: bool
    matrix: int  # weights in the matrix products that a token takes in one layer
    parameters: int  # of one layer
    experts: int = 0
    chosen: int = 0

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def k(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def idle(self) -> int:
        """Parameters of one layer that a token passes by."""
        return 3 * self.hidden * self.intermediate * (self.experts - self.chosen)


@dataclass(frozen=True)
class Shape:
    """What memory and FLOPs follow from."""

    name: str
    source: str  # where the shape was found: folder, hub cache, built-in table
    parameters: int
    flat: int  # parameters, each tensor rounded up to ALIGN elements
    largest: int  # elements of the largest tensor
    vocab: int
    text: Tower
    vision: Tower | None
    patches_per_token: int  # of the vision tower for one image token of the language model
    own_loop: bool  # whether rollouts read by rollout/decoder.py

    @property
    def head(self) -> int:
        """Weights of the language-model head."""
        return self.vocab * self.text.hidden

    @property
    def active(self) -> int:
        """Parameters that a token meets: all, but of a mixture of experts."""
        return self.parameters - self.text.layers * self.text.idle


@functools.cache
def find(path: str) -> Shape:
    """The shape of `path`: a checkpoint folder, a hub name that is in the cache, or a name in `KNOWN`. Never asks the hub.

    Raises UserError when it is none of these, or a model whose memory the formulas do not describe.
    """
    from transformers import AutoConfig

    if not path:
        raise UserError("model.path is not set: give a transformers checkpoint folder or a hub name")
    source = "folder" if (Path(path).expanduser() / "config.json").exists() else "hub cache"
    try:
        config = AutoConfig.from_pretrained(
            str(Path(path).expanduser()) if source == "folder" else path, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as e:
        key = re.sub(r"-instruct$", "", path.rpartition("/")[2], flags=re.IGNORECASE).lower()
        known = next((v for k, v in KNOWN.items() if k.lower() == key), None)
        if source == "folder":
            raise UserError(f"model.path: {path}/config.json could not be read: {str(e).splitlines()[0]}") from None
        if known is None:
            raise UserError(
                f"model.path: the shape of {path!r} is not known here: it is no folder with a config.json, not in the hub's "
                f"cache, and none of {', '.join(KNOWN)}; download its config.json into a folder and give that"
            ) from None
        source, config = "built-in table", AutoConfig.for_model(known[0], **known[1])
    return shape_of(config, path, source)


def shape_of(config: Any, name: str, source: str) -> Shape:
    """The shape of a transformers config. Raises UserError for a model that the formulas do not describe."""
    from amft_fast.rollout.decoder import obstacle

    model = meta_model(config, name)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    text = config.get_text_config()
    layer = _layer(sizes, r"(?<!visual)\.layers\.0\.")
    if not any("gate_proj" in n or "gate_up_proj" in n for n in layer):
        raise UserError(
            f"model.path: --plan knows models with gated MLPs (Qwen, Llama, Mistral, Gemma, Qwen3-MoE ...), and {name!r} "
            f"(model_type {config.model_type!r}) is none"
        )
    _check_mixture(sizes, text, name)
    vision = getattr(config, "vision_config", None)
    blocks = _layer(sizes, r"\.blocks\.0\.")
    if vision is not None and not any("gate_proj" in n for n in blocks):
        raise UserError(f"model.path: --plan knows the vision tower of Qwen2.5-VL alone, and {name!r} has another")
    return Shape(
        name=name,
        source=source,
        parameters=sum(sizes.values()),
        flat=sum(-(-n // ALIGN) * ALIGN for n in sizes.values()),
        largest=max(sizes.values()),
        vocab=text.vocab_size,
        text=_tower(text, text.num_hidden_layers, text.num_attention_heads, model, layer, r"norm"),
        vision=None if vision is None else _tower(vision, vision.depth, vision.num_heads, model, blocks, r"norm"),
        patches_per_token=0 if vision is None else vision.spatial_merge_size**2,
        own_loop=vision is None and obstacle(model) is None,
    )


def _check_mixture(sizes: dict[str, int], text: Any, name: str) -> None:
    """Raises UserError for a mixture of experts that is not a router and equal experts in every layer."""
    if not any(".experts." in n for n in sizes):
        return
    layers = [sum(_layer(sizes, rf"\.layers\.{i}\.").values()) for i in range(text.num_hidden_layers)]
    if len(set(layers)) > 1 or any("shared" in n for n in sizes) or not hasattr(text, "moe_intermediate_size"):
        raise UserError(
            f"model.path: --plan knows mixtures of experts whose layers are alike and have routed experts alone (Qwen3-MoE), "
            f"and {name!r} (model_type {text.model_type!r}) is another"
        )


def meta_model(config: Any, name: str = "model") -> nn.Module:
    """The model on the meta device: every shape, no memory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForCausalLM if getattr(config, "vision_config", None) is None else AutoModelForImageTextToText
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except ValueError as e:
        raise UserError(f"model.path: {name!r} is no causal language model: {str(e).splitlines()[0][:200]}") from None


def _layer(sizes: dict[str, int], pattern: str) -> dict[str, int]:
    return {n: size for n, size in sizes.items() if re.search(pattern, n)}


def _tower(config: Any, layers: int, heads: int, model: nn.Module, layer: dict[str, int], norm: str) -> Tower:
    hidden, mixed = config.hidden_size, any(".experts." in n for n in layer)
    experts, chosen = (config.num_experts, config.num_experts_per_tok) if mixed else (0, 0)
    width = config.moe_intermediate_size if mixed else config.intermediate_size
    dims = {n: p.dim() for n, p in model.named_parameters() if n in layer}
    head_norms = [n for n in layer if re.search(r"[qk]_norm\.", n)]
    return Tower(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        intermediate=width,
        norms=sum(bool(re.search(norm, n)) and n.endswith("weight") and n not in head_norms for n in layer),
        qk_norm=bool(head_norms),
        matrix=sum(size for n, size in layer.items() if dims[n] == 2) + 3 * hidden * width * chosen,
        parameters=sum(layer.values()),
        experts=experts,
        chosen=chosen,
    )
