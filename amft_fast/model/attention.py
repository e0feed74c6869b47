"""Attention over packed rows, by what is there; registered with transformers under the names of `NAMES`.

FlashAttention 4, 3 or 2 and `torch.nn.attention.varlen` take segments as they are. Where none of them runs (a CPU, fp32, an old
GPU) segments of similar length become padded rows of torch's SDPA: the padding costs attention only, never the layers' matrix
products. A call without a layout (rollouts, evaluation, padded training) is transformers' own SDPA.

Legend: T tokens of the packed row, K keys (T, more where segments share a prompt), A heads, D size of a head.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from amft_fast.data.packing import Layout
from amft_fast.errors import UserError
from amft_fast.model.ulysses import Ulysses

# model.attention, and what transformers knows it by. Others are transformers' own and take packed rows with a dense mask.
NAMES = {
    "auto": "amft_packed",
    "flash_attention_4": "amft_packed_4",
    "flash_attention_3": "amft_packed_3",
    "flash_attention_2": "amft_packed_2",
}
TINY = 1024  # query-key pairs of a row, up to which attention is written out on a CPU
SHORT = 1 << 14  # the same, up to which bf16 is attended in fp32 there: torch's backward in bf16 has a price of its own
LAYERS = {
    "full_attention",
    "sliding_attention",
}  # kinds of layers that know packed rows; others mix tokens by other ways


@dataclass(frozen=True)
class Backend:
    """A kernel over segments. `works`: the compute capabilities it is for; `find`: imports it (ImportError: not there)."""

    name: str
    works: Callable[[tuple[int, int]], bool]
    find: Callable[[], Callable]


def _library(module: str) -> Callable[[], Callable]:
    return lambda: importlib.import_module(module).flash_attn_varlen_func


def _torch_varlen() -> Callable:
    return importlib.import_module("torch.nn.attention.varlen").varlen_attn


# In the order of preference. FlashAttention 4 is written for Hopper and Blackwell, 3 for Hopper alone.
BACKENDS = (
    Backend("flash-attn 4", lambda c: c[0] in (9, 10, 11), _library("flash_attn.cute")),
    Backend("flash-attn 3", lambda c: c[0] == 9, _library("flash_attn_interface")),
    Backend("flash-attn 2", lambda c: c[0] >= 8, _library("flash_attn")),
    Backend("torch varlen", lambda c: c[0] >= 8, _torch_varlen),
)


@lru_cache
def backend(device_type: str, dtype: torch.dtype, wanted: str = "") -> tuple[str, Callable | None, str]:
    """(name, function or None for padded SDPA, reason) of what serves packed rows there; `wanted` narrows the choice."""
    if device_type != "cuda":
        return "sdpa", None, "segments as padded rows; kernels over segments need a CUDA GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return "sdpa", None, f"segments as padded rows; kernels over segments take bf16 and fp16, not {dtype}"
    capability, passed = torch.cuda.get_device_capability(), []
    for b in (b for b in BACKENDS if wanted in b.name):
        if not b.works(capability):
            passed.append(f"{b.name} is not for compute capability {capability[0]}.{capability[1]}")
            continue
        try:
            return b.name, b.find(), "; ".join(["packed rows as segments", *passed])
        except (ImportError, OSError, AttributeError) as e:
            missing = isinstance(e, ModuleNotFoundError)
            passed.append(f"{b.name} is not installed" if missing else f"{b.name} does not load ({e})"[:120])
    return "sdpa", None, "; ".join(["segments as padded rows", *passed])


def obstacle(config) -> str | None:
    """Why a model of this config cannot be trained on packed rows; None when it can."""
    if getattr(config, "vision_config", None) is not None:
        return "pictures give tokens positions in three axes"
    text = config.get_text_config()
    odd = set(getattr(text, "layer_types", None) or ()) - LAYERS
    if odd:
        return f"its layers of kind {', '.join(sorted(odd))} mix tokens across sequences"
    if getattr(text, "attn_logit_softcapping", None):
        return "its attention scores are capped"
    if getattr(text, "model_type", "") in ("gpt_oss",):
        return "its attention has sinks"
    return None


def choose(setting: str, config, device: torch.device, dtype: torch.dtype) -> str:
    """The `attn_implementation` for model.attention. Raises UserError when what it asks for does not run there."""
    if setting not in NAMES:
        return setting
    if setting != "auto":
        _, kernel, why = backend(device.type, dtype, f"flash-attn {setting[-1]}")
        if kernel is None:
            raise UserError(f"model.attention: {setting} cannot serve here ({why}); use auto")
    elif obstacle(config):
        return "sdpa"
    register()
    return NAMES[setting]


def register() -> None:
    """Makes the names known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for setting, name in NAMES.items():
        wanted = "" if setting == "auto" else f"flash-attn {setting[-1]}"
        AttentionInterface.register(name, partial(attention, wanted=wanted))
        AttentionMaskInterface.register(name, sdpa_mask)


