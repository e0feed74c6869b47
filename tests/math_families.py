"""Families of answers: from a random gold, responses that mean the same and responses that do not.

A family is a function of a random generator that returns (gold, [right answers], [wrong answers]); all answers go into a box
unless they are sentences (with a space at their begin).
"""

import random
from fractions import Fraction
from math import gcd


def _wrap(rng: random.Random, text: str) -> str:
    """The same answer with something around it that means nothing."""
    forms = (
        "{}",
        " {} ",
        "${}$",
        "\\displaystyle {}",
        "{{{}}}",
        "{}.",
        "\\,{}\\,",
        "\\left.{}\\right.",
        "\\color{{red}}{{{}}}",
    )
    return rng.choice(forms).format(text)


def integer(rng):
    n = rng.choice([rng.randint(-20, 20), rng.randint(-(10**6), 10**6), rng.randint(1, 10**12)])
    grouped = f"{n:,}"
    right = [_wrap(rng, str(n)), f"{n}.0", f"x = {n}", f"{n + 3} - 3", f" The answer is {n}.", f" So we get\n**{n}**"]
    right += [
        grouped,
        grouped.replace(",", "{,}"),
        grouped.replace(",", "\\,"),
        grouped.replace(",", ",\\!"),
        f"{n}\\text{{ ways}}",
    ]
    wrong = [
        str(n + 1),
        f"{n}1",
        f"{n}.5",
        f"x + y = {n}",
        f"{n}\\text{{ or }}{n + 1}",
        f"{n}, {n + 2}",
        f"x > {n}",
        f"{n}!!!",
        f"{n}x",
    ]
    wrong += [
        f"{n + 1} = {n}",
        f"{n}\\pm 1",
        f"{n}_7",
        f"{n}\\ldots",
        f" The answer is not {n}.",
        f"{n} million",
        f"{n + 1}",
    ]
    if n:
        wrong += [f"-({n})", f"{n}\\text{{ squared}}" if abs(n) != 1 else "2", f"{2 * n} / 3"]
    return str(n), right, wrong


def fraction(rng):
    a, b = rng.randint(1, 400), rng.randint(2, 400)
    b = b if a % b else b + a + 1
    g = gcd(a, b)
    k = rng.randint(2, 9)
    right = [
        f"{a}/{b}",
        f"\\dfrac{{{a}}}{{{b}}}",
        f"\\frac{{{a * k}}}{{{b * k}}}",
        f"\\frac{{-{a}}}{{-{b}}}",
        f"({a})/({b})",
    ]
    right += [
        f"{a // g}\\div {b // g}",
        f"\\frac{{{a}}}{{{b}}} = \\frac{{{a // g}}}{{{b // g}}}",
        f" The answer is ${a}/{b}$.",
    ]
    wrong = [
        f"\\frac{{{b}}}{{{a}}}" if a != b else "7",
        f"-\\frac{{{a}}}{{{b}}}",
        f"\\frac{{{a}}}{{{b + 1}}}",
        f"\\frac{{{a + 1}}}{{{b}}}",
    ]
    wrong += [f"{a}", f"({a}, {b})", f"{a}:{b}x", f"\\frac{{{a}}}{{{b}}} x", f"{a}{b}", f"\\binom{{{a + b}}}{{1}}"]
    return f"\\frac{{{a}}}{{{b}}}", right, wrong


def decimal(rng):
    places = rng.randint(1, 5)
    n = rng.randint(1, 10**6) * 10 + rng.randint(1, 9)
    text = f"{n // 10**places}.{n % 10**places:0{places}d}"
    value = Fraction(n, 10**places)
    right = [
        text + "0",
        text + "00",
        f"\\frac{{{value.numerator}}}{{{value.denominator}}}",
        f"{n} \\times 10^{{-{places}}}",
    ]
    right += [f"{n}e-{places}", f" Hence it is {text}.", f"+{text}"]
    wrong = [
        f"{n}",
        f"{n // 10**places}",
        text + "1" if len(text.replace(".", "")) < 6 else "1",
        f"{n} \\times 10^{{-{places + 1}}}",
    ]
    wrong += [f"-{text}", text[:-1] + str((int(text[-1]) + 1) % 10), text.replace(".", ", "), text.replace(".", ":")]
    return text, right, wrong


