"""The policy: a transformers causal language model whose loss head is called inside `forward`.

The head must run inside, because under ZeRO-3 `lm_head.weight` has shape (0,) outside. Legend: N rows with a loss, H hidden.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from amft_fast import ops
from amft_fast.config import TOKEN_LOSSES, ModelConfig, ObjectiveConfig
from amft_fast.data.batch import Batch
from amft_fast.errors import UserError
from amft_fast.model import attention, experts, layers, lora
from amft_fast.model.base import check_finite, check_vocabulary, check_whole, read_config, unloadable
from amft_fast.model.experts import Routing
from amft_fast.model.ulysses import Ulysses
from amft_fast.model.vision import Vision, freeze, is_vision_language, nothing_of

# Sums over the tokens of a micro-batch: they add up over micro-batches and ranks.
SUMS = (
    "loss",
    "sft_tokens",
    "sft_nll",
    "rl_tokens",
    "rl_weight",
    "pg",
    "kl",
    "entropy",
    "clipped",
    "approx_kl",
    "ratio",
    "mismatch",
    "mismatch_kl",
    "is_weight",
    "is_weight_sq",
    "value_loss",
    "router_aux",
)
MAXES = ("ratio_max", "mismatch_max")


class PolicyOutput(NamedTuple):
    """What one micro-batch gives. A tuple, because DeepSpeed looks for the tensors in it.

    `loss` is a scalar with a graph; the rest is detached: `logprobs`, `entropy` and `values` per row [N] (values None
    without a value head), `sums` and `maxes` fp64 vectors in the order of SUMS and MAXES.
    """

    loss: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor | None
    sums: torch.Tensor
    maxes: torch.Tensor


@dataclass
class Scores:
    """What `logprobs` gave for one micro-batch, by its sequences: see `Batch` and `PolicyOutput`."""

    members: list[int]
    counts: list[int]
    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor | None

    def cpu(self) -> Scores:
        values = None if self.values is None else self.values.cpu()
        return Scores(self.members, self.counts, self.logprobs.cpu(), self.entropy.cpu(), values)


class Policy(nn.Module):
    """A causal language model, with a value head on its last hidden state when `with_value`.

    `vision` brings pictures into a vision-language model; without it a batch's images are not read. `own_loss` is the
    function that `objective.loss` names, where it is one; `shape` how weights `shaped_weight` enter, and its γ.
    `router_aux_coef`: of the loss that balances a mixture's experts (experts.py).
    """

    def __init__(
        self,
        model: nn.Module,
        objective: ObjectiveConfig,
        with_value: bool = False,
        vision: Vision | None = None,
        own_loss: ops.OwnLoss | None = None,
        shape: tuple[str, float] = ("ratio", 0.1),
        router_aux_coef: float = 0.0,
    ) -> None:
        super().__init__()
        if router_aux_coef and vision is not None:
            raise UserError("model.router_aux_coef is for models that read text alone; leave it out")
        self.routing = Routing(model, router_aux_coef)
        self.own_loss, self.shape = own_loss, shape
        self.vision = vision
        self.model = model
        self.objective = objective
        self.backbone = getattr(model, model.base_model_prefix)
        self.head = model.get_output_embeddings()
        self.softcap = getattr(model.config, "final_logit_softcapping", None)
        hidden = model.config.get_text_config().hidden_size
        self.value_head = nn.Linear(hidden, 1, device=self.head.weight.device) if with_value else None
        if with_value:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self.saving: Callable[[], AbstractContextManager] = nullcontext  # where a forward pass keeps its activations
        self.weight_grad: torch.Tensor | None = None  # fp32 buffer that the head's dW is added into, set by the engine
        self.ulysses: Ulysses | None = None  # set by an engine that gives `forward` a part of each batch
        self.reach_all = False  # set by an engine that needs a gradient of every parameter from every micro-batch
        # The largest of some numbers over the ranks; set by an engine whose ranks must all take the same way through a model
        # that sees pictures, whether their micro-batches have any or not.
        self.most: Callable[[list[int]], list[int]] | None = None

    def hidden_rows(self, batch: Batch, model: nn.Module | None = None) -> torch.Tensor:
        """Hidden states [N, H] at the positions that predict a trained token."""
        backbone = self.backbone if model is None else getattr(model, model.base_model_prefix)
        self.routing.replay = batch.experts if model is None else None
        ids, most, spare = batch.input_ids, self.most if model is None else None, None
        if self.vision is not None:
            cross = self.vision.family == "cross"
            if batch.texts or (most and cross):
                return self._seeing(backbone, batch, most if cross else None).flatten(0, 1).index_select(0, batch.rows)
            ids = self.vision.readable(ids)
            spare = self.vision.spare_look(backbone, ids.device) if most else None
        config = (model or self.model).config
        packed = {} if batch.layout is None else attention.inputs(config, batch.layout, self.head.weight, self.ulysses)
        out = backbone(input_ids=ids, position_ids=batch.position_ids, use_cache=False, **packed)
        if "amft_layout" in packed and not batch.layout.calls:
            raise UserError(
                f"train.packing: {type(self.model).__name__} does not hand packed rows on to its attention; set it to false"
            )
        hidden = out.last_hidden_state.flatten(0, 1).index_select(0, batch.rows)
        return hidden if spare is None else hidden + spare

    def _seeing(
        self, backbone: nn.Module, batch: Batch, most: Callable[[list[int]], list[int]] | None = None
    ) -> torch.Tensor:
        """Hidden states [B, L, H] of a batch that may have images. With `most` the model is passed through as often as on any
        rank, without images first."""
        device, width, packed = batch.input_ids.device, batch.input_ids.shape[1], batch.position_ids is not None
        texts = batch.texts or [((), ())] * len(batch.input_ids)
        kin = self.vision.kin([len(images) for _, images in texts], packed)
        blind = sum(not texts[rows[0]][1] for rows in kin)  # passes; these come first
        needed = most([blind, len(kin) - blind]) if most else [0, 0]
        spare = [backbone(input_ids=batch.input_ids[:1, :2], use_cache=False)] if needed[0] > blind else []
        # Rows are taken apart and put together by number: a list of indices would be copied to the device, which waits.
        by_row: dict[int, torch.Tensor] = {}
        for rows in kin:
            inputs = self.vision.inputs([texts[i] for i in rows], device, packed)
            if not inputs:
                inputs = {"input_ids": torch.stack([batch.input_ids[i] for i in rows])}
            hidden = backbone(**self.vision.arguments(backbone, inputs), use_cache=False).last_hidden_state
            hidden = nn.functional.pad(hidden, (0, 0, 0, width - hidden.shape[1]))
            by_row |= zip(rows, hidden)
        for _ in range(needed[1] - (len(kin) - blind)):
            inputs = self.vision.arguments(backbone, self.vision.inputs([self.vision.spare_row()], device))
            spare.append(backbone(**inputs, use_cache=False))
        if len(kin) > 1:
            hidden = torch.stack([by_row[i] for i in range(len(by_row))])
        return hidden + sum(nothing_of(out.last_hidden_state) for out in spare) if spare else hidden

    def forward(
        self,
        batch: Batch,
        objective: ObjectiveConfig | None = None,
        scores_only: bool = False,
        temperature: float | None = None,
    ) -> PolicyOutput:
        """The loss of one micro-batch; `objective` stands in for the run's own (the utility gradient has another).

        `scores_only`: what `logprobs` gives, for engines whose parameters are there within `forward` alone.
        """
        if scores_only:
            return self.logprobs(batch, temperature=temperature)
        o = objective or self.objective
        # The utility gradient's loss is its own, and no tokens of the update's.
        routed = bool(self.routing.routers) and o is self.objective and not batch.texts
        with self.saving(), self.routing.watched() if routed else nullcontext():
            hidden_NH = self.hidden_rows(batch)
        form = self.form(o)
        read = ("advantages", "old_logprobs", "behavior_logprobs", "ref_logprobs")
        # A rollout may be imitated like a demonstration: nothing of it is read then but its tokens.
        given = [batch.get(name) if batch.get("pg_weight") is not None else None for name in read]
        advantages, old, behavior, ref = given
        if o.whole and o.loss != "clip_cov" and old is not None:  # the ratios are in the advantages (losses.py)
            old = behavior = None
        corrected = form.own is not None or (o.corrects and o.correction_level == "token")
        beta = o.kl_coef if o.kl_in == "loss" and ref is not None else 0.0
        head = ops.linear_policy_loss(
            hidden_NH,
            self.head.weight,
            batch.targets,
            nll_weight=batch.get("nll_weight"),
            shaped_weight=batch.get("shaped_weight"),
            pg_weight=batch.get("pg_weight"),
            entropy_weight=batch.get("entropy_weight"),
            advantages=advantages,
            old_logprobs=old,
            behavior_logprobs=behavior if corrected else None,
            tis_cap=(o.tis_cap or None) if o.correction == "tis" else None,
            ref_logprobs=ref,
            kl_coef=beta,
            clip_low=o.clip_low,
            clip_high=o.clip_high,
            dual_clip=o.dual_clip,
            form=form,
            temperature=1.0 if batch.get("temperature") is None else batch.get("temperature"),
            logit_softcap=self.softcap,
            bias=getattr(self.head, "bias", None),
            weight_grad=self.weight_grad if torch.is_grad_enabled() else None,
        )
        loss, values, value_loss = head.loss, None, None
        if self.value_head is not None:
            values = self.value_head(hidden_NH.to(self.value_head.weight.dtype)).squeeze(-1).float()
            if batch.get("value_weight") is not None:
                squared = 0.5 * (values - batch.get("returns")) ** 2
                loss = loss + (batch.get("value_weight") * squared).sum()
                value_loss = squared.detach()
            elif self.reach_all:
                loss = loss + 0.0 * values.sum()
            values = values.detach()
        aux = self.routing.loss(batch) if routed else None
        if aux is not None:
            loss = loss + aux
        sums, maxes = _statistics(batch, head, loss.detach(), value_loss, aux)
        return PolicyOutput(loss, head.logprobs, head.entropy, values, sums, maxes)

    def form(self, o: ObjectiveConfig) -> ops.LossForm:
        """What the loss head is told of the loss; a loss of one's own is that of the run's objective alone."""
        low, high = {"tis": (None, None), "mis": (None, o.tis_cap), "icepop": o.icepop_bounds}[o.correction]
        own = self.own_loss if o is self.objective else None
        return ops.LossForm(
            name="own" if own is not None else o.loss if o.loss in TOKEN_LOSSES else "grpo",
            ratio_cap=o.ratio_cap or {"dppo": 20.0}.get(o.loss, 5.0),
            tau_positive=o.sapo_tau_positive,
            tau_negative=o.sapo_tau_negative,
            tv_bound=o.dppo_bound,
            ratio_penalty=o.ratio_penalty,
            is_low=low,
            is_high=high,
            kl=o.kl_kind,
            shape=self.shape[0],
            shape_gamma=self.shape[1],
            own=own,
        )

    @torch.no_grad()
    def logprobs(self, batch: Batch, model: nn.Module | None = None, temperature: float | None = None) -> PolicyOutput:
        """Log-probs and entropy without a loss: for old and reference log-probs, H* and the importance weights of the cache.

        `model`: another model's instead (the reference). `temperature`: instead of the batch's own.
        """
        hidden_NH = self.hidden_rows(batch, model)
        head = self.head if model is None else model.get_output_embeddings()
        own = batch.get("temperature")
        logprobs, entropy = ops.linear_logprob(
            hidden_NH,
            head.weight,
            batch.targets,
            temperature=temperature if temperature is not None else (1.0 if own is None else own),
            logit_softcap=self.softcap,
            bias=getattr(head, "bias", None),
        )
        values = None
        if self.value_head is not None and model is None:
            values = self.value_head(hidden_NH.to(self.value_head.weight.dtype)).squeeze(-1).float()
        nothing = logprobs.new_zeros(0)
        return PolicyOutput(nothing, logprobs, entropy, values, nothing, nothing)


@torch.no_grad()
def _statistics(
    batch: Batch,
    head: ops.PolicyLoss,
    loss: torch.Tensor,
    value_loss: torch.Tensor | None,
    router_aux: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The SUMS and MAXES of a micro-batch, on its device and without a host sync."""
    zero = torch.zeros((), dtype=torch.float64, device=loss.device)
    nll_w, shaped_w, pg_w = (batch.get(name) for name in ("nll_weight", "shaped_weight", "pg_weight"))
    s = dict.fromkeys(SUMS, zero)
    m = dict.fromkeys(MAXES, zero)
    s["loss"] = loss
    if router_aux is not None:
        s["router_aux"] = router_aux
    # Chosen, not multiplied by 0 or 1: a row without weight may hold NaN.
    if nll_w is not None or shaped_w is not None:
        sft = sum(w != 0 for w in (nll_w, shaped_w) if w is not None) > 0
        s["sft_tokens"], s["sft_nll"] = sft.sum(), -head.logprobs.where(sft, 0.0).sum()
    if pg_w is not None:
        rl = pg_w != 0
        s["rl_tokens"], s["entropy"] = rl.sum(), head.entropy.where(rl, 0.0).sum()
        s["rl_weight"], s["pg"], s["kl"] = pg_w.double().sum(), head.pg_sum, head.kl_sum
        s["clipped"], s["approx_kl"], s["ratio"] = head.clipped_tokens, head.approx_kl_sum, head.ratio_sum
        m["ratio_max"] = head.ratio_max
        if batch.get("behavior_logprobs") is not None:
            old = batch.get("old_logprobs")
            delta = ((head.logprobs if old is None else old) - batch.get("behavior_logprobs")).where(rl, 0.0)
            weight = delta.clamp(-20, 20).exp().where(rl, 0.0)
            s["mismatch"], s["mismatch_kl"], m["mismatch_max"] = delta.abs().sum(), -delta.sum(), delta.abs().max()
            s["is_weight"], s["is_weight_sq"] = weight.sum(), weight.square().sum()
    if value_loss is not None:
        s["value_loss"] = (value_loss * (batch.get("value_weight") != 0)).sum()
    return (
        torch.stack([s[k].double() for k in SUMS]),
        torch.stack([m[k].double() for k in MAXES]),
    )


