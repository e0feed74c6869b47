"""Other ways to the same loss: eager, torch.compile and other libraries, one small adapter each.

An adapter takes a `Case` and returns a function from nothing to the scalar loss, or raises `LeftOut` with a sentence that
says why it cannot run here. A library's own defaults hold, but for what the comparison needs: the sum of all tokens, and
no filtering of small gradients.

    log-prob and entropy, both differentiable     eager, compile, Liger scaled CE (CuTe on Hopper), cuTile, verl, TRL
    log-prob, no entropy                          Liger GRPO
    cross-entropy alone                           eager, compile, torch's own, Liger, Apple's, Quack, TRL
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from amft_kernels.linear_logprob import linear_logprob_reference
from torch import Tensor

from bench.workload import CLIP, Case

Run = Callable[[], Tensor]


class LeftOut(Exception):
    """Why a candidate cannot run here: one sentence."""


@dataclass(frozen=True)
class Peer:
    name: str
    kind: str
    make: Callable[[Case], Run]
    core: bool = False  # takes part in the sweeps over N and V
    once: bool = False  # takes part at the first shape alone: compiling takes a minute


def need(module: str, name: str, *, library: str) -> object:
    """An attribute of a library's module, or `LeftOut`."""
    root = module.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name == root:
            raise LeftOut(f"{library} is not installed") from None
        raise LeftOut(f"{library} needs {error.name}, which is not installed") from None
    except Exception as error:
        raise LeftOut(f"{library} has no usable {module}.{name}: {first_line(error)}") from None


def need_cuda(case: Case, what: str) -> None:
    if case.device != "cuda":
        raise LeftOut(f"{what} needs a CUDA device")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def from_logprobs(case: Case, kind: str, head: Callable[[], tuple[Tensor, Tensor | None]]) -> Run:
    """The loss of a head that gives log-probs and entropies."""
    return lambda: case.loss(kind, *head())


# ------------------------------------------------------------------------------------------------------- torch itself


def eager_policy(case: Case) -> Run:
    return from_logprobs(case, "policy", lambda: linear_logprob_reference(case.hidden, case.weight, case.targets))


def eager_ce(case: Case) -> Run:
    # As trainers do it: logits in the model's dtype, upcast for the softmax.
    return lambda: F.cross_entropy(F.linear(case.hidden, case.weight).float(), case.targets)


def compiled(make: Callable[[Case], Run]) -> Callable[[Case], Run]:
    return lambda case: torch.compile(make(case), dynamic=False)


def torch_chunked_ce(case: Case) -> Run:
    head = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if head is None or options is None:
        raise LeftOut(f"torch {torch.__version__} has no chunked linear_cross_entropy: it came with 2.13")
    return lambda: head(case.hidden, case.weight, case.targets, options=options())


# -------------------------------------------------------------------------------------------------------------- Liger


def liger_grpo(case: Case) -> Run:
    loss = need("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss", library="Liger")(
        beta=0.0, compiled=case.device == "cuda", use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP
    )
    shape = (-1, case.sequence)
    targets, old = case.targets.view(shape), case.old_logprobs.view(shape)
    mask, advantages = torch.ones_like(old), case.advantages.view(shape)[:, 0].contiguous()
    hidden = lambda: case.hidden.view(*targets.shape, -1)  # noqa: E731
    return lambda: loss(hidden(), case.weight, targets, mask, advantages, old_per_token_logps=old)[0]


def liger_flce(case: Case) -> Run:
    need_cuda(case, "Liger's fused linear cross-entropy")
    module = "liger_kernel.transformers.fused_linear_cross_entropy"
    loss = need(module, "LigerFusedLinearCrossEntropyLoss", library="Liger")()
    return lambda: loss(case.weight, case.hidden, case.targets)


def liger_scaled(kind: str) -> Callable[[Case], Run]:
    """CuTe on Hopper with nvidia-cutlass-dsl installed; elsewhere Liger itself falls back to a loop in torch."""

    def make(case: Case) -> Run:
        module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
        return scaled_ce(case, kind, need(module, "LigerFusedLinearScaledCrossEntropyFunction", library="Liger"))

    return make