def mixed(rng):
    whole, b = rng.randint(1, 30), rng.randint(2, 12)
    a = rng.randint(1, b - 1)
    top = whole * b + a
    right = [
        f"{whole} {a}/{b}",
        f"\\frac{{{top}}}{{{b}}}",
        f"{whole}+\\frac{{{a}}}{{{b}}}",
        f"{top}/{b}",
        f"{whole}\\tfrac{{{a}}}{{{b}}}",
    ]
    wrong = [f"{whole}", f"\\frac{{{a}}}{{{b}}}", f"-{whole}\\frac{{{a}}}{{{b}}}", f"{whole + 1}\\frac{{{a}}}{{{b}}}"]
    wrong += [f"{whole}-\\frac{{{a}}}{{{b}}}", f"{whole}\\cdot\\frac{{{a}}}{{{b}}}" if whole * a != top else "0"]
    return f"{whole}\\frac{{{a}}}{{{b}}}", right, wrong


def repeating(rng):
    digits = str(rng.randint(1, 998)).lstrip("0")
    digits = digits if set(digits) != {"9"} else "3"
    value = Fraction(int(digits), 10 ** len(digits) - 1)
    other = str((int(digits) + 1) % 10 ** len(digits)).zfill(len(digits))
    right = [
        f"\\frac{{{value.numerator}}}{{{value.denominator}}}",
        f"0.({digits})",
        f"0.\\overline{{{digits * 2}}}",
        f"0.\\bar{{{digits}}}",
    ]
    wrong = [
        f"0.{digits}",
        f"0.\\overline{{{other}}}" if int(other) else "0",
        f"0.0\\overline{{{digits}}}",
        f"1.\\overline{{{digits}}}",
    ]
    return f"0.\\overline{{{digits}}}", right, wrong


def percent(rng):
    n = rng.randint(2, 99)
    right = [f"{n}%", f"{n}\\text{{ percent}}", f"0.{n:02d}", f"\\frac{{{n}}}{{100}}", str(n), f"{n}.0\\%", f"{n}％"]
    wrong = [f"{n + 1}\\%", f"0.0{n:02d}", f"{n}00", f"-{n}\\%", f"{n}\\%\\text{{ or }}{n + 1}\\%", f"{n}x"]
    return f"{n}\\%", right, wrong


UNITS = {
    "cm": ("\\text{ cm}", "\\,\\mathrm{cm}", " centimeters", "\\text{ centimetres}"),
    "kg": ("\\text{ kg}", "\\mathrm{~kg}", " kilograms", "\\text{ kilograms}"),
    "m/s": (
        "\\text{ m/s}",
        " \\frac{\\text{m}}{\\text{s}}",
        "\\text{ meters per second}",
        "\\,\\mathrm{m}/\\mathrm{s}",
    ),
    "cm^2": ("\\text{ cm}^2", "\\text{ square centimeters}", "\\ \\mathrm{cm}^{2}", " cm²"),
    "\\text{ hours}": ("\\text{ hours}", " hrs", "\\text{ h}", " hours"),
    "\\text{ degrees}": ("^\\circ", "^{\\circ}", "°", "\\text{ degrees}"),
    "\\text{ dollars}": ("\\text{ dollars}", " USD", "\\$", " dollars"),
}


def units(rng):
    n, name = rng.randint(2, 5000), rng.choice(sorted(UNITS))
    other = rng.choice(sorted(set(UNITS) - {name}))
    right = [f"{n}{form}" for form in UNITS[name]] + [str(n), f"x = {n}{UNITS[name][0]}"]
    wrong = [f"{n}{form}" for form in UNITS[other]] + [f"{n + 1}{form}" for form in UNITS[name]]
    wrong += [
        f"{n}{UNITS[name][0]}\\text{{ or more}}",
        f"{n} million{UNITS[name][0]}",
        f"{n}{UNITS[name][0]}^3",
        f"{n}\\text{{ dozen}}",
    ]
    return f"{n}{UNITS[name][0]}", right, wrong


