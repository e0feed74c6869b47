"""What makes the layers cheaper: Liger's kernels, recomputation of activations, tiles, activations in host memory,
torch.compile.

All are off unless asked for, except Liger on a GPU where it is installed. None changes the result beyond rounding.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from amft_fast.config import ModelConfig
from amft_fast.errors import UserError
from amft_fast.model import attention, experts

PARTS = ("rope", "rms_norm", "swiglu", "geglu")
OFFLOADED = 1 << 20  # bytes: smaller activations stay where they are


def prepare(model: nn.Module, cfg: ModelConfig, device: torch.device) -> None:
    """Does to the model what the config asks for. Raises UserError when it cannot be done here."""
    apply_liger(model, cfg.liger, device)
    if cfg.gradient_checkpointing:
        checkpoint_layers(model, selective=cfg.gradient_checkpointing == "selective")
    if cfg.compile:
        compile_layers(model)


# ---------------------------------------------------------------------------------------------------------------- Liger


def liger(model_type: str, device_type: str) -> tuple[Callable | None, str]:
    """(Liger's function for such a model or None, reason)."""
    if device_type != "cuda":
        return None, "Liger's kernels need a GPU"
    try:
        functions = importlib.import_module("liger_kernel.transformers")
    except ImportError as e:
        return None, "liger-kernel is not installed" if e.name == "liger_kernel" else f"liger-kernel does not load: {e}"
    function = getattr(functions, f"apply_liger_kernel_to_{model_type}", None)
    if function is None:
        return None, f"Liger knows no models of type {model_type}"
    return function, "norms, rotary embedding and MLP products as one kernel each"


def apply_liger(model: nn.Module, wanted: bool | None, device: torch.device) -> str:
    """Exchanges norms, rotary embedding and the MLP's product for Liger's, never the loss; returns what was done and why."""
    if wanted is False:
        return "model.liger is false"
    function, why = liger(model.config.model_type, device.type)
    if function is None:
        if wanted:
            raise UserError(f"model.liger: {why}; leave it out")
        return why
    known = inspect.signature(function).parameters
    mixture = bool(experts.routers(model))  # its experts are one grouped product, and no MLPs to put a kernel into
    parts = {name: name != "swiglu" or not mixture for name in PARTS if name in known}
    off = {name: False for name in known if "cross_entropy" in name}
    function(**parts, **off, model=model)
    return why


# -------------------------------------------------------------------------------------------------------- recomputation


# Matrix products and attention; the operations of `torch_attn` and of flash-attn exist once their module was imported.
DEAR = (
    "aten.mm",
    "aten.addmm",
    "aten.bmm",
    "aten._grouped_mm",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._flash_attention_forward",
    "torch_attn._varlen_attn",
    "flash_attn._flash_attn_varlen_forward",
    "flash_attn_3.fwd",
)


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    """Keep what is dear to recompute, recompute the rest."""
    from torch.utils.checkpoint import CheckpointPolicy

    return CheckpointPolicy.MUST_SAVE if op in _dear() else CheckpointPolicy.PREFER_RECOMPUTE


@lru_cache
def _dear() -> frozenset:
    """The operations of DEAR that are there. FlashAttention 4 is no operation of torch's: it is recomputed."""
    for kernel in attention.BACKENDS:
        with suppress(ImportError, OSError, AttributeError):
            kernel.find()
    found = (getattr(getattr(torch.ops, name.partition(".")[0]), name.partition(".")[2], None) for name in DEAR)
    return frozenset(op.default for op in found if op is not None)


def checkpoint_layers(model: nn.Module, selective: bool = False) -> None:
    """Recompute layers in the backward pass. transformers does so in training mode alone, so any dropout goes first:
    old and new log-probs must not differ by its noise."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if getattr(module, "attention_dropout", 0):
            module.attention_dropout = 0.0
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    # Frozen input embeddings (LoRA) are no obstacle: only the reentrant form needs an input with a gradient.
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.24 has renamed it
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.train()


# -------------------------------------------------------------------------------------------------------- tiles of an MLP


def tile_mlps(model: nn.Module, tile: int) -> None:
    """MLPs take at most `tile` tokens at a time, by DeepSpeed's TiledMLP: what is as wide as an MLP exists for one tile alone.

    The passes that recompute run once more. Raises UserError for a model without gated MLPs.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP
    from deepspeed.utils import set_z3_leaf_module

    found = [m for m in model.modules() if hasattr(m, "gate_proj") and hasattr(m, "down_proj")]
    if not found or any(hasattr(m, "experts") for m in model.modules()):
        raise UserError(f"model.mlp_tile: {type(model).__name__} has no gated MLPs, or several experts of them")
    for mlp in found:
        # At stage 3 its weights are gathered once for all tiles.
        set_z3_leaf_module(mlp, True)
        mlp.forward = partial(_tiled, mlp, mlp.forward, tile, TiledMLP.apply)


def _tiled(mlp: nn.Module, forward: Callable, tile: int, apply: Callable, x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    least = -(-len(rows) // tile)
    # Without a gradient for its input nothing would lead to the MLP's own parameters.
    if least == 1 or not (x.requires_grad or not torch.is_grad_enabled()):
        return forward(x)
    tiles = -(-len(rows) // -(-len(rows) // least))  # so many runs of equal size are what torch.chunk makes of it
    out = apply(lambda _, part: forward(part), mlp, rows, tiles, list(mlp.parameters()))
    return out.view(x.shape)


# -------------------------------------------------------------------------------------------------- activations offloaded


class Offload:
    """Keeps what the backward pass needs in host memory: copied out on a stream of its own while the GPU computes on, and back
    when the backward pass asks for it.

    `known`: storages that stay (parameters). As a context around the forward pass.
    """

    def __init__(self, model: nn.Module, smallest: int = OFFLOADED) -> None:
        self.smallest = smallest
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.moved = 0  # bytes, of the last forward pass

    def __call__(self) -> AbstractContextManager:
        self.moved = 0
        return torch.autograd.graph.saved_tensors_hooks(self._out, self._back)

    def _out(self, t: torch.Tensor) -> Any:
        if t.nbytes < self.smallest or t.untyped_storage().data_ptr() in self.known or t.is_sparse:
            return t
        self.moved += t.nbytes
        if self.stream is None or t.device.type != "cuda":
            return t.device, t.detach().to("cpu", copy=True), None
        held = torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            held.copy_(t, non_blocking=True)
            t.record_stream(self.stream)  # its memory is not given away before the copy is done
            done = self.stream.record_event()
        return t.device, held, done

    def _back(self, packed: Any) -> torch.Tensor:
        if torch.is_tensor(packed):
            return packed
        device, held, done = packed
        if done is not None:
            torch.cuda.current_stream().wait_event(done)
        return held.to(device, non_blocking=True)


def offload(model: nn.Module, wanted: bool) -> Callable[[], AbstractContextManager]:
    """The context that the forward pass runs in."""
    return Offload(model) if wanted else nullcontext


# -------------------------------------------------------------------------------------------------------- torch.compile


def compile_layers(model: nn.Module, **options: Any) -> int:
    """Compiles each decoder layer by itself (equal layers share the code); returns how many."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    stack = max(stacks, key=lambda m: sum(p.numel() for p in m.parameters()), default=())
    for layer in stack:
        layer.compile(dynamic=True, **options)
    return len(stack)


def eagerly(model: nn.Module) -> AbstractContextManager:
    """Around rollouts: a compiled layer would be compiled anew for each length of the cache."""
    compiled = any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