def liger_cutile(kind: str) -> Callable[[Case], Run]:
    def make(case: Case) -> Run:
        need_cuda(case, "Liger's cuTile head")
        module = "liger_kernel.ops.cutile.ops.fused_linear_scaled_cross_entropy"
        return scaled_ce(case, kind, need(module, "LigerFusedLinearScaledCrossEntropyFunction", library="Liger cuTile"))

    return make


def scaled_ce(case: Case, kind: str, head) -> Run:
    with_entropy = kind == "policy"

    def values() -> tuple[Tensor, Tensor | None]:
        out = head.apply(case.hidden, case.weight, case.targets, 1.0, -100, 1, with_entropy)
        nll, entropy = out if with_entropy else (out, None)
        return -nll, entropy

    return from_logprobs(case, kind, values)


# ------------------------------------------------------------------------------------------------------------- others


def apple_exact(case: Case) -> Run:
    need_cuda(case, "cut-cross-entropy")
    head = need("cut_cross_entropy", "linear_cross_entropy", library="cut-cross-entropy")
    # Its default leaves out gradients below a threshold. Newer versions name the exact form.
    named = "accum_e_fp32" in inspect.signature(head).parameters
    exact = {"impl": "cce_exact"} if named else {"impl": "cce", "filter_eps": None}
    return lambda: head(case.hidden, case.weight, case.targets, reduction="mean", **exact)


def verl_kernel(case: Case) -> Run:
    need_cuda(case, "verl's linear_cross_entropy")
    head = need("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", library="verl")
    return from_logprobs(case, "policy", lambda: head(case.hidden, case.weight, case.targets, 1.0, "none"))


def verl_torch(case: Case) -> Run:
    head = need("verl.utils.experimental.torch_functional", "FusedLinearForPPO", library="verl")()
    return from_logprobs(case, "policy", lambda: head(case.hidden, case.weight, case.targets))


def trl_chunked(kind: str) -> Callable[[Case], Run]:
    def make(case: Case) -> Run:
        head = need("trl.kernels.chunked_logprob", "ChunkedLogProbFunction", library="TRL")
        need("trl.trainer.utils", "maybe_gather_lm_head_ctx", library="TRL")  # its backward imports it
        width = need("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE", library="TRL")
        outputs = ("log_probs", "entropy") if kind == "policy" else ("log_probs",)

        def values() -> tuple[Tensor, Tensor | None]:
            bias = softcap = None
            out = head.apply(case.hidden, case.weight, bias, case.targets, 1.0, width, softcap, 1.0, outputs)
            return out[0], out[1]

        return from_logprobs(case, kind, values)

    return make


def quack_chunked(case: Case) -> Run:
    need_cuda(case, "Quack")
    head = need("quack.linear_cross_entropy", "chunked_linear_cross_entropy", library="Quack")
    return lambda: head(case.hidden, case.weight, case.targets, reduction="mean")


PEERS = (
    Peer("eager, full logits", "policy", eager_policy, core=True),
    Peer("torch.compile of eager", "policy", compiled(eager_policy), once=True),
    Peer("Liger scaled CE", "policy", liger_scaled("policy")),
    Peer("Liger scaled CE, cuTile", "policy", liger_cutile("policy")),
    Peer("verl linear_cross_entropy", "policy", verl_kernel),
    Peer("verl FusedLinearForPPO, torch", "policy", verl_torch),
    Peer("TRL chunked log-prob", "policy", trl_chunked("policy")),
    Peer("Liger GRPO, no entropy", "pg", liger_grpo),
    Peer("eager, full logits", "ce", eager_ce, core=True),
    Peer("torch.compile of eager", "ce", compiled(eager_ce), once=True),
    Peer("torch linear_cross_entropy, chunked", "ce", torch_chunked_ce),
    Peer("Liger FLCE", "ce", liger_flce),
    Peer("Liger scaled CE", "ce", liger_scaled("ce")),
    Peer("Liger scaled CE, cuTile", "ce", liger_cutile("ce")),
    Peer("Apple cut-cross-entropy, exact", "ce", apple_exact),
    Peer("Quack chunked", "ce", quack_chunked),
    Peer("TRL chunked log-prob", "ce", trl_chunked("ce")),
)
