"""A strict reader of mathematical expressions: from the tokens of latex.py to a tree, or Unreadable.

Strict means that whatever is not understood ends the reading; nothing is skipped. What can be read in two ways (`1/ab`, `x^10`
without braces, `--5`) is not read at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from amft_fast.tasks.math.cursor import Cursor
from amft_fast.tasks.math.latex import FUNCTIONS, Token, Unreadable
from amft_fast.tasks.math.signs import names
from amft_fast.tasks.math.tree import Node, number_value, symbols
from amft_fast.tasks.math.units import LONE_LETTERS, is_unit_word

MAX_DEPTH = 40
"""Brackets in brackets that are read."""
MAX_FACTORS = 200
"""Factors of one expression that are read."""

_GREEK = set(
    names(
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
        "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega hbar ell mho odot nabla partial square bullet star aleph"
    )
)
_MARKS = set(
    names("overline bar hat vec tilde dot ddot overrightarrow overleftarrow widetilde mathcal mathbb mathfrak")
)
_CALLED = set("fghFGH")
"""Letters that before a bracket are functions; others are factors."""
_STARTS = set(names("frac sqrt binom infty lfloor lceil sum prod pi")) | _GREEK | _MARKS | FUNCTIONS
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot"}
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_WORDS = set(
    names("a an and are as at be but by for from has if in is it no nor not of off on only or so than the to up we yes")
)
"""English words that are no products of letters."""


class Parser(Cursor):
    """Reads an expression from `tokens`, as far as it goes; `at` is where it ended.

    `lenient` takes an exponent of several digits without braces as meant, as the writers of gold answers do.
    """

    def __init__(self, tokens: Sequence[Token], lenient: bool = False) -> None:
        super().__init__(tokens)
        self.lenient = lenient
        self.depth = self.bars = self.factors = 0

    # ---------------------------------------------------------------------------------------------- sums and products

    def expression(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        negative = self.next_is("-")
        if self.next_is("+", "-"):
            self.at += 1
        left = self.term()
        if negative:
            left = ("neg", left)
        while self.next_is("+", "-"):
            minus = self.take().text == "-"
            right = self.term()
            left = ("add", left, ("neg", right) if minus else right)
        self.depth -= 1
        return left

    def term(self) -> Node:
        left = self.factor()
        over = False  # whether a denominator other than a plain number has just been read
        while True:
            if self.next_is("*", "/") or self.next_is("times", kind="cmd"):
                sign = self.take().text
                slash = sign == "/"
                negative = self.next_is("-")
                self.at += negative
                right = self.factor()
                if sign == "times" and any(name.startswith(("vec ", "bold ")) for name in symbols(right)):
                    raise Unreadable("cross product")
                left = ("div" if slash else "mul", left, ("neg", right) if negative else right)
                over = slash and right[0] != "num"
            elif self.begins_factor():
                before = self.at, self.depth, self.bars, list(self.tokens)
                try:
                    right = self.factor()
                except Unreadable:
                    self.at, self.depth, self.bars, self.tokens = before
                    return left
                if over:
                    raise Unreadable("1/ab")
                left = ("mul", left, right)
            else:
                return left

    def begins_factor(self) -> bool:
        """Whether what comes next may be a factor without a sign of multiplication before it."""
        token = self.peek()
        if token is None:
            return False
        if token.kind == "roman" and self.depth == 1 and token.text in LONE_LETTERS:
            return False  # a unit
        if token.kind in ("letter", "bold", "roman"):
            return True
        if token.kind == "word":
            return self.is_product(token)
        if token.kind == "num":  # n 2^n
            after, before = self.peek(1), self.tokens[self.at - 1]
            return token.space and before.kind != "num" and after is not None and after.text == "^"
        if token.kind == "cmd":
            return token.text in _STARTS and not self.is_unit_sign(token)
        if token.kind != "sign":
            return False
        if token.text == "(" and self.depth == 1:  # 5 (cm)
            inside = self.peek(1)
            if inside is not None and inside.kind in ("word", "text") and is_unit_word(inside.text):
                return False
        return token.text in "([{" or (token.text == "|" and not self.bars)

    def is_unit_sign(self, token: Token) -> bool:
        """`5\\,\\Omega` at the end, and the `\\mu` of `\\mu\\text{m}`."""
        after = self.peek(1)
        if self.depth > 1 or not self.at:
            return False
        if token.text == "Omega":
            return after is None and token.space
        return token.text == "mu" and after is not None and after.kind in ("text", "roman")

    def is_product(self, token: Token) -> bool:
        """Whether letters in a row are a product: no known unit at the end of an answer, no word."""
        word = token.text
        if len(word) > 4 or word.lower() in _WORDS:
            return False
        if not self.at or (self.depth > 1 and self.at < len(self.tokens) - 1):
            return True
        rest = self.tokens[self.at :]
        if token.space and len(rest) > 1 and all(t.kind in ("word", "text") for t in rest):
            return False  # 5 red marbles
        return not is_unit_word(word, glued=not token.space)

    # -------------------------------------------------------------------------------------------------------- factors

    def factor(self) -> Node:
        self.factors += 1
        if self.factors > MAX_FACTORS:
            raise Unreadable("too long")
        base = self.atom()
        while True:
            if self.next_is("!"):
                count = 0
                while self.next_is("!"):
                    self.at, count = self.at + 1, count + 1
                if count > 2:
                    raise Unreadable("!!!")
                base = ("fact" if count == 1 else "fact2", base)
            elif self.next_is("^"):
                self.at += 1
                base = ("pow", base, self.script())
                if self.next_is("^"):
                    raise Unreadable("x^a^b")
            elif self.next_is("degree", kind="cmd") and self.depth > 1:
                self.at += 1
                base = ("mul", base, ("div", ("const", "pi"), ("num", Fraction(180))))
            else:
                return base

    def script(self) -> Node:
        """An exponent: a group, or one sign."""
        token = self.peek()
        if token is None:
            raise Unreadable("end")
        if token.kind == "sign" and token.text in "({":
            return self.bracket()
        if token.kind == "sign" and token.text == "-":
            self.at += 1
            return ("neg", self.script())
        if token.kind == "num":
            if len(token.text) > 1 and not self.lenient:
                raise Unreadable("x^10")
            self.at += 1
            return ("num", number_value(token.text))
        if token.kind == "letter" or (token.kind == "cmd" and token.text in _GREEK | {"pi", "frac", "sqrt", "infty"}):
            return self.atom(script=True)
        raise Unreadable(f"exponent {token.text!r}")

    def bracket(self) -> Node:
        close = _CLOSING[self.take().text]
        bars, self.bars = self.bars, 0
        node = self.expression()
        self.expect(close)
        self.bars = bars
        return node

    def group(self) -> Node:
        """An argument of a TeX command: braces, or one sign."""
        token = self.peek()
        if token is not None and token.kind == "sign" and token.text == "{":
            return self.bracket()
        if token is not None and token.kind == "num" and token.text.isdigit():
            self.tokens[self.at : self.at + 1] = [Token("num", c, False) for c in token.text]
            return ("num", Fraction(int(self.take().text)))
        if token is not None and token.kind in ("letter", "cmd", "roman"):
            return self.atom(script=True)
        raise Unreadable("argument")

    # ---------------------------------------------------------------------------------------------------------- atoms

    def atom(self, script: bool = False) -> Node:
        token = self.take()
        if token.kind == "num":
            return self.mixed(number_value(token.text), token.text.isdigit())
        if token.kind == "word":
            self.at -= 1
            if not self.is_product(token):
                raise Unreadable(token.text)
            self.tokens[self.at : self.at + 1] = [Token("letter", c, False) for c in token.text]
            return self.atom(script)
        if token.kind in ("letter", "bold", "roman"):
            return self.symbol(token.text if token.kind != "bold" else f"bold {token.text}", script)
        if token.kind == "sign":
            return self.signed(token)
        if token.kind == "cmd":
            return self.command(token.text, script)
        raise Unreadable(token.text)

    def signed(self, token: Token) -> Node:
        if token.text in _CLOSING:
            self.at -= 1
            return self.bracket()
        if token.text == "|":
            self.bars += 1
            node = self.expression()
            self.expect("|")
            self.bars -= 1
            return ("fn", "abs", (node,))
        raise Unreadable(token.text)

    def mixed(self, value: Fraction, whole: bool) -> Node:
        """A number, with the proper fraction that stands right behind it: `2\\frac13`, `2 1/3`."""
        one, two, three = (self.peek(i) for i in range(3))
        if whole and one is not None:
            if one.kind == "cmd" and one.text == "frac":
                before, tokens = self.at, list(self.tokens)
                self.at += 1
                try:
                    top, bottom = self.group(), self.group()
                except Unreadable:
                    top = bottom = ("none",)
                if top[0] == bottom[0] == "num" and bottom[1] != 0:
                    if top[1] >= bottom[1]:
                        raise Unreadable("mixed number")
                    return ("num", value + top[1] / bottom[1])
                self.at, self.tokens = before, tokens
            elif one.kind == "num" and one.space and two is not None and two.text == "/" and three is not None:
                if not (one.text.isdigit() and three.text.isdigit() and 0 < int(one.text) < int(three.text)):
                    raise Unreadable("mixed number")
                self.at += 3
                return ("num", value + Fraction(int(one.text), int(three.text)))
        return ("num", value)

    def symbol(self, name: str, script: bool = False) -> Node:
        """A letter with its index and primes; f(x), g'(2) as calls of unknown functions."""
        plain = name
        if not script:
            name = self.primes(name)
            if self.next_is("_"):
                self.at += 1
                name += "_" + "".join(t.text for t in self.raw_group())
                name = self.primes(name)
        if name == "e" or name == "i":
            return ("const", name)
        if not script and self.next_is("(") and (plain in _CALLED or self.one_in_brackets()):
            return ("call", name, self.arguments())
        if not script and plain in _CALLED and self.next_is("^"):
            ahead = "".join(t.text for t in self.tokens[self.at : self.at + 6])
            if ahead.startswith("^{-1}("):
                self.at += 5
                return ("call", name + "^-1", self.arguments())
        return ("sym", name)

    def one_in_brackets(self) -> bool:
        """Whether a number or a letter alone in brackets comes next: I(0) and x(t) are no products."""
        inside, close = self.peek(1), self.peek(2)
        return inside is not None and close is not None and close.text == ")" and inside.kind in ("num", "letter")

    def primes(self, name: str) -> str:
        token = self.peek()
        if token is not None and token.kind == "sign" and token.text.startswith("'"):
            self.at += 1
            return name + token.text
        ahead = [t.text for t in self.tokens[self.at : self.at + 4]]
        if len(ahead) > 2 and ahead[0] == "^" and ahead[1].startswith("'"):
            self.at += 2
            return name + ahead[1]
        if len(ahead) > 3 and ahead[:2] == ["^", "{"] and ahead[2].startswith("'") and ahead[3] == "}":
            self.at += 4
            return name + ahead[2]
        return name

    def arguments(self) -> tuple[Node, ...]:
        close = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}[self.take().text]
        args = [self.expression()]
        while self.next_is(","):
            self.at += 1
            args.append(self.expression())
        self.expect(close)
        return tuple(args)

    def command(self, name: str, script: bool) -> Node:
        if name == "pi":
            return ("const", "pi") if not self.next_is("_") else self.symbol("pi")
        if name == "infty":
            return ("const", "inf")
        if name in _GREEK:
            return self.symbol(name, script)
        if name in _MARKS:
            return self.symbol(f"{name} " + "".join(t.text for t in self.raw_group()), script)
        if name == "frac":
            return self.fraction()
        if name == "binom":
            return ("binom", self.group(), self.group())
        if name == "sqrt":
            return self.root()
        if name in ("lfloor", "lceil"):
            node = self.expression()
            self.expect("r" + name[1:], "cmd")
            return ("fn", "floor" if name == "lfloor" else "ceil", (node,))
        if name in ("sum", "prod"):
            return self.series(name)
        if name in FUNCTIONS:
            return self.function(name)
        raise Unreadable(name)

    def fraction(self) -> Node:
        before = self.at
        if self.next_is("{"):
            top = self.raw_group()
            if self.next_is("{"):
                bottom = self.raw_group()
                if _differential(top) and _differential(bottom) and len(bottom) > (bottom[0].kind != "word"):
                    return ("sym", "D " + "".join(t.text for t in [*top, Token("sign", "/", False), *bottom]))
            self.at = before
        return ("div", self.group(), self.group())

    def root(self) -> Node:
        degree: Node = ("num", Fraction(2))
        if self.next_is("["):
            degree = self.bracket()
        token = self.peek()
        if token is not None and token.kind == "sign" and token.text == "(":
            return ("root", degree, self.bracket())
        if token is not None and token.kind == "num" and len(token.text) > 1 and not self.lenient:
            raise Unreadable("\\sqrt12")
        if token is not None and token.kind == "num" and self.lenient:
            self.at += 1
            return ("root", degree, ("num", number_value(token.text)))
        return ("root", degree, self.group())

    def series(self, name: str) -> Node:
        """`\\sum_{k=1}^{n} body`: the body is a product."""
        self.expect("_")
        low = Parser(self.raw_group(), self.lenient)
        variable = low.take()
        low.expect("=")
        start = low.whole()
        self.expect("^")
        end = self.script()
        if variable.kind != "letter":
            raise Unreadable(name)
        return (name, variable.text, start, end, self.term())

    def function(self, name: str) -> Node:
        base = power = None
        for _ in range(2):
            if self.next_is("_") and name == "log" and base is None:
                self.at += 1
                token = self.peek()
                if token is not None and token.kind == "num" and len(token.text) > 1 and not self.lenient:
                    raise Unreadable("\\log_29")
                base = self.group() if not self.next_is("(") else self.bracket()
            elif self.next_is("^") and power is None:
                self.at += 1
                power = self.script()
        if power == ("neg", ("num", Fraction(1))):
            if name not in _INVERSE:
                raise Unreadable(f"{name}^-1")
            name, power = _INVERSE[name], None
        token = self.peek()
        if token is not None and token.kind == "sign" and token.text in ("(", "[", "{", "\\{"):
            self.depth += 1
            args = self.arguments()
            self.depth -= 1
            if self.next_is("^"):
                raise Unreadable("sin(x)^2")
        else:
            args = (self.bare_argument(),)
        node: Node = ("fn", name, (args + (base,)) if base is not None else args)
        return node if power is None else ("pow", node, power)

    def bare_argument(self) -> Node:
        """What `\\sin` without brackets takes: factors up to a sign or the next function."""
        self.depth += 1
        node = self.factor()
        while True:
            token = self.peek()
            bare = token is not None and (token.kind in ("letter", "word") or (token.kind, token.text) == ("cmd", "pi"))
            greek = token is not None and token.kind == "cmd" and token.text in _GREEK
            if not (bare or greek) or not self.begins_factor():
                break
            node = ("mul", node, self.factor())
        self.depth -= 1
        return node

    def whole(self) -> Node:
        """The expression that all of the tokens are."""
        node = self.expression()
        if self.at != len(self.tokens):
            raise Unreadable(self.tokens[self.at].text)
        return node


def _differential(tokens: Sequence[Token]) -> bool:
    """Whether a side of a fraction is that of a derivative: dy, d, d^2 y, \\partial f."""
    if not tokens:
        return False
    first = tokens[0]
    if first.kind == "cmd":
        return first.text == "partial"
    if first.kind == "word":
        return len(first.text) == 2 and first.text[0] == "d"
    more = len(tokens) == 1 or tokens[1].kind in ("letter", "cmd") or tokens[1].text == "^"
    return first.kind in ("letter", "roman") and first.text == "d" and more
