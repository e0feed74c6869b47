"""Row statistics straight from hidden states and weight: the logits live in registers only.

This kernel multiplies tile by tile and folds each tile into running row statistics. A program has a block of rows and a
range of the vocabulary ("split"); the splits are joined at the end.

    of each split   top = max z      e = Σ exp(z − top)      ez = Σ exp(z − top) (z − top)
    joined          max = max top    Σ = Σ_splits e · exp(top − max)      and Σ exp(top − max) (ez + (top − max) e)

When it pays, by arithmetic (no GPU has measured it): through cuBLAS a logit costs 2H FLOP at 700 TFLOP/s and a round trip
of 8 bytes at 4.3 TB/s, together 2.9 H fs + 1.9 ps. Here a 128 × 128 tile makes 64 FLOP per byte that it reads from L2,
350 TFLOP/s at 5.5 TB/s, 5.7 H fs. Even at H = 650; hence `linear_logprob.FUSED_FORWARD_MAX_HIDDEN` = 512. Larger tiles
spill, since a tile's exp needs as many registers as the tile.

Imported only when the Triton backend serves. Legend: N rows, V vocabulary, H hidden size, S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from amft_kernels.row_math import Head
from amft_kernels.rows_launch import head_arguments
from amft_kernels.rows_triton import LOWEST, PADDING, scale

_BLOCK_H = 64

# Programs wanted: a few per multiprocessor, so that the last wave is short.
_PROGRAMS = 1024


@triton.jit
def fused_stats_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    temperature_ptr,
    top_ptr,
    e_ptr,
    ez_ptr,
    target_z_ptr,
    N,
    V,
    H,
    hidden_stride,
    weight_stride,
    split_columns,
    temperature,
    softcap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    first_col = split * split_columns
    end_col = tl.minimum(first_col + split_columns, V)
    row_mask = rows < N
    target = tl.load(targets_ptr + rows, mask=row_mask, other=0)
    if temperature_ptr is not None:
        inverse_temperature = 1.0 / tl.load(temperature_ptr + rows, mask=row_mask, other=1.0)
    else:
        inverse_temperature = tl.full((BLOCK_N,), 1.0, tl.float32) / temperature

    hs = tl.arange(0, BLOCK_H)
    hidden_rows = hidden_ptr + rows.to(tl.int64)[:, None] * hidden_stride + hs[None, :]
    top = tl.full((BLOCK_N,), PADDING, tl.float32)
    e_sum = tl.zeros((BLOCK_N,), tl.float32)
    ez_sum = tl.zeros((BLOCK_N,), tl.float32)
    target_z = tl.zeros((BLOCK_N,), tl.float32)
    for tile_col in range(first_col, end_col, BLOCK_V):
        cols = tile_col + tl.arange(0, BLOCK_V)
        weight_rows = weight_ptr + cols.to(tl.int64)[None, :] * weight_stride + hs[:, None]
        x = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for k in range(0, H, BLOCK_H):
            h = tl.load(hidden_rows + k, mask=row_mask[:, None], other=0.0)
            w = tl.load(weight_rows + k, mask=cols[None, :] < V, other=0.0)
            x = tl.dot(h, w, x)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
        z = scale(x, inverse_temperature[:, None], softcap)
        if bias_ptr is not None:
            z = tl.maximum(z, LOWEST)
        z = tl.where(cols[None, :] < end_col, z, PADDING)
        target_z += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), 1)
        new_top = tl.maximum(top, tl.max(z, 1))
        shift = top - new_top
        decay = tl.exp(shift)
        z -= new_top[:, None]
        e = tl.exp(z)
        ez_sum = decay * (ez_sum + shift * e_sum) + tl.sum(e * z, 1)
        e_sum = decay * e_sum + tl.sum(e, 1)
        top = new_top

    out = split.to(tl.int64) * N + rows
    tl.store(top_ptr + out, top, mask=row_mask)
    tl.store(e_ptr + out, e_sum, mask=row_mask)
    tl.store(ez_ptr + out, ez_sum, mask=row_mask)
    tl.store(target_z_ptr + rows, target_z, mask=row_mask & (target >= first_col) & (target < end_col))


def suits(hidden_NH: torch.Tensor, most: int) -> bool:
    """Whether to take this kernel: 16-bit operands, H at most `most` and a multiple of the tile's."""
    n, h = hidden_NH.shape
    return n > 0 and hidden_NH.dtype.itemsize == 2 and h <= most and h % _BLOCK_H == 0


def fused_config(architecture: int) -> dict[str, int]:
    """The largest tile that does not spill: 128 columns do from sm_100 on, where tensor cores keep the sums elsewhere."""
    columns = 128 if architecture < 100 else 64
    return {"BLOCK_N": 128, "BLOCK_V": columns, "BLOCK_H": _BLOCK_H, "num_warps": 8, "num_stages": 3}


def fused_stats(hidden_NH: torch.Tensor, targets_N: torch.Tensor, head: Head) -> tuple[torch.Tensor, ...]:
    """logp, entropy, max z and log Σ exp(z − max) of every row."""
    (n, h), v = hidden_NH.shape, head.weight_VH.shape[0]
    hidden_NH, weight_VH = hidden_NH.contiguous(), head.weight_VH.contiguous()
    config = fused_config(_architecture(hidden_NH.device))
    row_blocks, tiles = triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(v, config["BLOCK_V"])
    split_columns = triton.cdiv(tiles, min(tiles, triton.cdiv(_PROGRAMS, row_blocks))) * config["BLOCK_V"]
    splits = triton.cdiv(v, split_columns)
    top_SN, e_SN, ez_SN = torch.empty(3, splits, n, dtype=torch.float32, device=hidden_NH.device)
    target_z_N = torch.empty(n, dtype=torch.float32, device=hidden_NH.device)
    fused_stats_kernel[(row_blocks, splits)](
        hidden_ptr=hidden_NH,
        weight_ptr=weight_VH,
        targets_ptr=targets_N,
        top_ptr=top_SN,
        e_ptr=e_SN,
        ez_ptr=ez_SN,
        target_z_ptr=target_z_N,
        N=n,
        V=v,
        H=h,
        hidden_stride=hidden_NH.stride(0),
        weight_stride=weight_VH.stride(0),
        split_columns=split_columns,
        **head_arguments(head),
        **config,
    )
    max_N = top_SN.amax(0)
    shift_SN = top_SN - max_N
    decay_SN = shift_SN.exp()
    total_N = (decay_SN * e_SN).sum(0)
    log_sum_N = total_N.log()
    entropy_N = log_sum_N - (decay_SN * (ez_SN + shift_SN * e_SN)).sum(0) / total_N
    return target_z_N - max_N - log_sum_N, entropy_N, max_N, log_sum_N


def _architecture(device: torch.device) -> int:
    """80, 90, 100, ...; 0 in the interpreter."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor
