"""LoRA through peft: small trainable factors beside frozen linear layers (and embeddings), W x + (α / r) · B A x.

peft is asked to put its layers into the model and for nothing else: the model keeps its class, so the loss head, the engines
and the rollouts see what they always see, with fewer parameters that ask for a gradient. Frozen ones then cost no gradient, no
moments, no dW in the head and no v in the probe.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from amft_fast.errors import UserError
from amft_fast.model import experts

if TYPE_CHECKING:
    from amft_fast.config import LoraConfig


def add(model: nn.Module, cfg: LoraConfig) -> nn.Module:
    """Puts adapters into `model`, in place, and freezes everything else. Raises UserError when that cannot be done."""
    try:
        from peft import inject_adapter_in_model
    except ImportError:
        raise UserError("model.lora.rank: LoRA needs peft; pip install 'amft-fast[lora]'") from None
    head = model.get_output_embeddings()
    everything = experts.linear_names(model) or "all-linear"
    peft = _peft_config(cfg, everything if cfg.targets == ["all-linear"] else cfg.targets)
    try:
        inject_adapter_in_model(peft, model)
    except ValueError as e:
        raise UserError(
            f"model.lora.targets: {cfg.targets} does not fit this model: {str(e).splitlines()[0]}"
        ) from None
    if model.get_output_embeddings() is not head:
        raise UserError(
            "model.lora.targets must leave out the output embedding, whose product the loss head computes itself"
        )
    if any(hasattr(layer, "parameter_name") for layer in layers(model).values()):  # peft wraps what is no linear layer
        raise UserError(
            f"model.lora.targets: {cfg.targets} has experts or routers, which are no linear layers here; adapters of a mixture "
            f"of experts go to {', '.join(experts.linear_names(model))} alone"
        )
    if any(layer.base_layer.weight is head.weight for layer in layers(model).values()):
        raise UserError(
            f"model.lora.targets: {cfg.targets} has the input embedding, which this model shares with the output embedding "
            "(tie_word_embeddings): factors would change the one and not the other, and no plain checkpoint could hold that; "
            "leave it out"
        )
    trained = _factors_of(model)
    if not trained:
        raise UserError(f"model.lora.targets: {cfg.targets} gives this model no factors to train")
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)
    return model


def _peft_config(cfg: LoraConfig, targets: str | list[str]) -> Any:
    from peft import LoraConfig as PeftConfig

    alpha = cfg.alpha or 2 * cfg.rank
    return PeftConfig(r=cfg.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none")


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with adapters, by name."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight")}


def factors(layer: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of one layer: a linear one, a convolution or an embedding."""
    names = ("lora_A.", "lora_B.", "lora_embedding_A.", "lora_embedding_B.")
    return {n: p for n, p in layer.named_parameters() if n.startswith(names)}


def _factors_of(model: nn.Module) -> set[int]:
    """The ids of all factors."""
    return {id(p) for layer in layers(model).values() for p in factors(layer).values()}


def adapted(model: nn.Module) -> bool:
    return bool(layers(model))


class Plain(NamedTuple):
    """A parameter of the model as it is without adapters."""

    name: str
    param: nn.Parameter
    layer: nn.Module | None = None  # whose adapter's product belongs to it

    @property
    def sources(self) -> list[nn.Parameter]:
        """All that its value is made of."""
        return [self.param, *(factors(self.layer).values() if self.layer is not None else ())]

    @torch.no_grad()
    def value(self) -> torch.Tensor:
        """The tensor, an adapter's product added (a copy then)."""
        weight = self.param.detach()
        if self.layer is None:
            return weight
        return (weight.float() + self.layer.get_delta_weight("default").float()).to(weight.dtype)


def plain(model: nn.Module) -> Iterator[Plain]:
    """All parameters as without adapters, by the names that transformers gives them, a shared one once."""
    found, own = layers(model), _factors_of(model)
    for name, p in model.named_parameters():
        layer, base, rest = name.partition(".base_layer.")
        if base:
            yield Plain(f"{layer}.{rest}", p, found[layer] if rest == "weight" else None)
        elif id(p) not in own:
            yield Plain(name, p)


def export(model: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the model as a plain transformers folder, its adapters merged into the weights; with `dtype` in that type, which
    the model has too from then on."""
    state = {}
    if adapted(model):
        state = {"state_dict": {x.name: x.value().to(dtype or x.param.dtype) for x in plain(model)}}
    (model if dtype is None else model.to(dtype)).save_pretrained(folder, **state)


def named_factors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(peft's name, parameter) of all factors."""
    own = _factors_of(model)
    for name, p in model.named_parameters():
        if id(p) in own:
            yield f"base_model.model.{name.replace('.default', '')}", p


def save_adapter(model: nn.Module, cfg: LoraConfig, base: str, folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Writes factors by peft's names as a peft folder, for the checkpoint `base`."""
    config = _peft_config(cfg, sorted(layers(model)))
    config.task_type, config.base_model_name_or_path, config.inference_mode = "CAUSAL_LM", base, True
    config.save_pretrained(folder)
    save_file({name: p.contiguous() for name, p in state.items()}, folder / "adapter_model.safetensors")


def export_adapter(model: nn.Module, cfg: LoraConfig, base: str, folder: Path, dtype: torch.dtype) -> None:
    """Writes the factors as a peft folder (`PeftModel.from_pretrained(model, folder)`), for the checkpoint `base`."""
    save_adapter(model, cfg, base, folder, {n: p.detach().to(dtype) for n, p in named_factors(model)})
