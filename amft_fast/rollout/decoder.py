"""The layers of the known families of decoders, applied token by token: the model's own parameters, none of transformers' code
(but a mixture of experts, which is run as the module that it is).

What a decoded token costs beside its matrix products is some twenty operations a layer, into memory that is there already.
`obstacle` says why a model is not of a known family; `differs` compares with transformers' own forward. Rows are not padded:
prompts of a prefill lie one behind the other.

Legend: N tokens, H hidden, Q and K the widths of all query and all key heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from amft_fast.interfaces import Request
from amft_fast.model import attention
from amft_fast.ops import bf16_is_faster, compute_dtype, decode_attention, logits_into, triton_obstacle
from amft_fast.rollout.cache import Sections, StaticCache
from amft_fast.rollout.graphs import Graphs, padded_rows
from amft_fast.rollout.packed import Packed

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
ROPES = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on how long a sequence has become


def prefill_tokens(device: str) -> int:
    """Read in one pass: what a prefill takes beside the cache is bounded, and on a CPU how long a stop waits for it."""
    return 512 if device == "cpu" else 4096


def explain(device: str) -> tuple[str, str]:
    """(what reads tokens in rollouts of the embedded engine on `device`, for which models)."""
    others = f"for {', '.join(FAMILIES)}; other models, and all that see pictures, by transformers' forward"
    if device != "cuda":
        return "own loop over the layers", others
    kept = triton_obstacle(device, torch.bfloat16)
    steps = "steps captured in CUDA graphs" if kept is None else f"no CUDA graphs ({kept})"
    return f"own loop over the layers, {steps}", f"{others}; a mixture of experts without graphs"


def obstacle(model: nn.Module) -> str | None:
    """Why these layers are not the model's; None when they are."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"models of type {config.model_type} are not among {', '.join(FAMILIES)}"
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"} or (
        config.model_type == "mistral" and config.sliding_window is not None
    ):
        return "some of its layers look at a window of keys"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope not in ROPES:
        return f"its rotary embedding is of kind {rope}"
    if config.hidden_act != "silu" or getattr(config, "final_logit_softcapping", None):
        return "its MLP or its head is of another kind"
    if len({p.device for p in model.parameters()}) > 1:
        return "its parameters are on several devices"
    return None