TAILS = (
    "or {m}", "and {m}", "or more", "or less", "million", "thousand", "hundred", "dozen", "squared", "cubed", "factorial",
    "is wrong", "percent of {m}", "times {m}", "to {m}", "out of {m}", "over {m}", "per {m}", "minus one", "plus {m}", "thirds",
    "and a half", "mod {m}", "base {m}", "if n is even", "(wrong)", "not {m}", "negative",
    "halves", "less than {m}", "choose {m}", "or so",
)  # fmt: skip
NOUNS = (
    "apples",
    "ways",
    "students",
    "red marbles",
    "people",
    "different arrangements",
    "square units",
    "tickets",
    "years",
    "points",
)


def words_behind(rng):
    n, m = rng.randint(2, 900), rng.randint(3, 9)
    tail, noun = rng.choice(TAILS).format(m=m), rng.choice(NOUNS)
    right = [
        f"{n} {noun}",
        f"{n}\\text{{ {noun}}}",
        f"{n}\\ \\text{{{noun}}}",
        f" The answer is {n} {noun}.",
        f" Sam has {n} {noun} now.",
    ]
    wrong = [
        f"{n} {tail}",
        f"{n}\\text{{ {tail}}}",
        f" The answer is {n} {tail}.",
        f" The answer is ${n}$ {tail}.",
        f"{n} {noun} {tail}",
    ]
    return str(n), right, wrong


def magnitude(rng):
    n, (word, size) = (
        rng.randint(2, 90),
        rng.choice([("million", 10**6), ("thousand", 1000), ("billion", 10**9), ("dozen", 12)]),
    )
    right = [
        str(n * size),
        f"{n * size:,}",
        f"{n}\\text{{ {word}}}",
        f"{n} \\cdot {size}",
        f" The answer is {n} {word}.",
    ]
    wrong = [str(n), str(n * size + 1), f"{n}", f"{n} hundred", f"{n + 1} {word}", f"{n * size} {word}"]
    return f"{n} {word}", right, wrong


def radical(rng):
    k, r = rng.randint(2, 30), rng.choice([2, 3, 5, 6, 7, 10, 11, 13, 14, 15])
    right = [f"{k}\\sqrt {{{r}}}", f"\\sqrt{{{k * k * r}}}", f"{k}√{r}", f"{k}\\cdot\\sqrt{{{r}}}"]
    right += [f"\\frac{{{k * r}}}{{\\sqrt{{{r}}}}}"]
    right += [f"{k}*sqrt({r})", f"{r}^{{1/2}}\\cdot {k}", f"{(k * k * r) ** 0.5:.9f}"]
    wrong = [
        f"{k}",
        f"{k}\\sqrt{{{r + 1}}}",
        f"-{k}\\sqrt{{{r}}}",
        f"\\sqrt{{{k * r}}}",
        f"{(k * k * r) ** 0.5:.2f}",
        f"{k * r}",
    ]
    wrong += [f"\\pm {k}\\sqrt{{{r}}}", f"{k}\\sqrt[3]{{{r}}}", f"{k}+\\sqrt{{{r}}}"]
    return f"{k}\\sqrt{{{r}}}", right, wrong


def with_pi(rng):
    a, b = rng.randint(1, 40), rng.randint(2, 12)
    right = [f"{a}\\pi/{b}", f"\\frac{{{a}}}{{{b}}}\\pi", f"{a}π/{b}", f"{a}*pi/{b}", f"\\pi\\cdot\\frac{{{a}}}{{{b}}}"]
    wrong = [f"\\frac{{{a}}}{{{b}}}", f"\\frac{{{a}\\pi}}{{{b + 1}}}", f"\\frac{{{a}\\pi^2}}{{{b}}}"]
    wrong += [f"\\frac{{{22 * a}}}{{{7 * b}}}"]
    wrong += [f"{a * 3.14 / b:.2f}", f"{180 * a}/{b}"]
    return f"\\frac{{{a}\\pi}}{{{b}}}", right, wrong


