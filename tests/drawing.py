"""Rollouts without a model: what is asked for, in which order, and how old it is."""

from __future__ import annotations

import torch
from fakes import CopyTask, copy_run
from transformers import AutoTokenizer

from amft_fast.engine.phases import Phases
from amft_fast.engine.world import ALONE
from amft_fast.interfaces import Completion
from amft_fast.rollout.encoder import Encoder
from amft_fast.rollout.rollouts import Rollouts


class Drawing:
    """`Rollouts` of CopyTask over an engine that answers at once, with the version that it was given last."""

    def __init__(self, folder, depth, *flags):
        served = ("--rollout.engine", "vllm", "--rollout.vllm.mode", "server", "--rollout.async_steps", str(depth))
        cfg = copy_run(folder, folder, "--rollout.num_generations", "2", "--train.method", "rl", *served, *flags)
        self.version = 0
        encoder = Encoder(AutoTokenizer.from_pretrained(folder))
        phases = Phases(torch.device("cpu"))
        self.rollouts = Rollouts(cfg, self, CopyTask(), encoder, ALONE, phases, lambda: iter(()))

    def generate(self, requests, sampling):
        return [Completion([5, 1], [-0.5, -0.5], "stop", self.version) for _ in requests]

    def sync(self, named, version):
        self.version = version

    def rest(self): ...

    def step(self, step, last=99, mu=0.0):
        """The ages of what a step trains on, and the prompts."""
        drawn = self.rollouts.draw(step) if mu < 1 else self.rollouts.draw_none()
        self.rollouts.draw_ahead(step, min(step + self.rollouts.cfg.rollout.async_steps, last) if mu < 1 else step)
        assert self.rollouts.sync(step + 1) is None
        self.figures = drawn.figures
        return {step - s.weight_version for s in drawn.samples}, list(dict.fromkeys(s.prompt_id for s in drawn.samples))
