"""All dots and norms that the probe needs, in one pass over lists of tensors.

A probed step leaves, for every owned parameter shard, one or two utility gradients u = ∇(−U), G1 = μ·g_SFT (a copy taken
between the two sweeps) and the total G = G1 + (1−μ)·g_RL. With d = g_SFT − g_RL and η the learning rate, a step along c·G has

    dU/dμ = +η ⟨u, P ∘ c(I − ĝĝᵀ) d⟩ = +η c (⟨u, P∘d⟩ − ⟨u, P∘G⟩⟨G, d⟩ / |G|²)

The clip coefficient is c = max_norm / |G|, and the part with ĝ = G/|G| comes from its own dependence on μ; without
clipping c = 1 and that part is absent. P is diagonal: what the optimizer makes of a small change of the gradient it is
given. The clip comes first, so P stands outside the projection; the other order is the same for SGD only. AdamW's step
t, from (m, v̄) and g = c·G, is η·m̂'/(√v̂' + ε) with m̂' = (β₁m + (1−β₁)g)/b₁, v̂' = (β₂v̄ + (1−β₂)g²)/b₂ and b = 1 − βᵗ;
its derivative by g is η·P with

    plain P = (1−β₁) / (b₁(√v̂' + ε))
    exact P = plain P − m̂'(1−β₂)g / (b₂√v̂'(√v̂' + ε)²)

The pass sums products of u1, u2, G1, dG = G − G1, G (`total`), P∘G1 and P∘dG, which do not depend on μ, in fp64;
`PROBE_SUMS` lists them. `named_sums` makes the probe's numbers of them, after the ranks' sums were added up.

`multi_tensor_dot` runs C++ or CUDA (csrc/, built by setup.py, called through ctypes) where it can, else
`multi_tensor_dot_reference`. All give the same numbers to 1e-12, and each the same bits on every call. AMFT_CPU_ISA=baseline
(or avx2) makes the bits the same on CPUs of different kinds; AMFT_NO_EXT=1 turns the libraries off.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Tensors = Sequence[Tensor]
Device = torch.device | str | None

_BASE_SUMS = (
    *(("u1", "u1"), ("u1", "g1"), ("u1", "dg"), ("u2", "u2"), ("u2", "g1"), ("u2", "dg"), ("u1", "u2")),
    *(("g1", "g1"), ("g1", "dg"), ("dg", "dg"), ("total", "total")),
)
_DIAGONALS = ("plain", "exact")


def _preconditioned_sums(p: str) -> tuple[tuple[str, str], ...]:
    dots = tuple((a, f"{p}_{b}") for a in ("u1", "u2", "total") for b in ("g1", "dg"))
    return (*dots, (f"{p}_g1", f"{p}_g1"), (f"{p}_dg", f"{p}_dg"))


# Entry i of the result is the dot-product of the two vectors named here; the same order as `enum Sum` in csrc.
PROBE_SUMS = (*_BASE_SUMS, *_preconditioned_sums("plain"), *_preconditioned_sums("exact"))

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}  # `enum Dtype` in csrc
_ABI = 1  # AMFT_ABI in csrc


@dataclass(frozen=True)
class AdamState:
    """AdamW's state before the step, and the step about to be taken; asks for the two diagonals' sums.

    `exp_avg` and `exp_avg_sq` match the gradients in length and shapes. `step` is 1 for the first step. `clip` is the
    coefficient c by which the gradient will be scaled, min(1, max_norm / norm): a float, or a tensor of one element,
    which is not copied to the host when it lies where the gradients do.
    """

    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]
    beta1: float
    beta2: float
    eps: float
    step: int
    clip: float | Tensor = 1.0


class _AdamScalars(ctypes.Structure):
    """`struct Adam` in csrc. The reference takes its scalars from here too."""

    _fields_ = (
        *(("clip", ctypes.c_double), ("beta1", ctypes.c_double), ("one_minus_beta1", ctypes.c_double)),
        *(("beta2", ctypes.c_double), ("one_minus_beta2", ctypes.c_double), ("eps", ctypes.c_double)),
        *(("plain_scale", ctypes.c_double), ("exact_scale", ctypes.c_double), ("inv_bias2", ctypes.c_double)),
    )


def _adam_scalars(adam: AdamState, clip: float) -> _AdamScalars:
    bias1, bias2 = 1 - adam.beta1**adam.step, 1 - adam.beta2**adam.step
    plain_scale, exact_scale = (1 - adam.beta1) / bias1, (1 - adam.beta2) / (bias1 * bias2)
    return _AdamScalars(
        *(clip, adam.beta1, 1 - adam.beta1, adam.beta2, 1 - adam.beta2, adam.eps),
        *(plain_scale, exact_scale, 1 / bias2),
    )


def _diagonals(a: _AdamScalars, clip: float | Tensor, total: Tensor, m: Tensor, v: Tensor) -> dict[str, Tensor]:
    g = clip * total
    m = a.beta1 * m + a.one_minus_beta1 * g
    root = ((a.beta2 * v + a.one_minus_beta2 * g * g) * a.inv_bias2).sqrt()
    plain = a.plain_scale / (root + a.eps)
    # Where v̂' is 0 so is g, and the second term is 0/0 with the limit 0.
    second = a.exact_scale * m * g / (torch.where(root == 0, 1.0, root) * (root + a.eps) ** 2)
    return {"plain": plain, "exact": plain - second}


def multi_tensor_dot_reference(
    u: Sequence[Tensors], g1: Tensors, total: Tensors, adam: AdamState | None = None, *, device: Device = None
) -> Tensor:
    """The same sums as `multi_tensor_dot` from torch's own operations, upcast to fp64 some elements at a time."""
    lists = _named_lists(u, g1, total, adam)
    device = _check(lists, device)
    sums = torch.zeros(len(PROBE_SUMS), dtype=torch.float64, device=device)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    clip: float | Tensor = 1.0
    scalars = None
    if adam is not None:
        _check_adam(adam)
        scalars = _adam_scalars(adam, 1.0)
        clip = torch.as_tensor(adam.clip, dtype=torch.float64, device=device).detach().reshape(())
    for blocks in _blocks(lists):
        vectors = {name: x.double() for name, x in blocks.items()}
        vectors["dg"] = vectors["total"] - vectors["g1"]
        if scalars is not None:
            diagonals = _diagonals(scalars, clip, vectors["total"], vectors["exp_avg"], vectors["exp_avg_sq"])
            for name, diagonal in diagonals.items():
                vectors[f"{name}_g1"] = diagonal * vectors["g1"]
                vectors[f"{name}_dg"] = diagonal * vectors["dg"]
        # Absent ones as zeros: to index by a list, the host would copy it to the device and wait.
        present = [vectors[a] @ vectors[b] if a in vectors and b in vectors else zero for a, b in PROBE_SUMS]
        sums += torch.stack(present)
    return sums