def polynomial(rng):
    a, b, c = rng.randint(2, 9), rng.randint(1, 9), rng.randint(1, 9)
    gold = f"{a}x^2+{b}x+{c}"
    right = [f"{c}+{b}x+{a}x^{{2}}", f"x({a}x+{b})+{c}", f"{a}x²+{b}x+{c}", f"{a}*x**2+{b}*x+{c}"]
    right += [f"f(x) = {gold}", f"y={gold}"]
    right += [f"{a}\\left(x^2+\\frac{{{b}}}{{{a}}}x\\right)+{c}"]
    wrong = [
        f"{a}x^2-{b}x+{c}",
        f"{a}x^2+{b}x+{c + 1}",
        f"{a}x^3+{b}x+{c}",
        f"{a}y^2+{b}y+{c}",
        f"{a}x^2+{b}x",
        f"{gold}=0",
        f"{gold}+0.0000001",
    ]
    wrong += [f"{a}x^{{20}}+{b}x+{c}", f"{a}|x|^2+{b}|x|+{c}", f"{a}X^2+{b}X+{c}"]
    wrong += [f"y^2={gold}", f"{gold}\\text{{ if }}x>0"]
    return gold, right, wrong


def product(rng):
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    gold = f"(x+{a})(y-{b})"
    right = [f"(y-{b})(x+{a})", f"xy-{b}x+{a}y-{a * b}", f"(x+{a})\\cdot(y-{b})", f"-({b}-y)(x+{a})"]
    wrong = [f"(x-{a})(y+{b})", f"(x+{a})({b}-y)", f"xy-{b}x+{a}y", f"(x+{a})+(y-{b})", f"(x+{a}, y-{b})"]
    return gold, right, wrong


def rational_function(rng):
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    gold = f"\\frac{{x+{a}}}{{x-{b}}}"
    right = [
        f"(x+{a})/(x-{b})",
        f"1+\\frac{{{a + b}}}{{x-{b}}}",
        f"\\frac{{-x-{a}}}{{{b}-x}}",
        f"\\frac{{2x+{2 * a}}}{{2x-{2 * b}}}",
    ]
    wrong = [
        f"\\frac{{x-{b}}}{{x+{a}}}",
        f"x+{a}/x-{b}",
        f"\\frac{{x+{a}}}{{x+{b}}}",
        f"\\frac{{{a}}}{{-{b}}}",
        f"1+\\frac{{{a}}}{{x-{b}}}",
    ]
    return gold, right, wrong


def line(rng):
    a, b, c = rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 9)
    gold = f"{a}x+{b}y={c}"
    right = [
        f"{a}x+{b}y-{c}=0",
        f"y=-\\frac{{{a}}}{{{b}}}x+\\frac{{{c}}}{{{b}}}",
        f"x=\\frac{{{c}-{b}y}}{{{a}}}",
        f"{2 * a}x+{2 * b}y={2 * c}",
    ]
    right += [f"{c}={b}y+{a}x", f"-{a}x-{b}y+{c}=0"]
    wrong = [
        f"{a}x-{b}y={c}",
        f"{a}x+{b}y={c + 1}",
        f"{a}x+{b}y",
        str(c),
        f"{a}x+{b}y>{c}",
        f"{a}y+{b}x={c}" if a != b else "x=y",
    ]
    wrong += [f"{a}x+{b}y-{c}=1", f"{a}x^2+{b}y^2={c}"]
    return gold, right, wrong


def listed(rng):
    items = rng.sample(range(-50, 900), rng.randint(2, 4))
    shuffled = rng.sample(items, len(items))
    gold = ", ".join(map(str, items))
    right = [", ".join(map(str, shuffled)), " \\text{ and } ".join(map(str, shuffled)), "; ".join(map(str, shuffled))]
    right += [
        "\\{" + ", ".join(map(str, shuffled)) + "\\}",
        f"x = {gold}",
        " \\text{ or } ".join(f"x = {n}" for n in shuffled),
    ]
    wrong = [
        ", ".join(map(str, items[:-1])),
        gold + ", 1000",
        "(" + gold + ")",
        ", ".join(str(n + 1) for n in items),
        f"[{gold}]",
    ]
    wrong += ["".join(map(str, map(abs, items))), str(items[0]), " < ".join(map(str, sorted(items)))]
    return gold, right, wrong