def packs(config) -> bool:
    """Whether packing pays: not where attention would go over a dense mask."""
    return getattr(config, "_attn_implementation", "") in NAMES.values()


def inputs(config, layout: Layout, like: torch.Tensor, ulysses: Ulysses | None = None) -> dict[str, Any]:
    """What the backbone needs for a packed row (or, with `ulysses`, a rank's part of one) besides ids and positions.

    Our own function takes the layout. Its mask is a stand-in, which transformers hands on without looking at it: without any it
    would read the positions back to the host, to find out whether they are packed.
    """
    if packs(config):
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=like.device)
        return {"attention_mask": mask, "amft_layout": layout, "amft_ulysses": ulysses}
    return {"attention_mask": layout.mask(like.dtype)}


@torch.compiler.disable  # kernels and gathers by themselves: nothing to fuse, and lengths that change with each micro-batch
def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    amft_layout: Layout | None = None,
    amft_ulysses: Ulysses | None = None,
    wanted: str = "",
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function of a layer: [1, A, T, D] queries, keys and values to [1, T, A, D]; with `amft_ulysses` this rank's
    tokens of them."""
    if amft_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    amft_layout.calls += 1
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    whole = partial(_packed, layout=amft_layout, scale=scale, dropout=dropout, window=sliding_window, wanted=wanted)
    if amft_ulysses is not None:
        return amft_ulysses.attend(whole, query, key, value, amft_layout.tokens), None
    return whole(query, key, value), None


def _packed(query, key, value, layout: Layout, scale, dropout, window, wanted) -> torch.Tensor:
    """[1, T, A, D] of a whole row's [1, A, T, D]."""
    name, kernel, _ = backend(query.device.type, query.dtype, wanted)
    q_TAD, k_TAD, v_TAD = (x[0].transpose(0, 1) for x in (query, key, value))
    if kernel is None:
        return _padded(q_TAD, k_TAD, v_TAD, layout, scale, dropout, window)[None]
    if layout.k_index is not None:
        k_TAD, v_TAD = k_TAD.index_select(0, layout.k_index), v_TAD.index_select(0, layout.k_index)
    bounds = (layout.q_starts, layout.k_starts, layout.max_q, layout.max_k)
    return segments(name, kernel, q_TAD, k_TAD, v_TAD, bounds, scale, dropout, window)[None]


def segments(name, kernel, q_TAD, k_KAD, v_KAD, bounds, scale, dropout=0.0, window=None) -> torch.Tensor:
    """One call of a `backend`'s kernel over all segments, [T, A, D]. Causal in all these kernels means that the last query sees
    the last key. `bounds`: where segments start among queries and among keys (and where the last ends), int32 on the device,
    and the longest of each."""
    left = -1 if window is None else window - 1
    if name == "torch varlen":
        # From torch 2.12 on it wants to be told of grouped heads; torch 2.11's takes them as they come.
        told = {"enable_gqa": q_TAD.shape[1] != k_KAD.shape[1]} if _takes(kernel, "enable_gqa") else {}
        return kernel(q_TAD, k_KAD, v_KAD, *bounds, scale=scale, window_size=(left, 0), **told)
    options = {"softmax_scale": scale, "causal": True}
    if window is not None:
        options["window_size"] = (left, 0)
    if name == "flash-attn 2":
        options["dropout_p"] = dropout
    cu_q, cu_k, max_q, max_k = bounds
    out = kernel(
        q_TAD, k_KAD, v_KAD, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k, **options
    )
    return out[0] if isinstance(out, tuple) else out


@lru_cache
def _takes(kernel: Callable, argument: str) -> bool:
    return argument in inspect.signature(kernel).parameters


def _padded(q_TAD, k_TAD, v_TAD, layout: Layout, scale, dropout, window) -> torch.Tensor:
    """SDPA over segments of similar length, padded to one another. Memory-bound gathers; no [T, T] mask ever exists."""
    gqa = q_TAD.shape[1] != k_TAD.shape[1]
    out = []
    calls, back = layout.padded
    for call in calls:
        q, k, v = (_rows(x, i) for x, i in ((q_TAD, call.q_index), (k_TAD, call.k_index), (v_TAD, call.k_index)))
        mask, dtype = _windowed(call, window), q.dtype
        if q.device.type == "cpu" and dtype == torch.bfloat16 and q.shape[2] * k.shape[2] <= SHORT:
            q, k, v = q.float(), k.float(), v.float()
        if q.device.type == "cpu" and q.shape[2] * k.shape[2] <= TINY and not dropout:
            o_BALD = _tiny(q, k, v, mask, scale)
        else:
            o_BALD = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=gqa
            )
        out.append(o_BALD.to(dtype).transpose(1, 2).flatten(0, 1))
    return torch.cat(out).index_select(0, back)


def _tiny(q_BALD, k_BGKD, v_BGKD, mask, scale: float) -> torch.Tensor:
    """Attention written out, heads of a group in one product: for a few dozen tokens torch's CPU kernel is all overhead."""
    (b, heads, wide_q, d), (groups, wide_k) = q_BALD.shape, k_BGKD.shape[1:3]
    if mask is None:
        mask = torch.ones(wide_q, wide_k, dtype=torch.bool).tril()
    bias = torch.zeros(mask.shape, dtype=q_BALD.dtype).masked_fill_(~mask, torch.finfo(q_BALD.dtype).min)
    scores = (q_BALD * scale).reshape(b * groups, -1, d) @ k_BGKD.reshape(b * groups, wide_k, d).transpose(1, 2)
    weights = (scores.view(b, heads, wide_q, wide_k) + bias).softmax(-1)
    out = weights.view(b * groups, -1, wide_k) @ v_BGKD.reshape(b * groups, wide_k, d)
    return out.view(b, heads, wide_q, d)


def _rows(x_TAD: torch.Tensor, index_BL: torch.Tensor) -> torch.Tensor:
    """[B, A, L, D]: the tokens at these places."""
    return x_TAD.index_select(0, index_BL.flatten()).unflatten(0, index_BL.shape).transpose(1, 2)


def _windowed(call, window: int | None) -> torch.Tensor | None:
    """The call's mask, narrowed to a sliding window of the last `window` keys where the layer has one."""
    wide_q, wide_k = call.q_index.shape[1], call.k_index.shape[1]
    if window is None or wide_k <= window:
        return call.mask
    if call.mask is None:
        full = torch.ones(wide_q, wide_k, dtype=torch.bool, device=call.q_index.device)
        return (full.tril() & full.triu(1 - window))[None, None]
    newest = call.mask.sum(-1, keepdim=True)  # number of keys a query sees: they are the first ones of its row
    return call.mask & (torch.arange(wide_k, device=newest.device) >= newest - window)
