"""Attention of one new token a row over a cache of keys and values whose rows are of different lengths, in Triton.

Each row reads the keys it has and no others: no mask, no padding, and the lengths are read on the device, so that a launch
can be captured in a CUDA graph. A program serves all query heads that share a key head, so keys are read once.

Imported only where Triton serves. Legend: A rows, R places of the cache (A or more), G key heads, Q query heads of each, C room
of a row, D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def decode_attention_kernel(
    out_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    query_stride,
    scale,
    capacity,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, key head): online softmax over blocks of keys, sums in fp32."""
    row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    length = tl.load(position_ptr + row) + 1
    of_group, of_head = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDE)[None, :]
    real = (of_group < GROUP) & (of_head < SIZE)
    at = (head * GROUP + of_group) * SIZE + of_head
    query = tl.load(query_ptr + row.to(tl.int64) * query_stride + at, mask=real, other=0.0)
    first = (row.to(tl.int64) * heads + head) * capacity * SIZE
    largest = tl.full((HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((HEADS, WIDE), tl.float32)
    for start in range(0, length, BLOCK):
        token = start + tl.arange(0, BLOCK)
        there = (token < length)[:, None] & (of_head < SIZE)
        offset = first + token[:, None] * SIZE + of_head
        keys = tl.load(keys_ptr + offset, mask=there, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where((token < length)[None, :], scores, -float("inf"))
        above = tl.maximum(largest, tl.max(scores, 1))
        weights, shrink = tl.exp(scores - above[:, None]), tl.exp(largest - above)
        values = tl.load(values_ptr + offset, mask=there, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        largest = above
    out = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64) * heads * GROUP * SIZE + at, out, mask=real)


def decode_attention(
    query_AQD: torch.Tensor,
    keys_RGCD: torch.Tensor,
    values_RGCD: torch.Tensor,
    position_A: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """[A, Q · G · D]: query i of row a looks at keys 0 … position[a] of place a. Query heads of a group lie side by side.

    Queries may be a slice of a wider tensor along dimension 1; keys and values are contiguous.
    """
    rows, heads, size = query_AQD.shape
    key_heads, capacity = keys_RGCD.shape[1:3]
    out = torch.empty(rows, heads * size, dtype=query_AQD.dtype, device=query_AQD.device)
    group = heads // key_heads
    decode_attention_kernel[(rows, key_heads)](
        out_ptr=out,
        query_ptr=query_AQD,
        keys_ptr=keys_RGCD,
        values_ptr=values_RGCD,
        position_ptr=position_A,
        query_stride=query_AQD.stride(0),
        scale=scale,
        capacity=capacity,
        **decode_config(group, size),
    )
    return out


def decode_config(group: int, size: int) -> dict[str, int]:
    """Shapes of a program: `tl.dot` wants 16 rows at least; 64 keys of 128 are 16 KiB in bf16, two stages of both fit."""
    heads, wide = max(16, triton.next_power_of_2(group)), max(16, triton.next_power_of_2(size))
    block = 64 if wide <= 128 else 32
    return {"GROUP": group, "HEADS": heads, "SIZE": size, "WIDE": wide, "BLOCK": block, "num_warps": 4, "num_stages": 2}