def pair(rng):
    a, b = rng.sample(range(-30, 300), 2)
    right = [
        f"\\left({a},\\, {b}\\right)",
        f"( {a}, {b} )",
        f"({a}.0, {2 * b}/2)",
        f"(x, y) = ({a}, {b})",
        f" The answer is $({a},{b})$.",
    ]
    wrong = [
        f"({b}, {a})",
        f"({a}, {b}, 0)",
        f"{a}, {b}",
        f"[{a}, {b}]",
        f"\\{{{a}, {b}\\}}",
        f"({a}, {b + 1})",
        str(a),
        f"{a}{abs(b)}",
    ]
    wrong += [f"({a}, {b})\\text{{ or }}({b}, {a})", f"({a}, -({b}))" if b else "1"]
    return f"({a}, {b})", right, wrong


def interval(rng):
    a, width = rng.randint(-20, 20), rng.randint(1, 20)
    b, left, right_ = a + width, rng.choice("(["), rng.choice(")]")
    low, high = ("<" if left == "(" else "\\le "), ("<" if right_ == ")" else "\\le ")
    gold = f"{left}{a}, {b}{right_}"
    down, up = ("<" if left == "(" else "\\ge "), ("]" if left == "(" else "[")
    right = [
        f"\\left{left}{a},{b}\\right{right_}",
        f"{a} {low}x {high}{b}",
        f"x \\in {gold}",
        f"\\{{x \\mid {a} {low}x{high}{b}\\}}",
    ]
    right += [f"{up}{a}, {b}{'[' if right_ == ')' else ']'}"]
    flipped = {"(": "[", "[": "(", ")": "]", "]": ")"}
    wrong = [
        f"{flipped[left]}{a}, {b}{right_}",
        f"{left}{a}, {b}{flipped[right_]}",
        f"{left}{a}, {b + 1}{right_}",
        f"{a}, {b}",
    ]
    wrong += [
        f"x {down.replace('<', '>')}{a}",
        f"{left}{a}, \\infty)",
        f"{a} {low}x",
        f"\\{{{a}, {b}\\}}",
        f"{gold} \\cup \\{{{b + 3}\\}}",
    ]
    return gold, right, wrong


def half_line(rng):
    a, closed = rng.randint(-30, 30), rng.random() < 0.5
    gold = f"{'[' if closed else '('}{a}, \\infty)"
    above, other, below = ("\\ge", ">", "\\le") if closed else (">", "\\ge", "<")
    right = [
        f"x {above} {a}",
        f"{a} {below} x",
        f"x \\in {gold}",
        gold.replace("\\infty", "+\\infty"),
        gold.replace("\\infty", "∞"),
    ]
    wrong = [
        f"x {other} {a}",
        f"x < {a}",
        f"(-\\infty, {a})",
        gold.replace(")", "]"),
        str(a),
        f"x = {a}",
        f"x \\ne {a}",
    ]
    return gold, right, wrong


def word(rng):
    gold = rng.choice(
        ["Monday", "Evelyn", "ellipse", "parallelogram", "north", "listen", "even", "triangle", "Neptune", "hexagon"]
    )
    letters = list(gold)
    while "".join(letters) == gold:
        rng.shuffle(letters)
    right = [
        gold,
        f"\\text{{{gold}}}",
        f"\\textbf{{{gold}}}",
        gold.upper(),
        f"\\text{{ {gold.lower()} }}",
        f" The answer is {gold}.",
        f"\\mathrm{{{gold}}}",
    ]
    wrong = [
        "".join(letters),
        gold[:-1],
        gold + "s",
        f"not {gold}",
        f"{gold} or even less",
        f"\\text{{{''.join(letters)}}}",
        gold[::-1],
        f"no {gold}",
    ]
    return f"\\text{{{gold}}}" if rng.random() < 0.5 else gold, right, wrong


