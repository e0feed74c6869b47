"""Launches of the row kernels: memory, configuration, arguments.

Imported only when the Triton backend serves. Legend: N rows of the call, n rows of a chunk, V vocabulary, S columns of a
slab, P a row's length in memory.
"""

from __future__ import annotations

import torch
import triton
from amft_kernels.loss_forms import FORMS, KL_KINDS, SHAPES, LossForm
from amft_kernels.policy_terms import PolicyOptions, Rows
from amft_kernels.row_math import Head
from amft_kernels.rows_triton import (
    logprob_rows_kernel,
    policy_parts_kernel,
    policy_rows_kernel,
    slab_grad_kernel,
)

_ROW_MULTIPLE = 64


def workspace(rows: int, vocab: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory for fp32 logits [n, P], or for a ∂L/∂x that is kept."""
    return torch.empty(rows, padded(vocab), dtype=dtype, device=device)


def padded(vocab: int) -> int:
    """P, the length of a row in memory."""
    return triton.cdiv(vocab, _ROW_MULTIPLE) * _ROW_MULTIPLE


def grad_view(logits_nP: torch.Tensor, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """Where the gradient [n, V] goes: over the logits in fp32, in their right half in a 16-bit type."""
    first = logits_nP.shape[1] if dtype.itemsize == 2 else 0
    return logits_nP.view(dtype)[:, first : first + vocab]


def row_config(vocab: int) -> dict[str, int]:
    """Columns per step and warps, by the row's length alone.

    Sixteen fp32 columns per thread are four 128-bit loads in flight, and at 64–100 registers two or three rows share a
    multiprocessor, one loading while another reduces. The best of a sweep on an H200 (bench/results/head_pieces_cuda.json);
    8192 columns on 16 warps, one row per multiprocessor, take a fifth longer.
    """
    block = min(4096, max(1024, triton.next_power_of_2(vocab)))
    return {"BLOCK": block, "num_warps": 4 if block == 1024 else 8}


def parts_config(vocab: int, block: int = 4096, warps: int = 4) -> dict[str, int]:
    """Programs a row, columns and warps of each, for the kernel whose programs keep their columns in registers.

    4096 columns on 4 warps are three programs of a multiprocessor, one loading while others wait or store: measured on an H200
    at 131,072 columns, 0.99 ms a chunk of 4096 rows, 1.04 with 8192 columns on 8 warps, 1.29 where a row is read twice.
    """
    parts = triton.cdiv(vocab, block)
    return {"PARTS": parts, "SLOTS": triton.next_power_of_2(parts), "BLOCK": block, "num_warps": warps}


def in_parts() -> bool:
    """Whether several programs share a row: they wait for one another, which the interpreter's cannot."""
    return not triton.knobs.runtime.interpret


def policy_rows(
    logits_nP: torch.Tensor,
    grad_nV: torch.Tensor | None,
    first_row: int,
    rows: Rows,
    head: Head,
    options: PolicyOptions,
    logprobs_N: torch.Tensor,
    entropy_N: torch.Tensor,
    config: dict[str, int] | None = None,
) -> None:
    """logp and entropy of rows `first_row` on; with `grad_nV` (over the logits, see `grad_view`, or in memory of its own),
    ∂L/∂x as well. `config`: another than `row_config`'s or `parts_config`'s, to measure."""
    vocab, n = head.weight_VH.shape[0], logits_nP.shape[0]
    config = config or (parts_config(vocab) if grad_nV is not None and in_parts() else row_config(vocab))
    kernel, programs, shared = policy_rows_kernel, n, {}
    if "PARTS" in config:
        shared = {
            "stats_ptr": logits_nP.new_empty(n, 3, config["SLOTS"]),
            "arrived_ptr": torch.zeros(n, dtype=torch.int32, device=logits_nP.device),
        }
        kernel, programs = policy_parts_kernel, n * config["PARTS"]
    kernel[(programs,)](
        logits_ptr=logits_nP,
        grad_ptr=grad_nV,
        targets_ptr=rows.targets,
        nll_weight_ptr=rows.nll_weight,
        shaped_weight_ptr=rows.shaped_weight,
        pg_weight_ptr=rows.pg_weight,
        entropy_weight_ptr=rows.entropy_weight,
        advantages_ptr=rows.advantages,
        old_ptr=rows.old_logprobs,
        behavior_ptr=rows.behavior_logprobs,
        ref_ptr=rows.ref_logprobs,
        logprobs_ptr=logprobs_N,
        entropy_ptr=entropy_N,
        first_row=first_row,
        V=vocab,
        row_stride=logits_nP.stride(0),
        grad_stride=0 if grad_nV is None else grad_nV.stride(0),
        kl_coef=float(options.kl_coef),
        clip_low=float(options.clip_low),
        clip_high=float(options.clip_high),
        dual_clip=_float(options.dual_clip),
        tis_cap=_float(options.tis_cap),
        **form_arguments(options.form),
        **head_arguments(head),
        **shared,
        **config,
    )


def logprob_rows(
    logits_nP: torch.Tensor, first_row: int, targets_N: torch.Tensor, head: Head, stats: tuple[torch.Tensor, ...]
) -> None:
    """logp, entropy, max z and log Σ exp(z − max) of rows `first_row` on, into `stats`."""
    logprobs_N, entropy_N, max_N, log_sum_N = stats
    vocab = head.weight_VH.shape[0]
    logprob_rows_kernel[(logits_nP.shape[0],)](
        logits_ptr=logits_nP,
        targets_ptr=targets_N,
        logprobs_ptr=logprobs_N,
        entropy_ptr=entropy_N,
        max_ptr=max_N,
        log_sum_ptr=log_sum_N,
        first_row=first_row,
        V=vocab,
        row_stride=logits_nP.stride(0),
        **head_arguments(head),
        **row_config(vocab),
    )


def slab_grad(
    logits_nP: torch.Tensor,
    grad_nS: torch.Tensor,
    first_row: int,
    first_col: int,
    targets_N: torch.Tensor,
    head: Head,
    stats: tuple[torch.Tensor, ...],
    logprobs_grad_N: torch.Tensor,
    entropy_grad_N: torch.Tensor | None,
) -> None:
    """∂L/∂x of a slab's columns; `head` is cut to the slab."""
    _, entropy_N, max_N, log_sum_N = stats
    width = head.weight_VH.shape[0]
    slab_grad_kernel[(logits_nP.shape[0],)](
        logits_ptr=logits_nP,
        grad_ptr=grad_nS,
        targets_ptr=targets_N,
        entropy_ptr=entropy_N,
        max_ptr=max_N,
        log_sum_ptr=log_sum_N,
        logprobs_grad_ptr=logprobs_grad_N,
        entropy_grad_ptr=entropy_grad_N,
        first_row=first_row,
        first_col=first_col,
        V=width,
        row_stride=logits_nP.stride(0),
        grad_stride=grad_nS.stride(0),
        **head_arguments(head),
        **row_config(width),
    )


def head_arguments(head: Head) -> dict:
    per_row = isinstance(head.temperature, torch.Tensor)
    return {
        "bias_ptr": head.bias_V,
        "temperature_ptr": head.temperature if per_row else None,
        "temperature": 1.0 if per_row else float(head.temperature),
        "softcap": _float(head.softcap),
    }


def form_arguments(form: LossForm) -> dict:
    """The form's constants; what decides which code runs is compiled in."""
    return {
        "ratio_cap": float(form.ratio_cap),
        "tau_positive": float(form.tau_positive),
        "tau_negative": float(form.tau_negative),
        "tv_bound": float(form.tv_bound),
        "ratio_penalty": float(form.ratio_penalty),
        "is_low": _float(form.is_low),
        "is_high": _float(form.is_high),
        "shape_gamma": float(form.shape_gamma),
        "FORM": FORMS.index(form.name),
        "KL": KL_KINDS.index(form.kl),
        "SHAPE": SHAPES.index(form.shape),
    }


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