class Product(NamedTuple):
    """x Wᵀ + b; of a layer that is more than that (adapters), its own forward."""

    weight: torch.Tensor  # Wᵀ, a view of the parameter
    bias: torch.Tensor | None
    module: nn.Module | None
    packed: Packed | None

    @classmethod
    def of(cls, module: nn.Module) -> Product:
        if type(module) is nn.Linear:
            weight, bias = module.weight.detach(), module.bias
            return cls(weight.t(), None if bias is None else bias.detach(), None, Packed(weight))
        return cls(None, None, module, None)

    def into(self, out: torch.Tensor, x: torch.Tensor) -> None:
        if self.module is not None:
            out.copy_(self.module(x))
        elif self.packed.takes(len(x)):
            out.copy_(self.packed(x) if self.bias is None else self.packed(x).add_(self.bias))
        elif self.bias is None:
            torch.mm(x, self.weight, out=out)
        else:
            torch.addmm(self.bias, x, self.weight, out=out)

    def added(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual += x Wᵀ + b"""
        if self.module is not None:
            residual.add_(self.module(x))
            return
        if self.packed.takes(len(x)):
            residual.add_(self.packed(x))
        else:
            torch.addmm(residual, x, self.weight, out=residual)
        if self.bias is not None:
            residual.add_(self.bias)


class Layer(NamedTuple):
    """One decoder layer. `norm_qk` [heads, D]: the weights of the norms of queries and keys, where it has them; `mixture`: of
    experts, in the MLP's place."""

    norm_in: torch.Tensor
    q: Product
    k: Product
    v: Product
    o: Product
    norm_mid: torch.Tensor
    gate: Product | None
    up: Product | None
    down: Product | None
    norm_qk: torch.Tensor | None
    mixture: nn.Module | None
    gate_up: Packed | None  # both, where neither has a bias or adapters


class Work:
    """Memory for the activations of N tokens; the first n of them are taken by `of`."""

    def __init__(self, tokens: int, like: torch.Tensor, hidden: int, q: int, k: int, mlp: int) -> None:
        wide = (hidden, q + k, k, mlp, mlp)
        self.all = [like.new_empty(tokens, w) for w in wide]
        self.q = q

    def of(self, n: int) -> tuple[torch.Tensor, ...]:
        """(residual stream, queries and keys, queries, keys, values, gate, up)"""
        x, qk, v, gate, up = (t[:n] for t in self.all)
        return x, qk, qk[:, : self.q], qk[:, self.q :], v, gate, up


class Decoder:
    """A model of a known family. Its parameters are looked up by `refresh`, since an update engine may give them new memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.backbone = model, getattr(model, model.base_model_prefix)
        config, attention = model.config, self.backbone.layers[0].self_attn
        self.mixed = any(hasattr(layer.mlp, "experts") for layer in self.backbone.layers)
        dense = not all(hasattr(layer.mlp, "experts") for layer in self.backbone.layers)
        self.hidden, self.mlp = config.hidden_size, config.intermediate_size if dense else 0
        self.size, self.scale = attention.head_dim, attention.scaling
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.eps = config.rms_norm_eps
        self.refresh()

    def refresh(self) -> None:
        self.layers = [self._layer(layer) for layer in self.backbone.layers]
        self.embedding = self.backbone.embed_tokens.weight.detach()
        self.norm, self.eps_1 = self.backbone.norm.weight.detach(), self.embedding.new_full((1,), self.eps)
        head = self.model.get_output_embeddings()
        self.head, self.head_bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        self.head_packed = Packed(self.head)

    def release(self) -> None:
        """Gives back what was packed; `refresh` comes before the next use."""
        self.layers, self.head_packed = [], None

    def _layer(self, layer: nn.Module) -> Layer:
        a, m = layer.self_attn, layer.mlp
        products = [Product.of(p) for p in (a.q_proj, a.k_proj, a.v_proj, a.o_proj)]
        norm_qk = None
        if hasattr(a, "q_norm"):
            both = (a.q_norm.weight.expand(self.heads, -1), a.k_norm.weight.expand(self.key_heads, -1))
            norm_qk = torch.cat(both).detach()
        mixture = m if hasattr(m, "experts") else None
        mlp = [Product.of(p) for p in (m.gate_proj, m.up_proj, m.down_proj)] if mixture is None else [None] * 3
        norms = layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach()
        plain = mixture is None and all(p.module is None and p.bias is None for p in mlp[:2])
        gate_up = Packed(*(p.weight.detach() for p in (m.gate_proj, m.up_proj))) if plain else None
        return Layer(norms[0], *products, norms[1], *mlp, norm_qk, mixture, gate_up)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """x / √(mean x² + ε) · weight over the last dimension. For narrow types and off the CPU torch's own, one kernel on a
        GPU; on a CPU it is made of fifteen operations, where five do."""
        size = x.shape[-1]
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
            return F.rms_norm(x, (size,), weight, self.eps)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scaled = x * torch.addcmul(self.eps_1, norm, norm, value=1 / size).rsqrt_()
        return scaled if weight is None else scaled.mul_(weight)

    def work(self, tokens: int) -> Work:
        return Work(tokens, self.embedding, self.hidden, self.heads * self.size, self.key_heads * self.size, self.mlp)

    def cache(self, room: int, capacity: int) -> StaticCache:
        return StaticCache(len(self.layers), (room, self.key_heads, capacity, self.size), self.embedding)

    def rotations(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [N, 1, D] at these positions [N]; the first half of sin is negative, as a half turn of D wants it."""
        cos, sin = self.backbone.rotary_emb(self.embedding, position_ids=positions[None])
        half = self.size // 2
        return cos[0, :, None], torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], -1)

    def run(
        self,
        ids_N: torch.Tensor,
        rotations: tuple[torch.Tensor, torch.Tensor],
        work: Work,
        attend: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        last: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normalised hidden states of all tokens, or of those at `last`.

        `attend(layer, q [N, heads, D], k [N, key heads, D], v [N, key heads, D])` gives [N, Q].
        """
        x, qk, q, k, v, gate, up = work.of(len(ids_N))
        cos, sin = rotations
        shape, half, parts = (-1, self.heads + self.key_heads, self.size), self.size // 2, (self.heads, self.key_heads)
        split_qk, split_v = qk.view(shape), v.view(-1, self.key_heads, self.size)
        torch.index_select(self.embedding, 0, ids_N, out=x)
        for i, layer in enumerate(self.layers):
            h = self._normed(x, layer.norm_in)
            layer.q.into(q, h)
            layer.k.into(k, h)
            layer.v.into(v, h)
            turned = split_qk
            if layer.norm_qk is not None:
                turned = self._normed(split_qk, None).mul_(layer.norm_qk)
            turned = (turned * cos).addcmul_(torch.roll(turned, half, -1), sin)
            seen = attend(i, *turned.split(parts, 1), split_v)
            if last is not None and i == len(self.layers) - 1:  # nothing looks at the others any more
                x, seen, gate, up = x[last], seen[last], gate[: len(last)], up[: len(last)]
            layer.o.added(x, seen)
            h = self._normed(x, layer.norm_mid)
            if layer.mixture is not None:
                x.add_(layer.mixture(h[None])[0])
                continue
            if layer.gate_up is not None and layer.gate_up.takes(len(h)):
                gate, up = layer.gate_up(h).chunk(2, -1)
            else:
                layer.gate.into(gate, h)
                layer.up.into(up, h)
            layer.down.added(x, F.silu(gate, inplace=True).mul_(up))
        return self._normed(x, self.norm)

    def logits(self, hidden_NH: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[N, V] in fp32 (fp64 of an fp64 model), whatever the parameters' type."""
        dtype = compute_dtype(hidden_NH.dtype)
        as_it_is = dtype == self.head.dtype
        if (as_it_is or bf16_is_faster()) and self.head_bias is None and self.head_packed.takes(len(hidden_NH)):
            logits = self.head_packed(hidden_NH) if as_it_is else self.head_packed.widened(hidden_NH)
            return logits if out is None else out.copy_(logits)
        if out is None:
            out = torch.empty(len(hidden_NH), len(self.head), dtype=dtype, device=hidden_NH.device)
        logits_into(out, hidden_NH, self.head, self.head_bias)
        return out

    # ------------------------------------------------------------------------------------------------------- prompts

    def read(
        self, prompts: Sequence[Sequence[int]], keep: Callable, before_pass: Callable[[], object] = lambda: None
    ) -> torch.Tensor:
        """Logits [prompts, V] after each of these prompts, which are in the order of their lengths.

        `keep(layer, first, k, v)` is given the keys and values [n, L, key heads, D] of the n prompts from `first` on.
        """
        out = []
        for batch in _passes(prompts, prefill_tokens(self.head.device.type)):
            before_pass()
            runs = [(length, len(list(same))) for length, same in groupby(len(prompts[i]) for i in batch)]
            out.append(
                self._read([prompts[i] for i in batch], runs, lambda i, at, *kv, b=batch: keep(i, b[0] + at, *kv))
            )
        return out[0] if len(out) == 1 else torch.cat(out)

    def _read(self, prompts: list[Sequence[int]], runs: list[tuple[int, int]], keep: Callable) -> torch.Tensor:
        """One pass; `runs`: (length, how many prompts of it)."""
        lengths = np.array([len(p) for p in prompts])
        ids = torch.from_numpy(np.concatenate([np.asarray(p, np.int64) for p in prompts])).to(self.head.device)
        positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(self.head.device)
        last = torch.from_numpy(lengths.cumsum() - 1).to(self.head.device)
        whole = self._whole(lengths)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            seen, token, prompt = [], 0, 0
            if whole is not None:
                seen.append(whole(q, k, v).flatten(1))
            for length, count in runs:
                rows = slice(token, token + length * count)
                mine = [x[rows].unflatten(0, (count, length)) for x in (q, k, v)]
                keep(layer, prompt, mine[1], mine[2])
                token, prompt = rows.stop, prompt + count
                if whole is not None:
                    continue
                heads = [x.transpose(1, 2) for x in mine]
                gqa = self.heads != self.key_heads
                out = F.scaled_dot_product_attention(*heads, is_causal=True, scale=self.scale, enable_gqa=gqa)
                seen.append(out.transpose(1, 2).reshape(count * length, -1))
            return seen[0] if len(seen) == 1 else torch.cat(seen)

        return self.logits(self.run(ids, self.rotations(positions), self.work(len(ids)), attend, last))

    def _whole(self, lengths: np.ndarray) -> Callable | None:
        """Attention over all prompts of a pass at once, (q, k, v) [N, heads, D] to [N, heads, D]; None where no kernel takes
        segments: cuDNN's plans for each length by itself cost more than the prompts."""
        name, kernel, _ = attention.backend(self.head.device.type, self.head.dtype)
        if kernel is None:
            return None
        starts = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        at, most = torch.from_numpy(starts).to(self.head.device), int(lengths.max())
        return lambda q, k, v: attention.segments(name, kernel, q, k, v, (at, at, most, most), self.scale)


def _passes(prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Consecutive prompts that are read in one pass of at most so many tokens, or of one prompt."""
    out, tokens = [], 0
    for i, prompt in enumerate(prompts):
        if out and tokens + len(prompt) <= most:
            out[-1].append(i)
        else:
            out.append([i])
            tokens = 0
        tokens += len(prompt)
    return out


def difference(decoder: Decoder, other) -> tuple[float, float]:
    """(how far log-probs are from another reader's, what rounding may make of it), over a few tokens: a longer and a shorter
    prompt, and two tokens after each. The largest difference; the mean one in a narrow type, where single ones say little."""
    vocabulary, narrow = len(decoder.head), torch.finfo(decoder.head.dtype).bits < 32
    ids = [(7 * i * i + 3 * i + 1) % vocabulary for i in range(12)]
    asked = [Request(tuple(ids[:4]), 0, 3), Request(tuple(ids), 0, 3)]
    mine, off, largest = DecoderReader(decoder, 2, 4), 0.0, 1.0  # the cache grows on the way
    for tokens in (None, np.array(ids[:2]), np.array(ids[2:4])):
        both = [r.join(asked, [0, 1]) if tokens is None else r.step(tokens) for r in (mine, other)]
        a, b = (logits.log_softmax(-1) for logits in both)
        apart = (a - b).abs()
        off = max(off, float(apart.mean() if narrow else apart.max()))
        largest = max(largest, float(b.abs().max()))
    # Their norms run in fp32 at most.
    return off, 0.25 if narrow else 100 * torch.finfo(torch.float32).eps * largest


class DecoderReader:
    """Reads for the rows of one batch of requests: a cache, and memory for a step. Rows may join at any time."""

    refills = True

    def __init__(
        self, decoder: Decoder, room: int, capacity: int, before_pass: Callable[[], object] = lambda: None
    ) -> None:
        decoder.refresh()
        self.decoder, self.before_pass, head = decoder, before_pass, decoder.head
        self.by_kernel = head.is_cuda and triton_obstacle("cuda", head.dtype) is None
        # Fake tensors are on a device that is not there; and how many tokens an expert gets, a graph would hold fast.
        graphs = self.by_kernel and torch.cuda.is_available() and not decoder.mixed
        room = padded_rows(room) if graphs else room
        self.graphs = Graphs(self._step, room, head.device) if graphs else None
        self.cache, self.work = decoder.cache(room, capacity), decoder.work(room)
        self.logits = torch.empty(room, len(head), dtype=compute_dtype(head.dtype), device=head.device)
        self.kept: tuple[tuple[int, ...], list, torch.Tensor] | None = None  # a prompt, its keys and values, its logits

    def join(self, requests: Sequence[Request], places: Sequence[int], more: bool = False) -> torch.Tensor:
        """Reads the prompts of new rows, each different one once; logits [rows, V].

        `more`: the last prompt will be asked for again by rows to come; it is kept for them.
        """
        device, cache = self.logits.device, self.cache
        prompts = list(dict.fromkeys(tuple(r.prompt_ids) for r in requests))
        self.reserve(max(len(r.prompt_ids) + r.max_new_tokens - 1 for r in requests))
        members = {prompt: [] for prompt in prompts}
        for i, request in enumerate(requests):
            members[tuple(request.prompt_ids)].append(i)
        cache.lengths[list(places)] = [len(r.prompt_ids) for r in requests]
        kept, self.kept = self.kept, None
        known = [] if kept is None or kept[0] not in members else [kept[0]]
        fresh = sorted((p for p in prompts if p not in known), key=len)
        keeping: list = []

        def keep(layer: int, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
            mine = fresh[first : first + len(k)]
            rows = [(at, i) for at, prompt in enumerate(mine) for i in members[prompt]]
            which = torch.tensor([at for at, _ in rows], device=device)
            to = torch.tensor([places[i] for _, i in rows], device=device)
            cache.fill(layer, to, k.index_select(0, which), v.index_select(0, which))
            if more and prompts[-1] in mine:
                at = mine.index(prompts[-1])
                keeping.append((k[at].clone(), v[at].clone()))

        logits = [self.decoder.read(fresh, keep, self.before_pass)] if fresh else []
        if known:
            to = torch.tensor([places[i] for i in members[kept[0]]], device=device)
            for layer, (k, v) in enumerate(kept[1]):
                cache.fill(layer, to, k.expand(len(to), *k.shape), v.expand(len(to), *v.shape))
            logits.append(kept[2][None])
        order = {prompt: at for at, prompt in enumerate(fresh + known)}
        logits = logits[0] if len(logits) == 1 else torch.cat(logits)
        if more:
            again = prompts[-1] in known
            self.kept = kept if again else (prompts[-1], keeping, logits[order[prompts[-1]]].clone())
        which = torch.tensor([order[tuple(r.prompt_ids)] for r in requests], device=device)
        return torch.index_select(logits, 0, which, out=self.logits[: len(requests)])

    def step(self, tokens: np.ndarray) -> torch.Tensor:
        """Reads the next token of each row under way; logits [rows, V], which the next call overwrites."""
        n, cache = len(tokens), self.cache
        self.reserve(int(cache.lengths[:n].max()) + 1)
        inputs = np.stack([tokens, cache.lengths[:n]])
        cache.lengths[:n] += 1
        if self.graphs is not None:
            self.graphs.run(inputs)
        else:
            self._step(*torch.from_numpy(inputs).to(self.logits.device))
        return self.logits[:n]

    def _step(self, ids: torch.Tensor, position: torch.Tensor) -> None:
        """Logits of the rows that read these tokens at these positions. Waits for nothing where a kernel knows the lengths."""
        cache, decoder = self.cache, self.decoder
        slots = cache.slots(position)
        if self.by_kernel:

            def look(layer: int, q: torch.Tensor) -> torch.Tensor:
                return decode_attention(q, cache.keys[layer], cache.values[layer], position, decoder.scale)
        else:
            look = Sections(cache.lengths[: len(ids)], cache, decoder.scale).attend

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            cache.append(layer, slots, k, v)
            return look(layer, q)

        hidden = decoder.run(ids, decoder.rotations(position), self.work, attend)
        decoder.logits(hidden, self.logits[: len(ids)])

    def keep(self, order: np.ndarray) -> None:
        """Of the rows those stay that were at these places, and stand in this order."""
        self.cache.move(order)

    def reserve(self, tokens: int) -> None:
        """A row will become so long."""
        if self.cache.reserve(tokens) and self.graphs is not None:
            self.graphs.clear()
