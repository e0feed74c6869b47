"""vLLM as the rollout engine: in the trainer's own process or beside it (colocated.py), or as servers (fleet.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amft_fast.interfaces import RolloutEngine
    from amft_fast.rollout.vllm.setup import Setup


def make(setup: Setup) -> RolloutEngine:
    """The engine that rollout.vllm asks for; it has no weights yet."""
    if setup.cfg.mode == "colocate":
        from amft_fast.rollout.vllm.colocated import ColocatedEngine

        return ColocatedEngine(setup)
    from amft_fast.rollout.vllm.fleet import ServedEngine

    return ServedEngine(setup)
