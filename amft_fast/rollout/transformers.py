"""The embedded rollout engine: samples from the trainer's own transformers model, so that syncing weights is free.

Every sample has a random stream of its own, a hash of (seed, position): what it draws does not depend on its neighbours, the
batch size or the rank. A prompt that several requests share is read once. A row that ends leaves the batch, and the next
request takes its place at once. A row whose turn is answered reads the answer token by token while the others sample on: what
it has read is kept, and no row waits for another's.

Models of a known family are read by our own loop over their layers (`decoder.py`), others, and all that see pictures, by
transformers' forward pass (`forward.py`).
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import nn

from amft_fast.interfaces import Completion, Request, Sampling
from amft_fast.model.layers import eagerly
from amft_fast.model.policy import fill
from amft_fast.model.vision import Vision
from amft_fast.rollout import decoder
from amft_fast.rollout.forward import ForwardReader
from amft_fast.rollout.sampling import sample_tokens
from amft_fast.rollout.turns import Turns

Reply = Callable[[int, Completion], Request | None]


class Reader(Protocol):
    """What reads tokens for the rows of a batch and knows what they have read. `refills`: rows may join others."""

    refills: bool

    def join(self, requests: Sequence[Request], places: Sequence[int], more: bool = False) -> torch.Tensor: ...
    def step(self, tokens: np.ndarray) -> torch.Tensor: ...
    def keep(self, order: np.ndarray) -> None: ...
    def reserve(self, tokens: int) -> None: ...


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
        self.version = 0
        self._decoder: decoder.Decoder | None = None
        self._why: str | None = None  # why there is no decoder; None while that is open

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order."""
        out: list[Completion | None] = [None] * len(requests)

        def keep(i: int, completion: Completion) -> None:
            out[i] = completion

        self.converse(requests, sampling, keep)
        return out

    def converse(self, requests: Sequence[Request], sampling: Sampling, reply: Reply) -> None:
        """Completes every request; each time request i is completed, `reply(i, completion)` may say how it goes on.

        What `reply` returns must begin with the tokens so far (prompt and completion). They stay in the KV cache: only the
        new ones are read, and no conversation waits for another's turn to end. A reply that shows a new image is the
        exception: it is read from the beginning, after the others.
        """
        now = dict(enumerate(requests))
        while now:
            order = sorted(now, key=lambda i: (len(now[i].prompt_ids), now[i].prompt_ids))
            later: dict[int, Request] = {}
            for kin in self._kin(order, now):
                with self._reading():
                    self._decode(kin, now, sampling, _answer_or_wait(now, later, reply))
            now = later

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """The model as it reads: no dropout, no graph, its layers as they are."""
        was_training = self.model.training
        self.model.eval()
        try:
            with eagerly(self.model), torch.inference_mode():
                yield
        finally:
            self.model.train(was_training)
            if self._decoder is not None:
                self._decoder.release()

    def explain(self) -> tuple[str, str]:
        """(what reads the tokens, why): "decoder" or "transformers' forward"."""
        if self._why is None and self._decoder is None:
            with self._reading():
                self._choose()
        if self._decoder is not None:
            return "decoder", f"its layers are {self.model.config.model_type}'s"
        return "transformers' forward", self._why or ""

    def _kin(self, order: list[int], requests: dict[int, Request]) -> Iterator[list[int]]:
        """The requests that may be decoded together."""
        if self.vision is None:
            yield order
            return
        for places in self.vision.kin([len(requests[i].images) for i in order]):
            yield [order[at] for at in places]

    def _choose(self) -> None:
        """The decoder, when its layers are the model's: by the configuration, and by what both make of the same tokens."""
        self._why = "the model sees pictures" if self.vision is not None else decoder.obstacle(self.model)
        if self._why is not None:
            return
        made = decoder.Decoder(self.model)
        off, allowed = decoder.difference(made, ForwardReader(self.model, self.pad, None))
        if off <= allowed:
            self._decoder = made
            return
        self._why = (
            f"its log-probs differ by {off:.1g} from those of our loop over {self.model.config.model_type}'s layers"
        )
        print(f"rollouts: {self._why}; transformers' own forward pass is taken", file=sys.stderr)

    def _reader(self, room: int, requests: Iterable[Request]) -> Reader:
        if self._why is None and self._decoder is None:
            self._choose()
        if self._decoder is None:
            return ForwardReader(self.model, self.pad, self.vision)
        # Nothing follows a row's last token, so it is not read.
        longest = max(len(r.prompt_ids) + r.max_new_tokens - 1 for r in requests)
        return decoder.DecoderReader(self._decoder, room, longest, self._stop_if_asked)

    def _stop_if_asked(self) -> None:
        if self.should_stop():
            raise InterruptedError("stopped while sampling")

    def _decode(self, numbers: list[int], requests: dict[int, Request], sampling: Sampling, reply: Reply) -> None:
        """Completes the requests of these numbers, in this order, as places get free."""
        waiting = deque(numbers)
        room = min(self.max_batch, len(numbers))
        reader = self._reader(room, [requests[i] for i in numbers])
        turns = Turns(room, max(requests[i].max_new_tokens for i in numbers), sampling)
        free: list[int] = []  # places whose rows have ended
        tokens = np.zeros(room, np.int64)  # what each row reads next
        while True:
            self._stop_if_asked()
            under_way = turns.size - len(free)
            if not under_way:
                turns.size, free = 0, []
            if waiting and room > under_way and (reader.refills or not under_way):
                here = (free + list(range(turns.size, room)))[: len(waiting)]
                chosen = [waiting.popleft() for _ in here]
                free = free[len(here) :]
                turns.join(here, chosen, [requests[i] for i in chosen])
                more = bool(waiting) and requests[waiting[0]].prompt_ids == requests[chosen[-1]].prompt_ids
                logits = reader.join([requests[i] for i in chosen], here, more)
                places = np.array(here)
            elif under_way:
                if free:
                    order = turns.leave(free)
                    reader.keep(order)
                    tokens[: len(order)] = tokens[order]
                    free = []
                places = np.arange(turns.size)
                logits = reader.step(tokens[: turns.size])
            else:
                return
            u = torch.from_numpy(turns.uniform(places)).to(logits.device)
            sampled = read_back(*sample_tokens(logits, u, sampling))
            tokens[places], ended = turns.take(places, *sampled)
            for place in ended.tolist():
                i = int(turns.request[place])
                completion = turns.completion(place, self.version)
                request = reply(i, completion)
                if request is None:
                    free.append(place)
                    continue
                known = (*requests[i].prompt_ids, *completion.token_ids)
                if tuple(request.prompt_ids[: len(known)]) != known:
                    raise ValueError("what a reply returns must begin with the tokens so far")
                requests[i] = request
                turns.go_on(place, request, list(request.prompt_ids[len(known) :]))
                reader.reserve(len(request.prompt_ids) + request.max_new_tokens - 1)

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


def read_back(*drawn: torch.Tensor) -> tuple[np.ndarray, ...]:
    """A step's tokens, log-probs and entropies on the host: the one wait for the device that a token costs."""
    return tuple(x.cpu().numpy() for x in drawn)


def _answer_or_wait(now: dict[int, Request], later: dict[int, Request], reply: Reply) -> Reply:
    """What `reply` says to a completion; a request that shows a new image is put among those for `later` instead."""

    def answer(i: int, completion: Completion) -> Request | None:
        request = reply(i, completion)
        if request is not None and len(request.images) > len(now[i].images):
            later[i], request = request, None
        return request

    return answer
