"""A place in a list of tokens, and the ways to go on from it."""

from __future__ import annotations

from collections.abc import Sequence

from amft_fast.tasks.math.latex import Token, Unreadable


class Cursor:
    """`at` is the place in `tokens`, of which the reader may cut one into several."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens, self.at = list(tokens), 0

    def peek(self, offset: int = 0) -> Token | None:
        at = self.at + offset
        return self.tokens[at] if at < len(self.tokens) else None

    def next_is(self, *texts: str, kind: str = "sign") -> bool:
        token = self.peek()
        return token is not None and token.kind == kind and token.text in texts

    def take(self) -> Token:
        token = self.peek()
        if token is None:
            raise Unreadable("end")
        self.at += 1
        return token

    def expect(self, text: str, kind: str = "sign") -> None:
        token = self.take()
        if (token.kind, token.text) != (kind, text):
            raise Unreadable(f"{token.text!r} for {text!r}")

    def raw_group(self) -> list[Token]:
        """The tokens of an argument, unread."""
        token = self.take()
        if (token.kind, token.text) != ("sign", "{"):
            return [token]
        depth, begin = 1, self.at
        while depth:
            token = self.take()
            if token.kind == "sign":
                depth += (token.text == "{") - (token.text == "}")
        return self.tokens[begin : self.at - 1]
