"""`amft-fast data CONFIG`: what the model will read, token by token, and what of the data is not used; loads no model.

Tokens take turns in shade, so that each can be told from its neighbours: blue ones are the prompt's, yellow ones the chat
template's special tokens, green ones those that are imitated. Without colour a bar stands between tokens.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from amft_fast.config import Config
from amft_fast.data.stream import choose
from amft_fast.errors import UserError
from amft_fast.interfaces import Task
from amft_fast.rollout.context import check_prompts, check_setting, prompt_that_fits
from amft_fast.rollout.encoder import Encoder, load_encoder
from amft_fast.run.build import make_task

LOOKED_AT = 1000  # prompts and demonstrations whose lengths are taken
HEAD, TAIL = 400, 200  # tokens shown of a longer text
# Two shades each (256-colour backgrounds, dark text).
SHADES = {"prompt": (153, 117), "special": (229, 221), "imitated": (157, 120)}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def preview(cfg: Config, split: str, examples: int, color: bool) -> Iterator[str]:
    """The lines of `amft-fast data`. Raises UserError for what a run would refuse too."""
    encoder = load_encoder(cfg.model)
    check_setting(encoder.context, cfg.rollout.max_new_tokens)
    task = make_task(cfg.task)
    if split not in task.splits:
        raise UserError(f"--split: {split!r} is not a split of this task, which has {', '.join(task.splits)}")
    if hasattr(task, "prepare"):
        yield from task.prepare(encoder, cfg.rollout.max_new_tokens)
    yield from check_prompts(encoder, task, task.splits, cfg.rollout.max_new_tokens)
    yield f"{'tokens':<12}{'number':>10}{'shortest':>10}{'median':>10}{'95 %':>10}{'longest':>10}"
    for name in task.splits:
        yield from _lengths(name, encoder, task)
    painted = Painter(encoder, color)
    prompts, demos = task.prompts(split), task.demos(split)
    for i, item in enumerate(prompts[: min(examples, len(prompts))], 1):
        ids = prompt_that_fits(encoder, task.start(item).messages, item.id)
        yield f"\n--- prompt {i} of {len(prompts):,} in {split}: {item.id}, {len(ids)} tokens"
        yield painted.text(ids, [0] * len(ids))
        if hasattr(task, "gold"):
            yield f"gold: {_visible(task.gold(item))}"
    for i, demo in enumerate(demos[: min(examples, len(demos))], 1):
        prompt, response, mask, _ = encoder.demo(demo)
        counts = f"{len(prompt)} + {len(response)} tokens, {sum(mask)} of them imitated"
        yield f"\n--- demonstration {i} of {len(demos):,} in {split}: {demo.id}, {counts}"
        yield painted.text(prompt + response, [0] * len(prompt) + mask)
    if not demos:
        yield f"\n{split} has no demonstrations"


def _lengths(split: str, encoder: Encoder, task: Task) -> Iterator[str]:
    """How long the prompts and demonstrations of a split are, of at most LOOKED_AT."""
    prompts, demos = task.prompts(split), task.demos(split)
    yield _row(split, prompts, lambda item: len(encoder.prompt(task.start(item).messages)))
    if len(demos):
        yield _row("  answers", demos, lambda demo: len(encoder.demo(demo)[1]))


def _row(name: str, items: Sequence[Any], length: Callable[[Any], int]) -> str:
    lengths = sorted(length(item) for item in choose(items, LOOKED_AT))
    if not lengths:
        return f"{name:<12}{0:>10}"
    figures = (lengths[0], statistics.median_high(lengths), lengths[int(0.95 * (len(lengths) - 1))], lengths[-1])
    of = f"   of {len(lengths):,} looked at" if len(lengths) < len(items) else ""
    return f"{name:<12}{len(items):>10,}" + "".join(f"{n:>10,}" for n in figures) + of


class Painter:
    """Texts as the tokens that they are made of."""

    def __init__(self, encoder: Encoder, color: bool) -> None:
        self.tokenizer, self.color = encoder.tokenizer, color
        self.special = set(encoder.tokenizer.all_special_ids) | set(encoder.stop_token_ids)

    def text(self, ids: Sequence[int], imitated: Sequence[int]) -> str:
        """All tokens, the middle of a long text left out."""
        parts = list(pieces(self.tokenizer, ids))
        kinds = ["imitated" if imitated[at] else "special" if ids[at] in self.special else "prompt" for at, _ in parts]
        shown = [self._paint(text, kind, i % 2) for i, ((_, text), kind) in enumerate(zip(parts, kinds))]
        if len(shown) > HEAD + TAIL:
            shown[HEAD:-TAIL] = [f" [... {len(shown) - HEAD - TAIL} tokens ...] "]
        return ("" if self.color else "|").join(shown)

    def _paint(self, text: str, kind: str, shade: int) -> str:
        text = _visible(text)
        if not self.color:
            return text
        # A background that runs to the end of the line would paint the whole of it.
        lines = [f"\x1b[30;48;5;{SHADES[kind][shade]}m{line}\x1b[0m" if line else "" for line in text.split("\n")]
        return "\n".join(lines)


def pieces(tokenizer: Any, ids: Sequence[int]) -> Iterator[tuple[int, str]]:
    """(place of the first token, text) of each token, or of a few that make one character together."""
    done = 0
    for end in range(1, len(ids) + 1):
        # With tokens before it, which decide on spaces, and which a first token has none of.
        start = max(done - 4, 0)
        before, text = (tokenizer.decode(ids[start:to], clean_up_tokenization_spaces=False) for to in (done, end))
        if text.endswith("\ufffd") and end < len(ids) and end - done < 8:
            continue
        yield done, text[len(before) :]
        done = end


def _visible(text: str) -> str:
    """Text with its line ends marked, and control characters (which a terminal would obey) as pictures of them."""
    text = _CONTROL.sub(lambda m: chr(0x2400 + ord(m[0])) if ord(m[0]) < 32 else "\ufffd", text.replace("\r\n", "\n"))
    return text.replace("\n", "↵\n")
