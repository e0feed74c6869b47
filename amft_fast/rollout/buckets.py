"""Prompts in buckets by length: what is decoded at once is bounded in tokens, and hardly padded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from amft_fast.interfaces import Completion, Request, RolloutEngine, Sampling
from amft_fast.rollout.episodes import turn_by_turn

if TYPE_CHECKING:
    import torch


def buckets(requests: Sequence[Request], max_tokens: int) -> list[list[int]]:
    """Positions of requests, in runs of like prompt length, each with at most `max_tokens` tokens: every prompt padded to the
    longest of its run, plus its new tokens. A request that is larger by itself has a run of its own.

    Requests for the same prompt stay neighbours, so that an engine can read it once.
    """
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), requests[i].prompt_ids))
    out: list[list[int]] = []
    new_tokens = 0
    for i in order:
        request = requests[i]
        new_tokens += request.max_new_tokens
        if out and len(request.prompt_ids) * (len(out[-1]) + 1) + new_tokens <= max_tokens:
            out[-1].append(i)
        else:
            out.append([i])
            new_tokens = request.max_new_tokens
    return out


class Bucketed:
    """A rollout engine that is asked bucket by bucket; answers come back in the order of the requests."""

    def __init__(self, engine: RolloutEngine, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self.engine, self.max_tokens = engine, max_tokens

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        out: list[Completion | None] = [None] * len(requests)
        for bucket in buckets(requests, self.max_tokens):
            for i, completion in zip(bucket, self.engine.generate([requests[i] for i in bucket], sampling)):
                out[i] = completion
        return out

    def converse(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        reply: Callable[[int, Completion], Request | None],
    ) -> None:
        converse = getattr(self.engine, "converse", None) or partial(turn_by_turn, self.engine)
        for bucket in buckets(requests, self.max_tokens):
            converse([requests[i] for i in bucket], sampling, lambda j, completion, b=bucket: reply(b[j], completion))

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self.engine.sync(named_tensors, version)

    def rest(self) -> None:
        self.engine.rest()

    def health(self) -> str:
        return self.engine.health()

    def close(self) -> None:
        self.engine.close()