def _blocks(lists: dict[str, Tensors], block: int = 1 << 18) -> Iterator[dict[str, Tensor]]:
    for index, first in enumerate(lists["g1"]):
        flat = {name: tensors[index].detach().reshape(-1) for name, tensors in lists.items()}
        for start in range(0, first.numel(), block):
            yield {name: x[start : start + block] for name, x in flat.items()}


def multi_tensor_dot(
    u: Sequence[Tensors], g1: Tensors, total: Tensors, adam: AdamState | None = None, *, device: Device = None
) -> Tensor:
    """All sums of `PROBE_SUMS` over lists of tensors, in one pass: fp64 `(len(PROBE_SUMS),)` on the tensors' device.

    `u` holds one or two lists of utility gradients; sums with a second u that was not given, or with a diagonal that
    was not asked for, are 0. Entry i of every list has the same shape; each tensor is fp32, bf16 or fp64, contiguous,
    and on the one device. Lists may be empty: `device` then says where the zeros go (default: the CPU). On CUDA nothing
    waits for the device. The same inputs at the same alignment give the same bits, whatever the number of threads.

    Raises ValueError, naming list and index, for lists of different length, a mismatch of shape or device, another
    dtype, a tensor that is not contiguous; and, naming the argument, for AdamW hyper-parameters out of range.
    """
    lists = _named_lists(u, g1, total, adam)
    where = _check(lists, device)
    if adam is not None:
        _check_adam(adam)
    library = _library(where.type)
    if isinstance(library, str):
        return multi_tensor_dot_reference(u, g1, total, adam, device=where)
    if where.type == "cpu":
        return _dot_cpu(library, lists, adam)
    return _dot_cuda(library, lists, adam, where)


