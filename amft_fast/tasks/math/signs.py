"""Unicode into ASCII and TeX: `½` is `\\frac{1}{2}`, `√2` is `\\sqrt{2}`, `x²` is `x^{2}`, `３` is `3`."""

from __future__ import annotations

import re
import unicodedata


def names(text: str) -> list[str]:
    """The words of a text: a short way to write a list of them."""
    return text.split()


GREEK = dict(
    zip(
        "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩϕϑϵ",
        names(
            "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi "
            "omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega phi theta epsilon"
        ),
    )
)
_SIGNS = {
    **{letter: f"\\{name} " for letter, name in GREEK.items()},
    **dict.fromkeys("−–‒‐‑﹣", "-"),
    **dict.fromkeys("⋅·∙∗•", "*"),
    "×": "\\times ",
    **dict.fromkeys("÷⁄∕", "/"),
    **dict.fromkeys("’′‘", "'"),
    **dict.fromkeys("，、", ", "),
    "~": " ",
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
    **dict.fromkeys("\u00a0\u202f\u2009\u200a\u3000\t", " "),
    "″": "''",
    "∞": "\\infty ",
    "°": "\\degree ",
    "º": "\\degree ",
    "℃": "\\degree C",
    "℉": "\\degree F",
    "≤": "\\le ",
    "⩽": "\\le ",
    "≦": "\\le ",
    "≥": "\\ge ",
    "⩾": "\\ge ",
    "≧": "\\ge ",
    "≠": "\\ne ",
    "≈": "\\approx ",
    "≡": "\\equiv ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∈": "\\in ",
    "∖": "\\setminus ",
    "∅": "\\emptyset ",
    "√": "\\sqrt ",
    "∛": "\\sqrt[3] ",
    "∜": "\\sqrt[4] ",
    "±": "\\pm ",
    "∓": "\\mp ",
    "ℝ": "\\R ",
    "ℤ": "\\Z ",
    "ℕ": "\\N ",
    "ℚ": "\\Q ",
    "ℂ": "\\C ",
    "…": "\\ldots ",
    "⋯": "\\ldots ",
    "∠": "\\angle ",
    "△": "\\triangle ",
    "⟨": "\\langle ",
    "⟩": "\\rangle ",
    "〈": "\\langle ",
    "〉": "\\rangle ",
    "⌊": "\\lfloor ",
    "⌋": "\\rfloor ",
    "⌈": "\\lceil ",
    "⌉": "\\rceil ",
    "⊥": "\\perp ",
    "∥": "\\parallel ",
    "⊂": "\\subset ",
    "⊆": "\\subseteq ",
    "¬": "\\neg ",
    "∧": "\\wedge ",
    "∨": "\\vee ",
    "→": "\\to ",
    "\u2126": "\\Omega ",
    "µ": "\\mu ",
    "。": ". ",
    "：": ":",
    "；": "; ",
}
_TABLE = str.maketrans(_SIGNS)
_SUPER = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣ", "0123456789+-=()nix"))
_SUB = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙₖᵢⱼₓₘ", "0123456789+-=()nkijxm"))
_RUNS = [(re.compile(f"[{''.join(m)}]+"), mark, str.maketrans(m)) for m, mark in ((_SUPER, "^"), (_SUB, "_"))]
_LINED = re.compile("((?:\\d[\u0305\u0304])+)")
_DOTTED = re.compile("(\\d)\u0307")


def without_unicode(text: str) -> str:
    """The text with what Unicode has signs for as TeX. Linear in the text."""
    if text.isascii():
        return text.replace("\t", " ").replace("~", " ")
    text = _LINED.sub(lambda m: "\\overline{" + re.sub("[\u0305\u0304]", "", m[1]) + "}", text)
    text = _DOTTED.sub(r"\\dot{\1}", text)
    for run, mark, table in _RUNS:
        text = run.sub(lambda m, mark=mark, table=table: f"{mark}{{{m[0].translate(table)}}}", text)
    text = re.sub(
        "√\\s*(\\d+(?:\\.\\d+)?)", r"\\sqrt{\1}", text.translate({k: v for k, v in _TABLE.items() if k != 0x221A})
    )
    text = text.translate(_TABLE)
    if text.isascii():
        return text
    out = []
    for c in text:
        plain = unicodedata.normalize("NFKC", c) if not c.isascii() else c
        if "⁄" in plain and len(plain) == 3:  # a fraction in one character
            out.append(f"\\frac{{{plain[0]}}}{{{plain[2]}}}")
        else:
            out.append(plain.translate(_TABLE))
    return "".join(out)
