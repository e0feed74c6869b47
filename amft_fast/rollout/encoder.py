"""Messages to token ids: the tokenizer's chat template, or plain text where it has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amft_fast.errors import UserError
from amft_fast.interfaces import Demo, Message
from amft_fast.model.vision import Vision


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