def named_sums(sums: Sequence[float], mu: float) -> dict[str, float]:
    """The probe's numbers by name, from the sums (added over ranks) and the μ ∈ (0, 1) they were taken at.

    With d = g_SFT − g_RL, u = u1 or u2 and P = plain or exact, by their names:
    `u_u`, `u_sft`, `u_rl`, `u_d`, `u_total`, `u1_u2`, `sft_sft`, `rl_rl`, `sft_rl`, `d_d`, `total_total`, `total_sft`,
    `total_rl`, `total_d`;
    `u_P_sft` = ⟨u, P∘g_SFT⟩, `u_P_rl`, `u_P_d`, `u_P_total`, `total_P_sft`, `total_P_rl`, `total_P_d`, `total_P_total`;
    `P_sft_sq` = |P∘g_SFT|², `P_rl_sq`. Dots and squared norms: nothing is divided by a norm.
    """
    if not 0 < mu < 1:
        raise ValueError(f"mu must lie inside (0, 1), got {mu}")
    if len(sums) != len(PROBE_SUMS):
        raise ValueError(f"sums must hold {len(PROBE_SUMS)} numbers, got {len(sums)}")
    s = dict(zip(PROBE_SUMS, sums))
    out = {f"{a}_{b}": s[a, b] for a, b in (("u1", "u1"), ("u2", "u2"), ("u1", "u2"), ("total", "total"))}

    def split(name: str, with_g1: float, with_dg: float) -> None:
        sft, rl = with_g1 / mu, with_dg / (1 - mu)
        out.update({f"{name}_sft": sft, f"{name}_rl": rl, f"{name}_d": sft - rl})

    for name in ("u1", "u2"):
        split(name, s[name, "g1"], s[name, "dg"])
        out[f"{name}_total"] = s[name, "g1"] + s[name, "dg"]
    split("total", s["g1", "g1"] + s["g1", "dg"], s["g1", "dg"] + s["dg", "dg"])
    out["sft_sft"], out["rl_rl"] = s["g1", "g1"] / mu**2, s["dg", "dg"] / (1 - mu) ** 2
    out["sft_rl"] = s["g1", "dg"] / (mu * (1 - mu))
    out["d_d"] = out["sft_sft"] - 2 * out["sft_rl"] + out["rl_rl"]
    for p in _DIAGONALS:
        for name in ("u1", "u2", "total"):
            split(f"{name}_{p}", s[name, f"{p}_g1"], s[name, f"{p}_dg"])
            out[f"{name}_{p}_total"] = s[name, f"{p}_g1"] + s[name, f"{p}_dg"]
        out[f"{p}_sft_sq"] = s[f"{p}_g1", f"{p}_g1"] / mu**2
        out[f"{p}_rl_sq"] = s[f"{p}_dg", f"{p}_dg"] / (1 - mu) ** 2
    return out


def mixing_slope(named: dict[str, float], u: str = "u1", diagonal: str | None = None, clip: float = 1.0) -> float:
    """⟨u, P ∘ c(I − ĝĝᵀ)(g_SFT − g_RL)⟩, so that dU/dμ = +η times it, from `named_sums`.

    `diagonal` is None (P = 1: SGD), "plain" or "exact". `clip` is c, and the projection is there when c < 1 (module
    docstring). With AdamW give `AdamState` the same `clip`.
    """
    if diagonal is not None and diagonal not in _DIAGONALS:
        raise ValueError(f"diagonal must be None, 'plain' or 'exact', got {diagonal!r}")
    along = u if diagonal is None else f"{u}_{diagonal}"
    slope = named[f"{along}_d"]
    if clip < 1:
        slope -= named[f"{along}_total"] * named["total_d"] / named["total_total"]
    return clip * slope


