"""The embedded rollout engine: samples from the trainer's own transformers model, so that syncing weights is free.

Every sample has a random stream of its own, a hash of (seed, position): what it draws does not depend on its neighbours, the
batch size or the rank. A prompt that several requests share is prefilled once; finished rows leave the batch. A row whose turn
is answered reads the answer token by token while the others sample on: its KV cache is kept, and no row waits for another's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from amft_fast.interfaces import Completion, Request, Sampling
from amft_fast.model.layers import eagerly
from amft_fast.model.policy import fill
from amft_fast.model.vision import Vision

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: np.ndarray, steps: int) -> np.ndarray:
    """Uniform numbers in [0, 1), [B, steps] fp64, from `seeds` [B] uint64: SplitMix64 (Steele et al. 2014) in counter mode."""
    with np.errstate(over="ignore"):
        z = seeds[:, None] + _GOLDEN * np.arange(1, steps + 1, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_tokens(logits_BV: torch.Tensor, u_B: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row by inverse transform, and its log-prob under the distribution drawn from.

    temperature 0 takes the largest logit (log-prob at temperature 1). top_p cuts the distribution first.
    """
    if sampling.temperature == 0:
        tokens = logits_BV.argmax(-1)
        return tokens, logits_BV.float().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    logp_BV = (logits_BV.float() / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        logp_BV = _nucleus(logp_BV, sampling.top_p)
    cdf_BV = logp_BV.double().exp().cumsum(-1)
    # The last column of the cdf is 1 up to rounding: scaling u by it keeps the draw inside the support.
    tokens = torch.searchsorted(cdf_BV, u_B[:, None] * cdf_BV[:, -1:], right=True).squeeze(-1)
    tokens = tokens.clamp(max=logits_BV.shape[-1] - 1)
    return tokens, logp_BV.gather(-1, tokens[:, None]).squeeze(-1)


def _nucleus(logp_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Renormalised log-probs of the likeliest tokens that hold the mass `top_p` (evaluation only)."""
    sorted_BV, order_BV = logp_BV.sort(-1, descending=True)
    p_BV = sorted_BV.exp()
    # A token stays while the mass before it is under top_p, so the first always stays.
    keep_BV = p_BV.cumsum(-1) - p_BV < top_p
    sorted_BV = sorted_BV.masked_fill(~keep_BV, -torch.inf)
    return torch.empty_like(logp_BV).scatter_(-1, order_BV, sorted_BV).log_softmax(-1)


class TransformersEngine:
    """Batched decoding with a KV cache, in the trainer's process and on its weights, or on a copy (`own_weights`) where the
    trainer's are cut over processes.

    `max_batch` bounds the sequences decoded at once. `should_stop` is asked between tokens: when it says yes,
    `InterruptedError` is raised, and no sample is lost, since the same requests give the same samples again.
    """

    def __init__(
        self,
        model: nn.Module,
        pad_token_id: int = 0,
        max_batch: int = 512,
        should_stop: Callable[[], bool] = lambda: False,
        vision: Vision | None = None,
        own_weights: bool = False,
    ) -> None:
        self.vision, self.own_weights = vision, own_weights
        self.model, self.pad, self.max_batch, self.should_stop = model, pad_token_id, max_batch, should_stop
        # transformers 5.24 calls the KV cache `cache`, where it was `past_key_values`.
        self.cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self.version = 0

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order."""
        out: list[Completion | None] = [None] * len(requests)

        def keep(i: int, completion: Completion) -> None:
            out[i] = completion

        self.converse(requests, sampling, keep)
        return out

    def converse(
        self, requests: Sequence[Request], sampling: Sampling, reply: Callable[[int, Completion], Request | None]
    ) -> None:
        """Completes every request; each time request i is completed, `reply(i, completion)` may say how it goes on.

        What `reply` returns must begin with the tokens so far (prompt and completion). They stay in the KV cache: only the
        new ones are read, and no conversation waits for another's turn to end. A reply that shows a new image is the
        exception: it is read from the beginning, after the others.
        """
        was_training = self.model.training
        self.model.eval()
        waiting = dict(enumerate(requests))
        try:
            while waiting:
                order = sorted(waiting, key=lambda i: (len(waiting[i].prompt_ids), waiting[i].prompt_ids))
                now, waiting = waiting, {}
                for chosen in self._batches(order, now):
                    answer = partial(_answer_or_wait, chosen, now, waiting, reply)
                    with eagerly(self.model):
                        self._decode([now[i] for i in chosen], sampling, answer)
        finally:
            self.model.train(was_training)

    def _batches(self, order: list[int], requests: dict[int, Request]) -> Iterator[list[int]]:
        """The requests that are decoded together, at most `max_batch` of them."""
        groups = [order]
        if self.vision is not None:
            kin = self.vision.kin([len(requests[i].images) for i in order])
            groups = [[order[at] for at in places] for places in kin]
        for group in groups:
            for start in range(0, len(group), self.max_batch):
                yield group[start : start + self.max_batch]

    @torch.inference_mode()
    def _decode(
        self,
        requests: list[Request],
        sampling: Sampling,
        reply: Callable[[int, Completion], Request | None],
    ) -> None:
        device = self.model.device
        turns = _Turns(requests, device)
        logits, cache, mask, positions, seen = self._prefill(requests, device)
        stop = torch.tensor(sampling.stop_token_ids or (-1,), device=device)
        alive = torch.arange(len(requests), device=device)
        while True:
            if self.should_stop():
                raise InterruptedError("stopped while sampling")
            token, logprob = sample_tokens(logits, turns.uniform(alive), sampling)
            token, ended = turns.take(alive, token, logprob, stop)
            where = ended.nonzero().squeeze(-1)  # the one host sync of a token at which nothing ends
            if len(where):
                left = self._answer(turns, alive, where, requests, sampling, reply)
                if not len(left):
                    return
                if len(left) < len(alive):
                    alive, token, positions = alive[left], token[left], positions[left]
                    mask = None if mask is None else mask[left]
                    seen = {k: v[left] for k, v in seen.items()}
                    cache.batch_select_indices(left)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
            positions = positions + 1
            if self.vision is not None:
                token = self.vision.readable(token)
            logits = self._forward(token[:, None], mask, positions[:, None], cache, seen)

    def _answer(self, turns: _Turns, alive, where, requests, sampling, reply) -> torch.Tensor:
        """Hands the completions that ended to `reply`; the places in `alive` of the rows that go on."""
        going = torch.ones(len(alive), dtype=torch.bool)
        onward: dict[int, tuple[Request, list[int]]] = {}
        for place, row, completion in turns.completions(alive, where, sampling, self.version):
            request = reply(row, completion)
            if request is None:
                going[place] = False
                continue
            known = (*requests[row].prompt_ids, *completion.token_ids)
            if tuple(request.prompt_ids[: len(known)]) != known:
                raise ValueError("what a reply returns must begin with the tokens so far")
            requests[row], onward[row] = request, (request, list(request.prompt_ids[len(known) :]))
        if onward:
            turns.go_on(onward)
        return going.nonzero().squeeze(-1).to(alive.device)

    def _prefill(self, requests: list[Request], device: torch.device):
        """Left-padded prompts, each different one once; logits, cache, mask, last positions and what a vision-language
        model wants to be told at every token, for every request.

        The mask is None when nothing was padded: transformers then takes its cheapest attention path.
        """
        unique: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        keys = [(tuple(r.prompt_ids), tuple(map(id, r.images))) for r in requests]
        which = [unique.setdefault(key, len(unique)) for key in keys]
        width = max(len(p) for p, _ in unique)
        ids = np.full((len(unique), width), self.pad, np.int64)
        mask = np.zeros((len(unique), width), np.int64)
        for row, (prompt, _) in enumerate(unique):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        ids_t, mask_t = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        positions = (mask_t.cumsum(1) - 1).clamp(min=0)
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        padded = not mask.all()
        seen = {}
        if self.vision is not None:
            shown = {key: r.images for key, r in zip(keys, requests)}
            texts = [(np.asarray(key[0], np.int64), shown[key]) for key in unique]
            backbone = getattr(self.model, self.model.base_model_prefix)
            seen = self.vision.arguments(backbone, self.vision.inputs(texts, device, left=True, pad=self.pad))
            ids_t = self.vision.readable(ids_t)
        ids_t, positions = seen.pop("input_ids", ids_t), seen.pop("position_ids", positions)
        logits = self._forward(ids_t, mask_t if padded else None, positions, cache, seen)
        positions = positions[0] if positions.dim() == 3 else positions  # a prompt ends with text: all axes are alike
        rows = torch.tensor(which, device=device)
        seen = {k: v[rows] for k, v in self.vision.after_prefill(seen).items()} if seen else {}
        if len(unique) != len(requests) or which != list(range(len(which))):
            cache.batch_select_indices(rows)
        return logits[rows], cache, mask_t[rows] if padded else None, positions[rows, -1], seen

    def _forward(self, ids, mask, positions, cache, seen: dict[str, torch.Tensor]) -> torch.Tensor:
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: cache},
            **seen,
        )
        return out.logits[:, -1]

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """With weights of its own they are copied; else they are the trainer's, and the tensors are never asked for."""
        if self.own_weights:
            fill(self.model, named_tensors)
        self.version = version

    def rest(self) -> None:
        """Nothing to give back: the weights are the trainer's."""

    def health(self) -> str:
        return "ok"

    def close(self) -> None:
        """Nothing to release."""


