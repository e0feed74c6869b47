"""The methods of `train.method`, one row each: what the settings, the controller, the report and the plan ask of a method.

A method is what μ does over a run, L = μ · L_SFT + (1 − μ) · L_RL. Either a schedule fixes it, a function of the progress
through the run (`shape`), or the controller learns it. A new schedule is one more row here, and nothing else.

What else a method may be is which demonstrations and rollouts enter an update, with which weights: `mixture` names a class in
amft_fast/mixtures/. There μ of the row is 0: all prompts are explored, and what is imitated is the mixture's to say.
docs/methods.md has a table of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Knobs(NamedTuple):
    """What a schedule may depend on beside the progress: settings of the sections controller and train."""

    mu: float  # controller.mu_init
    start: float  # controller.schedule_start
    end: float  # controller.schedule_end
    sft_share: float  # train.sft_share
    chord_mu: tuple[float, float] = (0.9, 0.05)  # mixture.chord_mu
    chord_share: float = 0.4  # of the run, over which chord_mu falls
    chord_phi_mu: float = 0.1  # mixture.chord_phi_mu


class Method(NamedTuple):
    """One method; `shape` maps the progress 0..1 through the run and the knobs to μ in [0, 1]."""

    name: str
    words: str  # what a report calls it
    has_sft: bool = True  # whether it imitates demonstrations, at some time
    has_rl: bool = True  # whether it explores, at some time
    shape: Callable[[float, Knobs], float] | None = None
    staged: bool = False  # one after the other: no step has both
    learns_from_utility: bool = False  # whether the controller takes the utility gradient
    learns_from_entropy: bool = False  # whether the controller holds the entropy at H*
    learns_from_noise: bool = False  # whether it weighs the noise of the two gradients against how far they are apart
    mixture: str = ""  # in mixtures.MIXTURES; "": the plain one
    shaping: str = "ratio"  # how a demonstration's token enters by its own probability (amft_kernels.loss_forms)

    @property
    def learned(self) -> bool:
        """Whether a controller moves μ; else `shape` gives it."""
        return self.shape is None


def _sft_then_rl(x: float, k: Knobs) -> float:
    return 1.0 if x < k.sft_share else 0.0


def cosine(x: float, start: float, end: float) -> float:
    """From `start` at x = 0 to `end` at x = 1, along half a period; `end` beyond."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(x, 1.0)))


def _none(x: float, k: Knobs) -> float:
    return 0.0


def _linear(x: float, k: Knobs) -> float:
    return k.start + (k.end - k.start) * x


def _cosine(x: float, k: Knobs) -> float:
    return cosine(x, k.start, k.end)


def _chord(x: float, k: Knobs) -> float:
    return cosine(x / k.chord_share, *k.chord_mu)


def _chord_phi(x: float, k: Knobs) -> float:
    return k.chord_phi_mu


_ROWS = (
    Method("amft", "AMFT, μ learned", learns_from_utility=True, learns_from_entropy=True),
    Method("amft_no_meta", "AMFT without its meta-gradient", learns_from_entropy=True),
    Method("amft_no_entropy", "AMFT without its entropy term", learns_from_utility=True),
    Method("sft", "SFT, imitation alone", has_rl=False, shape=lambda x, k: 1.0),
    Method("rl", "RL alone", has_sft=False, shape=lambda x, k: 0.0),
    Method("sft_then_rl", "SFT, then RL", shape=_sft_then_rl, staged=True),
    Method("fixed", "SFT + RL with a fixed μ", shape=lambda x, k: k.mu),
    Method("linear", "SFT + RL with μ falling linearly", shape=_linear),
    Method("cosine", "SFT + RL with μ falling along a cosine", shape=_cosine),
    Method("gac", "SFT + RL with the μ of least noise", learns_from_noise=True),
    Method("chord_mu", "CHORD-μ, μ falling along a cosine and then held", shape=_chord),
    Method("chord_phi", "CHORD-φ, tokens weighed by p(1 − p)", shape=_chord_phi, mixture="chord_phi", shaping="phi"),
    Method("luffy", "LUFFY, the demonstration in the group", shape=_none, mixture="luffy"),
    Method("srft", "SRFT, weighed by entropy", shape=_none, mixture="srft"),
    Method("hpt", "HPT, imitation where the policy fails", shape=_none, mixture="hpt"),
    Method("superrl", "SuperRL, imitation where no answer is right", shape=_none, mixture="superrl"),
    Method("relift", "ReLIFT, RL and a buffer of unsolved prompts", shape=_none, mixture="relift"),
    Method("uft", "UFT, RL from hints that shorten", shape=_none, mixture="uft"),
    Method("prefix_rft", "Prefix-RFT, one answer from a prefix", shape=_none, mixture="prefix_rft"),
)
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