def _named_lists(u: Sequence[Tensors], g1: Tensors, total: Tensors, adam: AdamState | None) -> dict[str, Tensors]:
    if len(u) not in (1, 2) or any(isinstance(tensors, Tensor) for tensors in u):
        raise ValueError("u must hold one or two lists of tensors: [u] or [u1, u2]")
    lists = {f"u{i}": tensors for i, tensors in enumerate(u, 1)} | {"g1": g1, "total": total}
    if adam is not None:
        lists |= {"exp_avg": adam.exp_avg, "exp_avg_sq": adam.exp_avg_sq}
    return lists


def _check(lists: dict[str, Tensors], device: Device) -> torch.device:
    """The one device of all tensors. Compares whole lists first: 1200 tensors one by one would take 5 % of the pass."""
    first = lists["u1"]
    for name, tensors in lists.items():
        if len(tensors) != len(first):
            raise ValueError(f"{name} has {len(tensors)} tensors, u1 has {len(first)}")
        for index, x in enumerate(tensors):
            if not isinstance(x, Tensor) or x.layout != torch.strided:
                kind = f"a tensor of layout {x.layout}" if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"{name}[{index}] must be a dense tensor, got {kind}")
    if not first:
        return torch.device("cpu" if device is None else device)
    where, shapes = first[0].device, [x.shape for x in first]
    for name, tensors in lists.items():
        for index, x in enumerate(tensors):
            if x.dtype not in _DTYPES:
                raise ValueError(f"{name}[{index}] must be float32, bfloat16 or float64, got {x.dtype}")
            if x.device != where:
                raise ValueError(f"{name}[{index}] is on {x.device}, u1[0] on {where}")
            if not x.is_contiguous():
                raise ValueError(f"{name}[{index}] is not contiguous: shape {tuple(x.shape)}, strides {x.stride()}")
        if [x.shape for x in tensors] != shapes:
            index = next(i for i, x in enumerate(tensors) if x.shape != shapes[i])
            raise ValueError(
                f"{name}[{index}] has shape {tuple(tensors[index].shape)}, u1[{index}] has {tuple(shapes[index])}"
            )
    return where


