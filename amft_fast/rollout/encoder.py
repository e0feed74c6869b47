"""Messages to token ids: the tokenizer's chat template, or plain text where it has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amft_fast.config import ModelConfig
from amft_fast.errors import UserError
from amft_fast.interfaces import Demo, Message
from amft_fast.model.base import generation_stops, longest_context
from amft_fast.model.policy import load_tokenizer
from amft_fast.model.vision import Vision, load_vision
from amft_fast.rollout.template import Template


def load_encoder(cfg: ModelConfig, vision: bool = True) -> Encoder:
    """The encoder of a checkpoint, with its pictures unless `vision` is false. Raises UserError for what it lacks."""
    tokenizer = load_tokenizer(cfg)
    eyes = load_vision(cfg, tokenizer.pad_token_id or 0) if vision else None
    return Encoder(tokenizer, eyes, stops=generation_stops(cfg.path, tokenizer), context=longest_context(cfg))


class Encoder:
    """Turns messages into token ids by the tokenizer's chat template (or plain text where it has none), with a cache.

    `vision` (see vision.py) makes the places of images; without it a message that holds one is refused. `stops` are token ids
    that end an answer beside the template's own and eos; `context` is the most tokens that the model can hold (None: unknown).
    `stop_token_ids` holds all that end an answer, the one that demonstrations end in first. Raises UserError if there is none.
    """

    _MARK = "\u241fanswer\u241f"

    def __init__(
        self, tokenizer, vision: Vision | None = None, *, stops: Sequence[int] = (), context: int | None = None
    ) -> None:
        self.tokenizer, self.vision, self.context = tokenizer, vision, context
        self.template = Template(tokenizer)
        self._prompts: dict[tuple[tuple[Any, ...], ...], list[int]] = {}
        self._feedback: dict[tuple[Any, ...], list[int]] = {}
        ends = [self.template.last, tokenizer.eos_token_id, *self.template.stops, *stops]
        ends += vision.stop_token_ids if vision else ()
        self.stop_token_ids = tuple(dict.fromkeys(i for i in ends if i is not None and i >= 0))
        if not self.stop_token_ids:
            raise UserError(
                "model.path: the tokenizer has no eos token and its chat template writes none, so no answer could end: set "
                "eos_token in tokenizer_config.json"
            )
        written = (tokenizer.convert_ids_to_tokens(i) for i in self.stop_token_ids)
        self._ends = tuple(text for text in written if text)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a prompt, ready for the policy's answer. Callers must not change the list."""
        key = tuple((m.role, m.content, self._sizes(m), repr(m.tools)) for m in messages)
        if key not in self._prompts:
            self._prompts[key] = self._expand(self.template.ids(messages), messages)
        return self._prompts[key]

    def response(self, text: str, last: bool = True) -> list[int]:
        """Token ids of a demonstration's answer, with the token that ends it, once; before another turn unless `last`."""
        while (bare := text.rstrip()).endswith(self._ends):
            text = bare[: -max(len(end) for end in self._ends if bare.endswith(end))]
        inner = self.template.inner
        return [*self.template.plain(text, thinking=True), self.stop_token_ids[0] if last or inner < 0 else inner]

    def demo(self, demo: Demo) -> tuple[list[int], list[int], list[int], tuple[Any, ...]]:
        """(prompt ids, response ids, loss mask of the response, images) of a demonstration: its answers are imitated, what
        is said to the policy between them is not.

        Raises UserError for one that is longer than the model's context.
        """
        ids = self.response(demo.response, last=not demo.more)
        mask = [1] * len(ids)
        for i, (message, answer) in enumerate(demo.more, 1):
            said, answered = self.feedback(message, stopped=True), self.response(answer, last=i == len(demo.more))
            ids += said + answered
            mask += [0] * len(said) + [1] * len(answered)
        images = [image for m in (*demo.messages, *(said for said, _ in demo.more)) for image in m.images]
        prompt = self.prompt(demo.messages)
        if self.context is not None and len(prompt) + len(ids) > self.context:
            raise UserError(
                f"the demonstration {demo.id} takes {len(prompt)} + {len(ids)} tokens, and the model's context is "
                f"{self.context}: leave it out, or raise model.max_position_embeddings where the model allows it"
            )
        return prompt, ids, mask, tuple(images)

    def feedback(self, message: Message, stopped: bool) -> list[int]:
        """Token ids between the policy's answer and its next one: the end of its turn unless it `stopped` itself, the
        verifier's message, the opening of the next answer. Callers must not change the list."""
        key = (message.role, message.content, self._sizes(message), stopped)
        if key not in self._feedback:
            self._feedback[key] = self._between(message, stopped)
        return self._feedback[key]

    def _between(self, message: Message, stopped: bool) -> list[int]:
        talk = [Message("user", "x"), Message("assistant", self._MARK), message]
        ids = self._expand(self.template.ids(talk, after=self._MARK), [message])
        end = next((i for i, token in enumerate(ids) if token in self.stop_token_ids), len(ids))
        closed = end < len(ids) and not self.tokenizer.decode(ids[:end]).strip()  # some templates put a space before it
        if stopped:
            return ids[end + 1 :] if closed else ids
        return ids if closed else [self.stop_token_ids[0], *ids]

    def room(self, prompt: Sequence[int], wanted: int) -> int:
        """How many of `wanted` tokens the model's context leaves behind a prompt."""
        return wanted if self.context is None else min(wanted, self.context - len(prompt))

    def decode(self, rows: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

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