def _answer_or_wait(chosen, now, waiting, reply, row: int, completion: Completion) -> Request | None:
    """What `reply` says to a completion; a request that shows a new image is put among those `waiting` instead."""
    i = chosen[row]
    request = reply(i, completion)
    if request is not None and len(request.images) > len(now[i].images):
        waiting[i], request = request, None
    return request


class _Turns:
    """Where every row of a batch is in its turn, on the device: nothing of it is read back before a turn ends.

    A row first reads what was said to it (`queue`), a token each time, and then samples. Legend: B rows, W most tokens of a
    turn, Q longest queue.
    """

    def __init__(self, requests: list[Request], device: torch.device) -> None:
        b, self.width = len(requests), max(r.max_new_tokens for r in requests)
        self.u_BW = torch.zeros(b, self.width, dtype=torch.float64, device=device)
        self.tokens_BW = torch.zeros(b, self.width + 1, dtype=torch.int64, device=device)  # the last column is a sink
        self.logprobs_BW = torch.zeros(b, self.width + 1, device=device)
        self.limit_B = torch.zeros(b, dtype=torch.int64, device=device)
        self.count_B = torch.zeros_like(self.limit_B)  # tokens sampled in this turn
        self.queue_BQ = torch.zeros(b, 1, dtype=torch.int64, device=device)
        self.read_B, self.unread_B = torch.zeros_like(self.limit_B), torch.zeros_like(self.limit_B)
        self._start(torch.arange(b, device=device), requests)

    def _start(self, rows: torch.Tensor, requests: list[Request]) -> None:
        """A new turn of these rows: its own random stream and its own length."""
        if max(r.max_new_tokens for r in requests) > self.width:
            raise ValueError("a reply must not ask for more tokens than the longest first request")
        u = uniforms(np.array([r.seed for r in requests], np.uint64), self.width)
        self.u_BW[rows] = torch.from_numpy(u).to(rows.device)
        self.limit_B[rows] = torch.tensor([r.max_new_tokens for r in requests], device=rows.device)
        self.count_B[rows] = 0

    def go_on(self, onward: dict[int, tuple[Request, list[int]]]) -> None:
        """These rows read what was said to them, and then answer."""
        rows = torch.tensor(list(onward), device=self.limit_B.device)
        self._start(rows, [request for request, _ in onward.values()])
        said = [ids for _, ids in onward.values()]
        wide = max(self.queue_BQ.shape[1], *(len(ids) for ids in said))
        self.queue_BQ = nn.functional.pad(self.queue_BQ, (0, wide - self.queue_BQ.shape[1]))
        self.queue_BQ[rows] = torch.tensor([ids + [0] * (wide - len(ids)) for ids in said], device=rows.device)
        self.read_B[rows] = 0
        self.unread_B[rows] = torch.tensor([len(ids) for ids in said], device=rows.device)

    def uniform(self, alive: torch.Tensor) -> torch.Tensor:
        """The number that draws each row's next token."""
        return self.u_BW[alive, self.count_B[alive].clamp(max=self.width - 1)]

    def take(self, alive, sampled, logprob, stop) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens to feed (said to the row, or sampled by it), and which rows ended their turn with theirs."""
        reading, count = self.unread_B[alive] > 0, self.count_B[alive]
        column = torch.where(reading, self.width, count)
        self.tokens_BW[alive, column], self.logprobs_BW[alive, column] = sampled, logprob.float()
        said = self.queue_BQ[alive, self.read_B[alive].clamp(max=self.queue_BQ.shape[1] - 1)]
        self.read_B[alive] += reading
        self.unread_B[alive] -= reading.long()
        self.count_B[alive] += ~reading
        ended = ~reading & (torch.isin(sampled, stop) | (count + 1 >= self.limit_B[alive]))
        return torch.where(reading, said, sampled), ended

    def completions(self, alive, where, sampling: Sampling, version: int) -> list[tuple[int, int, Completion]]:
        """(place in `alive`, row, completion) of the turns that ended there."""
        rows = alive[where]
        columns = (where, rows, self.count_B[rows], self.tokens_BW[rows], self.logprobs_BW[rows])
        stop = set(sampling.stop_token_ids)
        return [
            (place, row, Completion(ids[:n], lp[:n], "stop" if ids[n - 1] in stop else "length", version))
            for place, row, n, ids, lp in zip(*(c.tolist() for c in columns))
        ]
