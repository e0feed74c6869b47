"""What a vLLM engine is asked, and what must hold of its answers.

Requests go as groups: one prompt, several samples, prefilled once. Log-probs are of the distribution
that was sampled from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from amft_fast.data.pictures import png
from amft_fast.errors import UserError
from amft_fast.interfaces import Request, Sampling
from amft_fast.model.vision import opened

SEED_MASK = (1 << 62) - 1  # vLLM's seeds are int64, and sample i of a group takes seed + i
NOT_A_NUMBER = -9999.0  # what a vLLM server says of a log-prob that is none


class EngineError(RuntimeError):
    """An engine that is gone, does not answer in time, or answers nonsense. Another try may do."""


@dataclass(frozen=True)
class RequestGroup:
    """Requests that continue one prompt to one length: `members` are their places in the list. Sample i draws from seed + i."""

    prompt_ids: tuple[int, ...]
    seed: int
    max_new_tokens: int
    images: tuple[Any, ...]
    members: tuple[int, ...]


def group_requests(requests: Sequence[Request]) -> list[RequestGroup]:
    """Neighbours with the same prompt and length bound, as one group each, with the seed of its first."""
    groups: list[RequestGroup] = []
    for i, r in enumerate(requests):
        last = groups[-1] if groups else None
        same = last is not None and (last.prompt_ids, last.max_new_tokens) == (r.prompt_ids, r.max_new_tokens)
        if same and last.images == r.images:
            groups[-1] = RequestGroup(last.prompt_ids, last.seed, last.max_new_tokens, last.images, (*last.members, i))
        else:
            groups.append(RequestGroup(tuple(r.prompt_ids), r.seed & SEED_MASK, r.max_new_tokens, r.images, (i,)))
    return groups


def single_places(group: RequestGroup, image_token: int | None) -> list[int]:
    """The prompt with one token for each image, as vLLM wants it: it makes the run of tokens that an image takes by itself."""
    ids = group.prompt_ids
    if not group.images or image_token is None:
        return list(ids)
    return [t for i, t in enumerate(ids) if t != image_token or i == 0 or ids[i - 1] != image_token]


def as_url(image: Any) -> str:
    """A picture (or its path) as it is, without loss, in a data URL."""
    return "data:image/png;base64," + png(opened(image), compress_level=1)


def check_prompt(read: Sequence[int] | None, group: RequestGroup) -> None:
    """Raises UserError where an engine makes other tokens of a group's pictures than the trainer; `read` is what it read."""
    if group.images and list(read or ()) != list(group.prompt_ids):
        raise UserError(
            f"rollout.vllm: the engine reads {len(read or ())} tokens where the trainer reads {len(group.prompt_ids)}: its "
            "image processor makes another size of a picture; start it with the checkpoint's preprocessor_config.json as it is"
        )


def asked_for(group: RequestGroup, sampling: Sampling) -> int:
    """How many samples an engine is asked for: greedy ones are all the same, and vLLM refuses to draw several."""
    return 1 if sampling.temperature == 0 else len(group.members)


def sampling_settings(group: RequestGroup, sampling: Sampling) -> dict[str, Any]:
    """vLLM's names for how this group is sampled; the same for its offline and its HTTP interface."""
    return {
        "n": asked_for(group, sampling),
        "seed": group.seed,
        "max_tokens": group.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        # Said even so: a server that others started may have defaults out of the checkpoint's generation_config.json.
        "top_k": 0,
        "min_p": 0.0,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # stop tokens are ours alone, as with the transformers engine
        "logprobs": 0,  # of the sampled token only
    }


def check(
    ids: Any, logprobs: Any, reason: Any, group: RequestGroup, vocabulary: int
) -> tuple[list[int], list[float], str]:
    """What an engine returned for one sample. Raises EngineError unless it is a sample that could be trained on."""
    good_ids = isinstance(ids, list) and all(type(i) is int and 0 <= i < vocabulary for i in ids)
    if not good_ids or not 1 <= len(ids) <= group.max_new_tokens:
        raise EngineError(f"garbage: token ids {str(ids)[:80]}")
    # A log-prob may come out of rounding a hair above 0.
    good = isinstance(logprobs, list) and all(
        type(x) in (int, float) and math.isfinite(x) and NOT_A_NUMBER < x < 1e-3 for x in logprobs
    )
    if not good or len(logprobs) != len(ids):
        raise EngineError(f"garbage: log-probs {str(logprobs)[:80]} for {len(ids)} tokens")
    if reason not in ("stop", "length"):
        raise EngineError(f"garbage: finish reason {reason!r}")
    return ids, [min(float(x), 0.0) for x in logprobs], reason


def check_experts(routed: Any, tokens: int) -> np.ndarray:
    """The experts of all but the last of so many tokens. Raises EngineError unless they are those."""
    if not isinstance(routed, np.ndarray) or routed.ndim != 3 or len(routed) < tokens - 1:
        shape = list(routed.shape) if isinstance(routed, np.ndarray) else routed
        raise EngineError(f"garbage: the experts of {tokens} tokens are {shape}")
    return routed[: tokens - 1].astype(np.int16)