def _check_adam(adam: AdamState) -> None:
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(adam, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {getattr(adam, name)}")
    if not adam.eps > 0:
        raise ValueError(f"eps must be positive, got {adam.eps}")
    if not adam.step >= 1:
        raise ValueError(f"step is the step about to be taken, 1 for the first, got {adam.step}")
    if isinstance(adam.clip, Tensor):
        if adam.clip.numel() != 1 or not adam.clip.is_floating_point():
            raise ValueError(f"clip must be one floating-point number, got {adam.clip.dtype} {tuple(adam.clip.shape)}")
    elif not adam.clip > 0:
        raise ValueError(f"clip must be positive, got {adam.clip}")


def _table(lists: dict[str, Tensors]) -> np.ndarray:
    """`struct Row` for each index: number of elements, dtypes, and a pointer for each of csrc's six lists (0: none)."""
    table_RC = np.zeros((len(lists["g1"]), 8), dtype=np.int64)
    table_RC[:, 0] = [x.numel() for x in lists["g1"]]
    for position, name in enumerate(("u1", "u2", "g1", "total", "exp_avg", "exp_avg_sq")):
        if name in lists:
            table_RC[:, 1] |= np.array([_DTYPES[x.dtype] for x in lists[name]], dtype=np.int64) << (4 * position)
            table_RC[:, 2 + position] = [x.data_ptr() for x in lists[name]]
    return table_RC


def _dot_cpu(library: ctypes.CDLL, lists: dict[str, Tensors], adam: AdamState | None) -> Tensor:
    table_RC = _table(lists)
    out = torch.empty(len(PROBE_SUMS), dtype=torch.float64)
    scalars = None if adam is None else ctypes.byref(_adam_scalars(adam, float(adam.clip)))
    # Starting a thread takes as long as about 50,000 elements.
    threads = min(torch.get_num_threads(), 1 + int(table_RC[:, 0].sum()) // 100_000)
    num_u = 2 if "u2" in lists else 1
    code = library.amft_multi_tensor_dot_cpu(
        table_RC.ctypes.data, len(table_RC), num_u, scalars, threads, out.data_ptr()
    )
    if code != 0:
        raise MemoryError("multi_tensor_dot ran out of memory for the sums of its chunks")
    return out


def _chunk_starts(table_RC: np.ndarray, chunk: int) -> np.ndarray:
    chunks_R = -(-table_RC[:, 0] // chunk)
    return np.concatenate([[0], np.cumsum(chunks_R)]).astype(np.int64)


def _dot_cuda(library: ctypes.CDLL, lists: dict[str, Tensors], adam: AdamState | None, device: torch.device) -> Tensor:
    table_RC = _table(lists)
    starts = _chunk_starts(table_RC, library.amft_cuda_chunk())
    num_chunks = int(starts[-1])
    if num_chunks == 0:
        return torch.zeros(len(PROBE_SUMS), dtype=torch.float64, device=device)
    scalars, clip = None, None
    if adam is not None:
        on_device = isinstance(adam.clip, Tensor) and adam.clip.device == device
        clip = adam.clip.detach().to(torch.float64) if on_device else None
        scalars = ctypes.byref(_adam_scalars(adam, 1.0 if on_device else float(adam.clip)))
    with torch.cuda.device(device):
        # From pinned memory, whose reuse torch's allocator puts off until the copy is done, this does not wait.
        host = torch.from_numpy(np.concatenate([table_RC.reshape(-1), starts])).pin_memory()
        table = host.to(device, non_blocking=True)
        blocks = min(num_chunks, library.amft_cuda_max_blocks())
        partials = torch.empty(len(PROBE_SUMS) * blocks, dtype=torch.float64, device=device)
        out = torch.empty(len(PROBE_SUMS), dtype=torch.float64, device=device)
        code = library.amft_multi_tensor_dot_cuda(
            *(table.data_ptr(), table.data_ptr() + table_RC.nbytes, len(table_RC), num_chunks),
            *(2 if "u2" in lists else 1, scalars, None if clip is None else clip.data_ptr()),
            *(partials.data_ptr(), out.data_ptr(), device.index, torch.cuda.current_stream().cuda_stream),
        )
    if code != 0:
        raise RuntimeError(f"multi_tensor_dot failed on {device}: {library.amft_cuda_error(code).decode()}")
    return out


@functools.cache
def _library(device_type: str) -> ctypes.CDLL | str:
    """The built library for "cpu" or "cuda", or why there is none."""
    if device_type not in ("cpu", "cuda"):
        return f"no build for {device_type}"
    if os.environ.get("AMFT_NO_EXT", "0") not in ("", "0"):
        return "switched off by AMFT_NO_EXT"
    path = Path(__file__).with_name(f"_multi_tensor_{device_type}.so")
    if not path.exists():
        needs = "a C++ compiler" if device_type == "cpu" else "nvcc and a CUDA torch"
        return f"{path.name} was not built: it needs {needs}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    if library.amft_abi() != _ABI:
        return f"{path.name} is of another version: install again"
    i64, i32, pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
    if device_type == "cpu":
        library.amft_isa.restype = ctypes.c_char_p
        library.amft_multi_tensor_dot_cpu.argtypes = [pointer, i64, i32, pointer, i32, pointer]
    else:
        library.amft_cuda_error.restype = ctypes.c_char_p
        library.amft_cuda_chunk.restype = library.amft_cuda_max_blocks.restype = i64
        library.amft_multi_tensor_dot_cuda.argtypes = [
            *(pointer, pointer, i64, i64, i32, pointer, pointer, pointer, pointer, i32, pointer)
        ]
    return library


def backends() -> dict[str, str]:
    """What `multi_tensor_dot` uses on each kind of device, in words, for `amft-fast doctor`."""
    words = {}
    for device_type in ("cpu", "cuda"):
        library = _library(device_type)
        if isinstance(library, str):
            words[device_type] = f"torch ({library})"
        else:
            words[device_type] = f"C++, {library.amft_isa().decode()}" if device_type == "cpu" else "CUDA"
    return words
