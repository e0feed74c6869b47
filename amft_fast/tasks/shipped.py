"""The tasks that come with the trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from amft_fast.interfaces import Task


def maker(name: str) -> Callable[[Any], Task]:
    """What makes the task called `name` from its section of the config. Imports that task alone."""
    if name == "virl":
        from amft_fast.tasks.virl.task import Virl

        return Virl
    if name == "math":
        from amft_fast.tasks.math.task import MathTask

        return MathTask
    from amft_fast.tasks.general_points.vision import make_general_points

    return make_general_points