def label(rng):
    gold = "".join(rng.choice("ABCDHTPQR") for _ in range(rng.randint(3, 6)))
    turned = gold[1:] + gold[0]
    swapped = gold[::-1]
    right = [gold, f"\\text{{{gold}}}", f"\\mathrm{{{gold}}}"]
    wrong = [w for w in (turned, swapped, gold + gold[0], gold[:-1], "\\cdot ".join(gold)) if w != gold]
    return gold, right, wrong


def date(rng):
    y, m, d = rng.randint(1900, 2030), rng.randint(1, 12), rng.randint(1, 28)
    d = d if d != m else d + 1
    gold = f"{y}-{m:02d}-{d:02d}"
    return (
        gold,
        [gold, f"\\text{{{gold}}}"],
        [f"{y}-{d:02d}-{m:02d}", str(y - m - d), f"{y}-{m:02d}-{d % 28 + 1:02d}", f"{y}", f"{y}/{m}"],
    )


def clock(rng):
    h, m, half = rng.randint(1, 12), rng.randint(0, 59), rng.choice(["am", "pm"])
    gold = f"{h}:{m:02d} {half}"
    dotted = f"{h}:{m:02d} {half[0]}.m."
    right = [f"\\text{{{gold}}}", f"{h}:{m:02d}\\text{{ {half}}}", dotted, gold.upper()]
    wrong = [
        f"{h}:{m:02d} {'am' if half == 'pm' else 'pm'}",
        f"{h % 12 + 1}:{m:02d} {half}",
        f"{h}:{(m + 1) % 60:02d} {half}",
        str(h),
        f"{h}{m:02d}",
    ]
    return gold, right, wrong


def ratio(rng):
    a, b = rng.sample(range(1, 40), 2)
    right = [f"{a} : {b}", f"{a}\\colon {b}", f"{a}:{b}"]
    return f"{a}:{b}", right, [f"{b}:{a}", f"{a}:{b + 1}", str(a), f"{a}{b}", f"{a}, {b}", f"{a}:{b}:1"]


def numeral(rng):
    base, n = rng.choice([2, 3, 5, 8, 9]), rng.randint(20, 4000)
    digits, rest = "", n
    while rest:
        digits, rest = str(rest % base) + digits, rest // base
    names = {2: "two", 3: "three", 5: "five", 8: "eight", 9: "nine"}
    right = [
        f"{digits}_{{{base}}}",
        f"({digits})_{base}",
        f"{digits}_{{\\text{{{names[base]}}}}}",
        f"{digits}\\text{{ base }}{base}",
    ]
    other = digits[:-1] + str((int(digits[-1]) + 1) % base)
    wrong = [digits, str(n), f"{other}_{base}", f"{digits}_{{{base + 1}}}", f"{digits}\\cdot {base}", f"{digits}{base}"]
    return f"{digits}_{base}", right, wrong


def matrix(rng):
    cells = rng.sample(range(-20, 100), 4)
    a, b, c, d = cells
    gold = f"\\begin{{pmatrix}}{a}&{b}\\\\{c}&{d}\\end{{pmatrix}}"
    k = rng.randint(2, 5)
    right = [
        f"\\begin{{bmatrix}} {a} & {b} \\\\ {c} & {d} \\end{{bmatrix}}",
        f"\\left(\\begin{{array}}{{cc}}{a}&{b}\\\\{c}&{d}\\end{{array}}\\right)",
    ]
    right += [
        f"A = {gold}",
        f"\\frac{{1}}{{{k}}}\\begin{{pmatrix}}{a * k}&{b * k}\\\\{c * k}&{d * k}\\end{{pmatrix}}",
        gold.replace("\\\\", "\\\\[2pt]"),
    ]
    wrong = [
        gold.replace("pmatrix", "vmatrix"),
        f"\\begin{{pmatrix}}{a}&{c}\\\\{b}&{d}\\end{{pmatrix}}",
        f"-{gold}",
        f"{gold}^T",
        f"{a},{b},{c},{d}",
    ]
    wrong += [
        f"\\begin{{pmatrix}}{a}&{b}\\end{{pmatrix}}",
        f"\\begin{{pmatrix}}{a}&{b}&{c}\\\\{d}\\end{{pmatrix}}",
        f"2{gold}",
    ]
    return gold, right, wrong


