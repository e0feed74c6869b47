"""What a tokenizer's chat template writes: around messages, after an answer, and what it refuses.

Nothing of it is known by name. What ends a turn, whether the system role is taken and what opens a text are found by asking the
template for a conversation with a mark in it.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError

from amft_fast.errors import UserError
from amft_fast.interfaces import Message

_MARK = "\u241fmark\u241f"
_THINKING = re.compile(r"</?think(?:ing)?>|\[/?THINK\]")


class Template:
    """Messages to token ids. `last` is the token that closes an answer where nothing follows, `inner` the one before another
    turn (-1: the template writes none); `stops` are these and what else comes right behind an answer.

    Without a chat template messages are lines, behind what the tokenizer itself puts before a text (BOS). Special tokens come
    from the template alone: in what messages say they are plain text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        self._special = {t.content: t for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._any_special = _one_of(self._special)
        self._any_added = _one_of(added)
        self._thinking = _one_of([t for t in self._special if _THINKING.fullmatch(t)])
        self._splitter, self._lock = None, threading.Lock()
        self._opening = [] if tokenizer.chat_template else self._opened_by_itself()
        self._folds = self._tool_is_user = False
        self._folds = bool(tokenizer.chat_template) and not self._takes_system()
        self._tool_is_user = bool(tokenizer.chat_template) and not self._takes_tool()
        asked, answer = Message("user", "x"), Message("assistant", _MARK)
        self.last = self.inner = -1
        if tokenizer.chat_template:
            opener = self._render([Message("user", _MARK)], False).partition(_MARK)[0]
            self.last = added.get(self._end(self._render([asked, answer], False)), -1)
            inner = self._end(self._render([asked, answer, asked], True))
            # What opens the next turn ends this one where nothing else does: a place to stop, but no end to imitate.
            self.stops = [i for i in (self.last, added.get(inner, -1)) if i >= 0]
            self.inner = -1 if inner in opener else added.get(inner, -1)
            self.last = self.inner if self.last < 0 else self.last
        else:
            self.stops = []

    def _opened_by_itself(self) -> list[int]:
        """The token ids that the tokenizer puts before any text."""
        bare, whole = (self.tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True))
        return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])

    def _takes_system(self) -> bool:
        """Whether a system message is neither refused nor dropped."""
        try:
            return _MARK in self._apply([Message("system", _MARK), Message("user", "x")], True)
        except _REFUSALS:
            return False

    def _takes_tool(self) -> bool:
        """Whether what a call gave may follow an answer as it is, and is neither refused nor dropped."""
        try:
            talk = [Message("user", "x"), Message("assistant", "y"), Message("tool", _MARK)]
            return _MARK in self._apply(talk, True)
        except _REFUSALS:
            return False

    def _end(self, rendered: str) -> str:
        """The added token that the template writes right after an answer; empty where it writes something else."""
        found = self._any_added.match(rendered.partition(_MARK)[2].lstrip())
        return found[0] if found else ""

    # ------------------------------------------------------------------------------------------------------ to text, to ids

    def ids(self, messages: Sequence[Message], after: str = "") -> list[int]:
        """Token ids of a conversation, ready for the next answer; only of what stands behind the text `after`, if given.

        Raises UserError for a conversation that the template refuses.
        """
        # A mark stands for each text that holds a special token, and is read as what it stands for, plainly.
        marks = {f"\u241f{i}\u241f": m.content for i, m in enumerate(messages) if self._any_special.search(m.content)}
        held = (f"\u241f{i}\u241f" for i in range(len(messages)))
        marked = [replace(m, content=mark) if mark in marks else m for m, mark in zip(messages, held)]
        text = self._render(marked, True)
        text = text.partition(after)[2] if after else text
        opening = [] if after else self._opening
        return opening + (self._pieces(text, marks) if marks else self._encoded(text))

    def _pieces(self, text: str, marks: dict[str, str]) -> list[int]:
        """Token ids of a rendered text in which marks stand for plain ones."""
        out: list[int] = []
        plain, strip = "", False
        for piece in re.split(f"({'|'.join([*map(re.escape, marks), self._any_special.pattern])})", text):
            token = self._special.get(piece)
            if token is None:
                written = marks.get(piece, piece.lstrip() if strip else piece)
                plain, strip = plain + written, strip and not written
                continue
            out += self.plain(plain.rstrip() if token.lstrip else plain)
            out.append(self.tokenizer.convert_tokens_to_ids(piece))
            plain, strip = "", token.rstrip
        return out + self.plain(plain)

    def plain(self, text: str, thinking: bool = False) -> list[int]:
        """Token ids of a text in which nothing is a special token (but the tags of thinking, if `thinking`)."""
        if not self._any_special.search(text):
            return self._encoded(text)
        out: list[int] = []
        for piece in re.split(f"({self._thinking.pattern})", text) if thinking else [text]:
            if thinking and self._thinking.fullmatch(piece):
                out.append(self.tokenizer.convert_tokens_to_ids(piece))
            elif piece:
                out += self._apart(piece)
        return out

    def _apart(self, text: str) -> list[int]:
        ids = self._split(text)
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        if special.isdisjoint(ids) or special & set(ids) <= {self.tokenizer.unk_token_id}:
            return ids
        # A vocabulary of words holds the token as a word, too: then it is taken apart.
        apart = self._any_special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return self._split(apart)

    def _split(self, text: str) -> list[int]:
        """By a tokenizer of its own: splitting is a state of the tokenizer, and other threads encode at the same time."""
        with self._lock:
            if self._splitter is None:
                self._splitter = copy.deepcopy(self.tokenizer)
        return self._splitter(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _encoded(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _render(self, messages: Sequence[Message], open_answer: bool) -> str:
        tools = [tool for m in messages for tool in m.tools]
        if not self.tokenizer.chat_template:
            if tools:
                raise UserError(
                    "model.path: the task offers tools, and the tokenizer has no chat template to say them with"
                )
            return "\n".join(m.content for m in messages) + "\n"
        if self._tool_is_user:
            messages = [replace(m, role="user") if m.role == "tool" else m for m in messages]
        try:
            text = self._apply(_folded(messages) if self._folds else messages, open_answer, tools)
        except _REFUSALS as e:
            roles = ", ".join(m.role for m in messages)
            said = (str(e).splitlines() or [type(e).__name__])[0][:200]
            raise UserError(f"model.path: the chat template refuses a conversation of {roles}: {said}") from None
        unsaid = [name for tool in tools if (name := str(tool.get("function", tool).get("name"))) not in text]
        if unsaid:
            raise UserError(
                f"model.path: the task offers the tool {unsaid[0]!r}, which the model's chat template leaves out"
            )
        return text

    def _apply(self, messages: Sequence[Message], open_answer: bool, tools: Sequence[dict[str, Any]] = ()) -> str:
        chat = [{"role": m.role, "content": _content(m)} for m in messages]
        offered = {"tools": list(tools)} if tools else {}
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=open_answer, tokenize=False, **offered)


_REFUSALS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)


def _one_of(texts: Any) -> re.Pattern[str]:
    """A pattern of these texts, longer ones first; of none it finds nothing."""
    ordered = sorted((text for text in texts if text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")


def _folded(messages: Sequence[Message]) -> list[Message]:
    """Without system messages: what they say opens the user's first turn."""
    said = [m.content for m in messages if m.role == "system"]
    out = [m for m in messages if m.role != "system"]
    at = next((i for i, m in enumerate(out) if m.role == "user"), None)
    if said and at is not None:
        out[at] = replace(out[at], content="\n\n".join([*said, out[at].content]))
    return out


def _content(message: Message) -> Any:
    """A message's content as chat templates want it: plain text, or images and then the text."""
    if not message.images:
        return message.content
    return [{"type": "image"}] * len(message.images) + [{"type": "text", "text": message.content}]