def pick_dtype(cfg: ModelConfig, device: torch.device) -> torch.dtype:
    """The type of the parameters in the forward pass: bf16 on CUDA and fp32 on CPU unless the config says otherwise."""
    if cfg.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.dtype]


def load_model(cfg: ModelConfig, device: torch.device) -> nn.Module:
    """A transformers causal or vision-language model from a folder or the hub, on `device`, in training dtype.

    Raises UserError when there is no such checkpoint or it is damaged (tensors that are missing, of another shape, NaN), or its
    head does something that the loss head does not do.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    config = read_config(cfg)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    dtype = pick_dtype(cfg, device)
    changed = _changed_config(cfg)
    auto = AutoModelForImageTextToText if is_vision_language(config.model_type) else AutoModelForCausalLM
    try:
        kernel = attention.choose(cfg.attention, config, device, dtype)
        model, info = auto.from_pretrained(
            cfg.path,
            dtype=dtype,
            attn_implementation=kernel,
            output_loading_info=True,
            trust_remote_code=False,
            **changed,
        )
    except (UserError, torch.OutOfMemoryError):
        raise
    except (
        Exception
    ) as e:  # safetensors, torch, json and transformers each have exceptions of their own for a damaged file
        raise unloadable(cfg.path, "the model of", e) from None
    check_whole(cfg.path, info)
    for name in ("logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise UserError(
                f"model.path: {cfg.path!r} scales its logits ({name}), which the loss head does not do; "
                "fold the factor into lm_head.weight first"
            )
    freeze(model, cfg.vision)
    model = model.to(device)
    check_finite(cfg.path, model)
    experts.prepare(model)
    layers.prepare(model, cfg, device)
    return lora.add(model, cfg.lora) if cfg.lora.rank else model


def _changed_config(cfg: ModelConfig) -> dict:
    """The checkpoint's configuration with the positions that the config asks for, as an argument of from_pretrained."""
    if cfg.rope_theta is None and cfg.max_position_embeddings is None:
        return {}
    config = read_config(cfg)
    text = config.get_text_config()
    if cfg.rope_theta is not None:
        rope = getattr(text, "rope_parameters", None)
        if not isinstance(rope, dict) or "rope_theta" not in rope:
            raise UserError(f"model.rope_theta: {cfg.path!r} has no single rotary base (rope_parameters is {rope!r})")
        text.rope_parameters = {**rope, "rope_theta": cfg.rope_theta}
    if cfg.max_position_embeddings is not None:
        text.max_position_embeddings = cfg.max_position_embeddings
    return {"config": config}


@torch.no_grad()
def fill(model: nn.Module, named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copies tensors into a model's parameters of the same names. Raises ValueError for a name it does not have."""
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in named:
        if name not in own:
            raise ValueError(f"the model has no parameter {name}")
        own[name].copy_(tensor)


def load_tokenizer(cfg: ModelConfig):
    """The tokenizer of the same checkpoint. Raises UserError when there is none, or the model has no room for its tokens."""
    from transformers import AutoTokenizer

    read_config(cfg)  # transformers would call a damaged one the tokenizer's
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.path, trust_remote_code=False)
    except Exception as e:  # damaged files, libraries of one tokenizer alone that are not there
        raise unloadable(cfg.path, "the tokenizer of", e) from None
    check_vocabulary(cfg, tokenizer)
    return tokenizer
