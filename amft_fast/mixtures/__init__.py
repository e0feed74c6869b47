"""Methods that mix imitation and exploration, a module each, named by the rows of methods.py."""

from __future__ import annotations

from amft_fast.config import Config
from amft_fast.methods import METHODS
from amft_fast.mixtures.base import Mixture, Tools
from amft_fast.mixtures.chord import ChordPhi
from amft_fast.mixtures.gates import Hpt, SuperRl
from amft_fast.mixtures.hints import PrefixRft, Uft
from amft_fast.mixtures.luffy import Luffy
from amft_fast.mixtures.relift import Relift
from amft_fast.mixtures.srft import Srft

__all__ = ["MIXTURES", "Mixture", "Tools", "make"]

MIXTURES: dict[str, type[Mixture]] = {
    "luffy": Luffy,
    "srft": Srft,
    "chord_phi": ChordPhi,
    "hpt": Hpt,
    "superrl": SuperRl,
    "relift": Relift,
    "uft": Uft,
    "prefix_rft": PrefixRft,
}


def make(cfg: Config, tools: Tools) -> Mixture:
    """The mixture of `train.method`; the plain one where its row names none."""
    return MIXTURES.get(METHODS[cfg.train.method].mixture, Mixture)(cfg, tools)
