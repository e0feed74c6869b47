"""Mixtures of experts (Qwen3-MoE and its kin): what routers choose, the loss that balances it, checkpoint names.

transformers keeps the experts of a layer as two tensors, and by default multiplies them in one grouped product (`grouped_mm`):
every expert has a gradient, zeros where no token chose it. All else of a mixture is here.

The auxiliary loss is Switch's (arXiv 2101.03961, equations 4 to 6) over the whole update (arXiv 2501.11873), by layer:

    L_aux = c · (1/L) Σ_layers E Σ_i f_i P_i ,     P_i = Σ_t w_t p_i(t) ,     f_i = Σ_t w_t [i ∈ top-k(t)] / Σ_t w_t

over the trained tokens t, at the places that predict them, p the router's softmax. w_t is the weight that the token's own
loss has in the update, μ / N_sft of a demonstration's and (1−μ) / N_rl of a rollout's: so L_aux is one term of L_SFT and one
of L_RL, and the probe sees each where it belongs. Prompts are left out: a shared one would count once or often, by how rows
are packed.

f has no gradient, and is taken over the *last* update (even, before the first). So P alone is summed over micro-batches and
ranks, and neither their number nor their size changes the loss; a product of means over the same few tokens would be biased.
Balanced routers have L_aux = c k, as `router_aux_loss_coef` of transformers has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from amft_fast.errors import UserError

if TYPE_CHECKING:
    from amft_fast.data.batch import Batch
    from amft_fast.engine.world import World

WEIGHTS = ("nll_weight", "shaped_weight", "pg_weight")  # of a token in the losses


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers of a model, layer by layer: they return (logits [T, E], weights [T, k], experts [T, k])."""
    recorded = getattr(model, "_can_record_outputs", None) or {}
    kind = getattr(recorded.get("router_logits"), "target_class", None)
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


class Routing:
    """What the routers of a policy choose for trained tokens, added up over an update, and L_aux.

    `load` [L, E]: f of the last update; None before the first. `replay` [T, L, k], −1 where a router is to choose: experts that
    the tokens of the pass under way, and of its backward pass, are sent to, with the weights that the routers give these.
    """

    def __init__(self, model: nn.Module, aux_coef: float = 0.0) -> None:
        self.routers, self.coef = routers(model), aux_coef
        if aux_coef and not self.routers:
            raise UserError(f"model.router_aux_coef: {type(model).__name__} has no routers to balance; leave it out")
        self.load: torch.Tensor | None = None
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] | None = None  # (logits, experts) of a pass under way
        self._sums: torch.Tensor | None = None
        self.replay: torch.Tensor | None = None
        self._layer = {id(router): i for i, router in enumerate(self.routers)}  # a copied model's are not among them
        for router in self.routers:
            router.register_forward_hook(self._keep)

    def _keep(self, router: nn.Module, inputs: Any, out: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if self.replay is not None and id(router) in self._layer:
            out = _sent_to(router, out, self.replay[:, self._layer[id(router)]])
        if self._seen is not None:  # a layer that is computed again in the backward pass has been seen
            self._seen.append((out[0], out[2]))
        return out

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around the forward pass of a micro-batch."""
        self._seen = []
        try:
            yield
        except BaseException:
            self._seen = None
            raise

    def begin_update(self) -> None:
        self._sums = None

    def loss(self, batch: Batch) -> torch.Tensor | None:
        """This micro-batch's part of L_aux (None where it is off), after `watched`; its choices are added up."""
        seen, self._seen = self._seen, None
        weights = [w for w in map(batch.get, WEIGHTS) if w is not None]
        if not seen or not weights:
            return None
        w_N = sum(weights).float()
        experts_LNk = torch.stack([experts.index_select(0, batch.rows) for _, experts in seen])
        layers, _, k = experts_LNk.shape
        sums_LE = torch.zeros(layers, seen[0][0].shape[-1], dtype=torch.float64, device=w_N.device)
        each = w_N.double()[:, None].expand(-1, k).reshape(1, -1).expand(layers, -1)
        sums_LE.scatter_add_(1, experts_LNk.flatten(1), each)
        self._sums = sums_LE if self._sums is None else self._sums + sums_LE
        if not self.coef:
            return None
        load_LE = torch.full_like(sums_LE, k / sums_LE.shape[1]) if self.load is None else self.load
        probs = [logits.index_select(0, batch.rows).float().softmax(-1) for logits, _ in seen]
        mean_LE = torch.stack([w_N @ p_NE for p_NE in probs])
        return self.coef * sums_LE.shape[1] / layers * (load_LE.to(mean_LE.dtype) * mean_LE).sum()

    def end_update(self, world: World) -> torch.Tensor | None:
        """f of the update that is over; returns the share of its tokens that the busiest expert of any layer was chosen for, on
        the device. Every rank must call it."""
        if self._sums is None:
            return None
        sums_LE, k = world.sum(self._sums), self.routers[0].top_k
        self.load, self._sums = k * sums_LE / sums_LE.sum(1, keepdim=True).clamp_min(1e-30), None
        return self.load.max()

    def state_dict(self) -> list[list[float]] | None:
        return None if self.load is None else self.load.tolist()

    def load_state_dict(self, state: list[list[float]] | None, device: torch.device) -> None:
        self.load = None if state is None else torch.tensor(state, dtype=torch.float64, device=device)


def _sent_to(
    router: nn.Module, out: tuple[torch.Tensor, ...], given_Tk: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a router returns when its tokens go to these experts, and where it says −1 to those that it chose."""
    logits_TE, weights_Tk, chosen_Tk = out
    told_Tk = given_Tk >= 0
    experts_Tk = torch.where(told_Tk, given_Tk, chosen_Tk)
    probs_Tk = logits_TE.float().softmax(-1).gather(1, experts_Tk)
    if router.norm_topk_prob:
        probs_Tk = probs_Tk / probs_Tk.sum(-1, keepdim=True)
    return logits_TE, torch.where(told_Tk, probs_Tk.to(weights_Tk.dtype), weights_Tk), experts_Tk


def prepare(model: nn.Module) -> None:
    """transformers multiplies experts by `grouped_mm`, the fastest here too; where its kernel does not take their widths (rows
    of a multiple of 16 bytes), by a loop over them."""
    # What ZeRO-3 has cut is empty here, and remembers its shape.
    shapes = (getattr(p, "ds_shape", p.shape) for n, p in model.named_parameters() if ".experts." in n)
    if any(size * model.dtype.itemsize % 16 for shape in shapes for size in shape[1:]):
        model.set_experts_implementation("eager")


def linear_names(model: nn.Module) -> list[str]:
    """What adapters may go to in a mixture of experts: its attention's projections. None of any other model."""
    attention = [n for n, m in model.named_modules() if ".self_attn." in n and isinstance(m, nn.Linear)]
    return sorted({n.rpartition(".")[2] for n in attention}) if routers(model) else []


def as_saved(model: nn.Module, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """A parameter under the names, and cut into the tensors, that checkpoints have (and vLLM reads): experts one by one."""
    from transformers.core_model_loading import revert_weight_conversion

    return list(revert_weight_conversion(model, {name: tensor}).items()) if ".experts." in name else [(name, tensor)]
