"""The multi-turn driver, over any task and any rollout engine: one turn is the common case, not a special one.

The policy answers, the task judges; while the task has a message to send back and turns are left, its tokens are appended and
the policy goes on. Token ids are trained on as the engine returned them: only the verifier's message is ever tokenised here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from amft_fast.interfaces import (
    Completion,
    Demo,
    Item,
    Message,
    Request,
    RolloutEngine,
    Sample,
    Sampling,
    StepResult,
    Task,
    Turn,
    UserError,
)

if TYPE_CHECKING:
    from amft_fast.vision import Vision


def sample_seed(*parts: object) -> int:
    """The 64-bit seed of a sample, from what it is (run seed, step, prompt, sample index, turn), not from where it is drawn."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Encoder:
    """Turns messages into token ids by the tokenizer's chat template (or plain text where it has none), with a cache.

    `vision` (see vision.py) makes the places of images; without it a message that holds one is refused.
    """

    _MARK = "\u241fanswer\u241f"

    def __init__(self, tokenizer, vision: Vision | None = None) -> None:
        self.tokenizer, self.vision = tokenizer, vision
        self._prompts: dict[tuple[tuple[Any, ...], ...], list[int]] = {}
        self._feedback: dict[tuple[Any, ...], list[int]] = {}
        eos = [tokenizer.eos_token_id, *_template_stops(tokenizer), *(vision.stop_token_ids if vision else ())]
        self.stop_token_ids = tuple(dict.fromkeys(i for i in eos if i is not None))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a prompt, ready for the policy's answer. Callers must not change the list."""
        key = tuple((m.role, m.content, self._sizes(m)) for m in messages)
        if key not in self._prompts:
            self._prompts[key] = self._expand(self._ids(self._render(messages, True)), messages)
        return self._prompts[key]

    def response(self, text: str) -> list[int]:
        """Token ids of a demonstration's answer, with the stop token."""
        return [*self._ids(text), self.stop_token_ids[0]]

    def demo(self, demo: Demo) -> tuple[list[int], list[int], list[int], tuple[Any, ...]]:
        """(prompt ids, response ids, loss mask of the response, images) of a demonstration: its answers are imitated, what
        is said to the policy between them is not."""
        ids = self.response(demo.response)
        mask = [1] * len(ids)
        for message, answer in demo.more:
            said, answered = self.feedback(message, stopped=True), self.response(answer)
            ids += said + answered
            mask += [0] * len(said) + [1] * len(answered)
        images = [image for m in (*demo.messages, *(said for said, _ in demo.more)) for image in m.images]
        return self.prompt(demo.messages), ids, mask, tuple(images)

    def feedback(self, message: Message, stopped: bool) -> list[int]:
        """Token ids between the policy's answer and its next one: the end of its turn unless it `stopped` itself, the
        verifier's message, the opening of the next answer. Callers must not change the list."""
        key = (message.role, message.content, self._sizes(message), stopped)
        if key not in self._feedback:
            self._feedback[key] = self._between(message, stopped)
        return self._feedback[key]

    def _between(self, message: Message, stopped: bool) -> list[int]:
        question = Message("user", "x")
        answer = Message("assistant", self._MARK)
        rendered = self._render([question, answer, message], True)
        ids = self._expand(self._ids(rendered.partition(self._MARK)[2]), [message])
        starts_with_stop = bool(ids) and ids[0] in self.stop_token_ids
        if stopped:
            return ids[1:] if starts_with_stop else ids
        return ids if starts_with_stop else [self.stop_token_ids[0], *ids]

    def decode(self, rows: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def _render(self, messages: Sequence[Message], open_answer: bool) -> str:
        if not self.tokenizer.chat_template:
            return "\n".join(m.content for m in messages) + "\n"
        chat = [{"role": m.role, "content": _content(m)} for m in messages]
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=open_answer, tokenize=False)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _sizes(self, message: Message) -> tuple[int, ...]:
        """How many tokens each image of a message takes: with its text that says what its ids are."""
        if message.images and self.vision is None:
            raise UserError(
                "model.path: the task shows pictures, which this model cannot see: it takes a vision-language model (of "
                "type qwen2_vl, qwen2_5_vl, qwen3_vl or mllama)"
            )
        return tuple(self.vision.tokens(image) for image in message.images) if message.images else ()

    def _expand(self, ids: list[int], messages: Sequence[Message]) -> list[int]:
        images = [image for m in messages for image in m.images]
        return self.vision.expand(ids, images) if images else ids


def _content(message: Message) -> Any:
    """A message's content as chat templates want it: plain text, or images and then the text."""
    if not message.images:
        return message.content
    return [{"type": "image"}] * len(message.images) + [{"type": "text", "text": message.content}]


def _template_stops(tokenizer) -> list[int]:
    """End-of-turn tokens that chat templates write and that some tokenizers do not call eos."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[t] for t in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>") if t in vocabulary]


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
) -> list[Sample]:
    """`num_generations` samples of every item, in the order of the items, judged.

    `seed_parts` (run seed, step or purpose) and each sample's prompt id, index and turn give its random stream. Samples of
    one item share a `group_id`, counted from `first_group`.
    `only`: draw these of the `len(items) * num_generations` samples, and no others.
    """
    samples, episodes, numbers = [], [], []
    for g, item in enumerate(items):
        prompt = None
        for number in range(num_generations):
            if only is not None and g * num_generations + number not in only:
                continue
            episode = task.start(item)
            prompt = prompt or encoder.prompt(episode.messages)
            images = tuple(image for m in episode.messages for image in m.images)
            samples.append(Sample(prompt, [], [], [], 0, "stop", item.id, first_group + g, images=images))
            episodes.append(episode)
            numbers.append(number)

    def request(i: int) -> Request:
        s = samples[i]
        seed = sample_seed(*seed_parts, s.prompt_id, numbers[i], len(s.turns))
        return Request(tuple(s.prompt_ids + s.response_ids), seed, max_new_tokens, s.images)

    def reply(i: int, completion: Completion) -> Request | None:
        text = encoder.decode([completion.token_ids])[0]
        last = len(samples[i].turns) + 1 == task.max_turns
        return request(i) if _take_turn(samples[i], episodes[i].step(text), completion, text, encoder, last) else None

    requests = [request(i) for i in range(len(samples))]
    if task.max_turns == 1 and hasattr(task, "step_all"):
        completions = engine.generate(requests, sampling)
        texts = encoder.decode([c.token_ids for c in completions])
        for given in zip(samples, task.step_all(episodes, texts), completions, texts, strict=True):
            _take_turn(*given, encoder, last=True)
        return samples
    converse = getattr(engine, "converse", None) or partial(turn_by_turn, engine)
    converse(requests, sampling, reply)
    return samples


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


def _take_turn(sample: Sample, result: StepResult, completion, text: str, encoder: Encoder, last: bool) -> bool:
    """Appends one completion to its sample, with what the task answered; True when the policy is to go on."""
    n = len(completion.token_ids)
    sample.response_ids += completion.token_ids
    sample.loss_mask += [1] * n
    sample.behavior_logprobs += completion.logprobs
    sample.finish_reason, sample.weight_version = completion.finish_reason, completion.weight_version
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
    sample.response_ids += ids
    sample.loss_mask += [0] * len(ids)
    sample.behavior_logprobs += [0.0] * len(ids)
    sample.images += result.message.images
    sample.text += f"\n[{result.message.content}]\n"
    return True
