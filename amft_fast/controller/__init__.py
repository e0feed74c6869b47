"""μ over the course of a run: schedules, and what learns it while training. The state of a controller is plain JSON."""

from __future__ import annotations

from functools import partial

from amft_fast.config import Config
from amft_fast.controller.base import Controller
from amft_fast.controller.blocks import BlockController
from amft_fast.controller.noise import NoiseOptimal
from amft_fast.controller.schedules import Schedule, Switch
from amft_fast.controller.windows import MetaController
from amft_fast.methods import METHODS, Knobs

__all__ = ["BlockController", "Controller", "MetaController", "NoiseOptimal", "Schedule", "Switch", "inert", "make"]


def inert(cfg: Config) -> str | None:
    """A sentence when the learned controller cannot move μ visibly, as with the published hyper-parameters."""
    c, lr = cfg.controller, cfg.train.lr
    if not METHODS[cfg.train.method].learned or c.signal != "raw" or lr * c.eta_mu > 1e-6 or c.eta_entropy > 2e-3:
        return None
    return (
        f"controller: with signal raw mu moves by train.lr x controller.eta_mu = {lr * c.eta_mu:.0e} times a dot-product: it "
        f"will stay where it starts, at {c.mu_init:g} (so do the published hyper-parameters; see docs/method.md)"
    )


def make(cfg: Config) -> Controller:
    """The controller that `train.method` names."""
    c, t = cfg.controller, cfg.train
    method = METHODS[t.method]
    if method.learns_from_noise:
        return NoiseOptimal(cfg)
    if cfg.in_blocks:
        return BlockController(cfg)
    if method.shape is None:
        return MetaController(cfg, meta=method.learns_from_utility, entropy=method.learns_from_entropy)
    m = cfg.mixture
    falls = m.chord_steps / max(t.steps - 1, 1)
    knobs = Knobs(c.mu_init, c.schedule_start, c.schedule_end, t.sft_share, m.chord_mu, falls, m.chord_phi_mu)
    shape = partial(method.shape, k=knobs)
    return Switch(shape, t) if method.staged and t.sft_stop == "saturation" else Schedule(shape, t.steps)
