"""The multi-turn driver, over any task and any rollout engine: one turn is the common case, not a special one.

The policy answers, the task judges; while the task has a message to send back and turns are left, its tokens are appended and
the policy goes on. Token ids are trained on as the engine returned them: only the verifier's message is ever tokenised here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np

from amft_fast.data.stream import sample_seed
from amft_fast.errors import UserError
from amft_fast.interfaces import (
    Completion,
    Item,
    Request,
    RolloutEngine,
    Sample,
    Sampling,
    StepResult,
    Task,
    Turn,
)
from amft_fast.rollout.context import prompt_that_fits
from amft_fast.rollout.encoder import Encoder


def run(
    engine: RolloutEngine,
    task: Task,
    items: Sequence[Item],
    encoder: Encoder,
    sampling: Sampling,
    *,
    num_generations: int,
    max_new_tokens: int,
    seed_parts: tuple[object, ...],
    first_group: int = 0,
    only: range | None = None,
    hint: Callable[[Item, int], Sequence[int]] | None = None,
    on_answer: Callable[[], object] = lambda: None,
    judging: AbstractContextManager | None = None,
) -> list[Sample]:
    """`num_generations` samples of every item, in the order of the items, judged.

    `seed_parts` (run seed, step or purpose) and each sample's prompt id, index and turn give its random stream. Samples of
    one item share a `group_id`, counted from `first_group`.
    `hint`: token ids that an item's sample with this number begins with; the task judges them with what the policy adds.
    `only`: draw these of the `len(items) * num_generations` samples, and no others. `on_answer` is called as each is complete.
    `judging` is entered wherever the task is asked: a lock, where several threads ask it.
    """
    judging = judging or nullcontext()
    samples, episodes, numbers = [], [], []
    before: Counter[str] = (
        Counter()
    )  # how often a prompt came already: its second group continues the count of its samples
    for g, item in enumerate(items):
        prompt, first = None, before[item.id] * num_generations
        before[item.id] += 1
        for number in range(num_generations):
            if only is not None and g * num_generations + number not in only:
                continue
            with judging:
                episode = task.start(item)
            prompt = prompt or prompt_that_fits(encoder, episode.messages, item.id)
            images = tuple(image for m in episode.messages for image in m.images)
            sample = Sample(prompt, [], [], [], 0, "stop", item.id, first_group + g, images=images)
            if hint is not None:
                _begin(sample, hint(item, first + number))
            samples.append(sample)
            episodes.append(episode)
            numbers.append(first + number)

    def request(i: int) -> Request:
        s = samples[i]
        seed = sample_seed(*seed_parts, s.prompt_id, numbers[i], len(s.turns))
        known = tuple(s.prompt_ids + s.response_ids)
        return Request(known, seed, encoder.room(known, max_new_tokens), s.images)

    def reply(i: int, completion: Completion) -> Request | None:
        text = encoder.decode([_turn_ids(samples[i], completion)])[0]
        last = len(samples[i].turns) + 1 == task.max_turns
        with judging:
            result = episodes[i].step(text)
        if _take_turn(samples[i], result, completion, text, encoder, last):
            return request(i)
        on_answer()
        return None

    requests = [request(i) for i in range(len(samples))]
    converse = getattr(engine, "converse", None) or partial(turn_by_turn, engine)
    if task.max_turns == 1 and hasattr(task, "step_all"):
        completions = _all_completed(converse, requests, sampling, on_answer)
        texts = encoder.decode([_turn_ids(s, c) for s, c in zip(samples, completions)])
        with judging:
            results = task.step_all(episodes, texts)
        for given in zip(samples, results, completions, texts, strict=True):
            _take_turn(*given, encoder, last=True)
        return samples
    converse(requests, sampling, reply)
    return samples


def _begin(sample: Sample, hint: Sequence[int]) -> None:
    """The sample's response begins with what the policy has not drawn."""
    sample.hint = len(hint)
    sample.response_ids, sample.loss_mask = [*hint], [0] * len(hint)
    sample.behavior_logprobs = [0.0] * len(hint)


def _turn_ids(sample: Sample, completion: Completion) -> list[int]:
    """The tokens of a turn as the task reads it: the first begins with the hint."""
    return completion.token_ids if sample.turns else [*sample.response_ids, *completion.token_ids]


def _all_completed(converse, requests: list[Request], sampling: Sampling, on_answer) -> list[Completion]:
    """One completion for each request, in order."""
    completions: dict[int, Completion] = {}

    def keep(i: int, completion: Completion) -> None:
        completions[i] = completion
        on_answer()

    converse(requests, sampling, keep)
    return [completions[i] for i in range(len(requests))]


def turn_by_turn(
    engine: RolloutEngine,
    requests: list[Request],
    sampling: Sampling,
    reply: Callable[[int, Completion], Request | None],
) -> None:
    """Conversations over an engine that only completes: all first turns, then all second ones, and so on."""
    going = list(enumerate(requests))
    while going:
        completions = engine.generate([request for _, request in going], sampling)
        replies = [(i, reply(i, completion)) for (i, _), completion in zip(going, completions, strict=True)]
        going = [(i, request) for i, request in replies if request is not None]


def _note_versions(sample: Sample, completion: Completion) -> None:
    """Which weights drew the tokens of this completion."""
    for version, count in completion.versions or ((completion.weight_version, len(completion.token_ids)),):
        if sample.versions and sample.versions[-1][0] == version:
            count += sample.versions.pop()[1]
        sample.versions.append((version, count))
    sample.weight_version = min(version for version, _ in sample.versions)


def _note_experts(sample: Sample, completion: Completion) -> None:
    """Where this completion's tokens went, and what was said to it; of earlier tokens what is known from their own turn."""
    known = 0 if sample.experts is None else len(sample.experts)
    if completion.experts is None or (sample.turns and not known):
        sample.experts = None
        return
    new = completion.experts[known:]
    sample.experts = np.concatenate([sample.experts, new]) if known else new


def _take_turn(sample: Sample, result: StepResult, completion, text: str, encoder: Encoder, last: bool) -> bool:
    """Appends one completion to its sample, with what the task answered; True when the policy is to go on."""
    n = len(completion.token_ids)
    sample.response_ids += completion.token_ids
    sample.loss_mask += [1] * n
    sample.behavior_logprobs += completion.logprobs
    known = sample.entropy is not None and completion.entropy is not None
    sample.entropy = sample.entropy + completion.entropy if known else None
    sample.finish_reason = completion.finish_reason
    _note_versions(sample, completion)
    _note_experts(sample, completion)
    sample.text += text
    if "success" not in result.info:
        raise UserError(f"task: an episode of {sample.prompt_id} returned no 'success' in its info")
    state = str(result.info.get("state", len(sample.turns)))
    sample.turns.append(Turn(len(sample.response_ids), result.reward, state))
    sample.reward += result.reward
    sample.success = bool(result.info["success"])
    sample.info = result.info
    if result.done or result.message is None or last:
        return False
    ids = encoder.feedback(result.message, completion.finish_reason == "stop")
    if encoder.room([*sample.prompt_ids, *sample.response_ids, *ids], 1) < 1:
        sample.finish_reason = "length"  # the conversation is as long as the model's context
        return False
    sample.response_ids += ids
    sample.loss_mask += [0] * len(ids)
    sample.behavior_logprobs += [0.0] * len(ids)
    sample.images += result.message.images
    sample.text += f"\n[{result.message.content}]\n"
    return True