def complex_number(rng):
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    right = [f"{b}i+{a}", f"{a}+{b}\\mathrm{{i}}", f"{a}+i\\cdot {b}", f"-(-{a}-{b}i)", f"z = {a}+{b}i"]
    wrong = [
        f"{a}-{b}i",
        f"{b}+{a}i" if a != b else "0",
        f"{a}+{b}",
        f"{a}\\pm {b}i",
        f"{a}+{b}x",
        f"{a}+{b}i^2",
        f"({a},{b})",
    ]
    return f"{a}+{b}i", right, wrong


def tiny_and_huge(rng):
    n, base = rng.randint(200, 900), rng.choice([2, 3, 7])
    form = rng.choice(
        ["{base}^{{{n}}}", "{base}^{{-{n}}}", "\\frac{{1}}{{{n}!}}", "{n}!", "\\frac{{{base}^{{{n}}}}}{{{n}!}}"]
    )
    gold = form.format(base=base, n=n)
    more = form.format(base=base, n=n + 1)
    right = [f"{gold}\\cdot 1", f"\\frac{{{gold}}}{{1}}", f"\\frac{{2}}{{3}}\\cdot\\frac{{3}}{{2}}\\cdot{gold}"]
    return gold, right, [more, "0", f"-{gold}", f"{gold}+1", f"2\\cdot {gold}", f"{gold}-{gold}"]


def choice(rng):
    gold, other = rng.sample("ABCDE", 2)
    right = [
        gold,
        f"({gold})",
        f"\\text{{{gold}}}",
        f"\\textbf{{({gold})}}\\ 73",
        f"{gold}) The sun",
        f" The correct answer is option {gold}.",
        f" **{gold}**",
    ]
    wrong = [
        other,
        f"{gold} or {other}",
        f"{gold}{other}",
        f"{gold}. {other} is right",
        f"not {gold}",
        f"({gold}), ({other})",
        f"{other}) {gold}",
    ]
    return gold, right, wrong


def near_misses(rng):
    k = rng.randint(24, 60)
    gold = f"1-\\frac{{1}}{{2^{{{k}}}}}"
    right = [f"\\frac{{2^{{{k}}}-1}}{{2^{{{k}}}}}", f"1-2^{{-{k}}}", f"1-\\left(\\frac12\\right)^{{{k}}}"]
    return (
        gold,
        right,
        [
            "1",
            f"1-\\frac{{1}}{{2^{{{k + 1}}}}}",
            f"1+\\frac{{1}}{{2^{{{k}}}}}",
            f"\\frac{{1}}{{2^{{{k}}}}}",
            "0.999999",
        ],
    )


def truncated(rng):
    n, m = rng.sample(range(2, 900), 2)
    wrong = [
        f" Thus \\boxed{{{n}}}. Wait, it is \\boxed{{{m}",
        f" \\boxed{{{n}}} and then \\boxed{{\\frac{{{n}}}{{{m}}}",
    ]
    wrong += [
        f" \\boxed{{{n}}} or \\boxed{{{m}}}",
        f" The value is \\boxed{{{n}}}, no, \\boxed{{{m}}}",
        f" Either \\boxed{{{n}}} or \\boxed{{{m}}}",
    ]
    right = [
        f" First \\boxed{{{m}}} was wrong; it is \\boxed{{{n}}}",
        f" \\boxed{{{n}}} or equivalently \\boxed{{{n}.0}}",
        f" $\\boxed{{{n}}}$, $\\boxed{{{n}.0}}$",
    ]
    return str(n), right, wrong


FAMILIES = [
    integer, fraction, decimal, mixed, repeating, percent, units, words_behind, magnitude, radical, with_pi, polynomial,
    product, rational_function, line, listed, pair, interval, half_line, word, label, date, clock, ratio, numeral, matrix,
    complex_number,
    tiny_and_huge, choice, near_misses, truncated,
]  # fmt: skip
