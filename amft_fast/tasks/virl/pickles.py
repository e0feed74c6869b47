"""A pickled {(latitude, longitude): panorama id}, read opcode by opcode: no unpickler sees the file.

Even an unpickler that finds no class is not safe: nine bytes make its memo 1.2 GB long, nested tuples overflow the stack when
they are freed, and a tuple of itself twice, and so on, takes 2^n steps to hash. Here a value is a number, a text or a short
tuple of these, so nothing nests; what else a pickle may hold is refused when its opcode is met.
"""

from __future__ import annotations

import io
import pickletools
from typing import Any

MAX_BYTES = 64 << 20
MAX_OPCODES = 8 << 20  # some eight to a place
MAX_STACK = 10_000  # pickle itself writes a dict in pieces of 1000 pairs
MAX_MEMO = 2 << 20
MAX_TUPLE = 8

_SCALARS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
_MARK = object()


def read_pairs(data: bytes) -> list[tuple[Any, Any]]:
    """The (key, value) pairs of a pickled dict of numbers, texts and tuples of these, in order.

    Raises ValueError for anything else, before it is made; for more than MAX_BYTES or MAX_OPCODES; and for bytes that are no
    pickle.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data):,} bytes, more than {MAX_BYTES:,}")
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
        name = opcode.name
        if name in _SCALARS:
            stack.append(argument)
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            if argument not in memo:
                raise ValueError(f"it refers to number {argument} of its memo, which it never wrote")
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            at = len(memo) if argument is None else argument
            if at > count:
                raise ValueError(f"it writes number {at} of its memo after {count} opcodes")
            memo[at] = _top(stack)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(_tuple(_popped(stack, int(name[-1]))))
        elif name == "TUPLE":
            stack.append(_tuple(_since_mark(stack)))
        elif name == "EMPTY_DICT":
            stack.append([])
        elif name == "DICT":
            stack.append(_pairs(_since_mark(stack)))
        elif name == "SETITEM":
            items = _popped(stack, 2)
            _dict(stack).extend(_pairs(items))
        elif name == "SETITEMS":
            items = _since_mark(stack)
            _dict(stack).extend(_pairs(items))
        elif name == "STOP":
            if len(stack) != 1:
                raise ValueError(f"it ends with {len(stack)} values instead of one")
        elif name not in ("PROTO", "FRAME"):
            asked = f" of {str(argument)[:60]!r}" if isinstance(argument, str) else ""
            raise ValueError(f"it holds the opcode {name}{asked}, and not numbers, texts, tuples and one dict alone")
        if len(stack) > MAX_STACK or len(memo) > MAX_MEMO or count > MAX_OPCODES:
            raise ValueError("it is larger than a mapping of a million places")
    return _dict(stack)


def _top(stack: list[Any]) -> Any:
    return _popped(stack[-1:], 1)[0]


def _popped(stack: list[Any], n: int) -> list[Any]:
    """The last n values, taken off."""
    items = stack[-n:]
    if len(items) < n or _MARK in items:
        raise ValueError("it takes more values than it holds")
    del stack[-n:]
    return items


def _since_mark(stack: list[Any]) -> list[Any]:
    """The values after the last mark, taken off with it."""
    for at in range(len(stack) - 1, -1, -1):
        if stack[at] is _MARK:
            items = stack[at + 1 :]
            del stack[at:]
            return items
    raise ValueError("it takes more values than it holds")


def _tuple(items: list[Any]) -> tuple[Any, ...]:
    if len(items) > MAX_TUPLE or not all(isinstance(x, int | float | str) for x in items):
        raise ValueError("it holds a tuple of something else than a few numbers and texts")
    return tuple(items)


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    if len(items) % 2 or any(isinstance(x, list) for x in items):
        raise ValueError("it holds a dict of something else than numbers, texts and tuples")
    return list(zip(items[::2], items[1::2]))


def _dict(stack: list[Any]) -> list[tuple[Any, Any]]:
    if not stack or not isinstance(stack[-1], list):
        raise ValueError("it is not a dict")
    return stack[-1]
