"""Targets made safe to index with, and the rows that are not to count.

On the CPU a target out of range was refused by `checks.py`. On a device, where refusing it would mean waiting for it, its
row becomes NaN, and with it the loss and the gradients; a flag on the device remembers why, for whoever looks into the
NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_flags: dict[torch.device, torch.Tensor] = {}


class Targets(NamedTuple):
    index_N: torch.Tensor  # int64, 0 on rows without a target
    valid_N: torch.Tensor  # rows with a target
    bad_N: torch.Tensor | None  # rows whose target is out of range; None on the CPU

    def weighted(self, weight_N: torch.Tensor | None) -> torch.Tensor | None:
        """A per-token weight or gradient, 0 on ignored rows whatever it held there, NaN on bad ones."""
        if weight_N is None:
            return None
        weight_N = torch.where(self.valid_N, weight_N, 0.0)
        return weight_N if self.bad_N is None else weight_N.masked_fill(self.bad_N, float("nan"))

    def reported(self, value_N: torch.Tensor) -> torch.Tensor:
        """A per-token result, 0 on ignored rows, NaN on bad ones."""
        return self.weighted(value_N)


def prepare_targets(targets_N: torch.Tensor, vocab: int, ignore_index: int) -> Targets:
    valid_N = targets_N != ignore_index
    bad_N = None
    if targets_N.device.type != "cpu":
        inside_N = (targets_N >= 0) & (targets_N < vocab)
        bad_N = valid_N & ~inside_N
        valid_N = valid_N & inside_N
        bad_target_flag(targets_N.device).logical_or_(bad_N.any())
    return Targets(torch.where(valid_N, targets_N, 0).long(), valid_N, bad_N)


def bad_target_flag(device: torch.device) -> torch.Tensor:
    """A bool on `device`: whether any target there was out of range since it was last cleared (`.zero_()`)."""
    if device not in _flags:
        _flags[device] = torch.zeros((), dtype=torch.bool, device=device)
    return _flags[device]
