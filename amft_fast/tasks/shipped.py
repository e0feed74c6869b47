"""From a task's name to the task: those that come with the trainer, those of packages it knows, and one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from amft_fast.config import TaskConfig
from amft_fast.interfaces import Hub, Task
from amft_fast.tasks import own


def maker(name: str) -> Callable[[Any], Task]:
    """What makes the task called `name` from its section of the config. Imports that task alone."""
    if name == "virl":
        from amft_fast.tasks.virl.task import Virl

        return Virl
    if name == "math":
        from amft_fast.tasks.math.task import MathTask

        return MathTask
    if name == "data":
        from amft_fast.tasks.data.task import DataTask

        return DataTask
    from amft_fast.tasks.general_points.vision import make_general_points

    return make_general_points


def make(cfg: TaskConfig) -> Task:
    """The task that task.name asks for: a shipped one from its own section, any other from task.options.

    Raises ValueError or UserError for what is wrong with its settings.
    """
    if cfg.section is not None:
        return maker(cfg.name)(cfg.section)
    package, _, name = cfg.name.partition(":")
    if package == "reasoning_gym":
        from amft_fast.tasks.gym.task import GymTask

        return GymTask(name, cfg.gym, cfg.options)
    if package == "verifiers":
        from amft_fast.tasks.verifiers.task import VerifiersTask

        return VerifiersTask(name, cfg.verifiers, cfg.options)
    return own.make(cfg.name, cfg.options)


def dry_run(cfg: TaskConfig, hub: Hub) -> list[str]:
    """What the task's own dry run finds, of its section or of its options."""
    package, _, name = cfg.name.partition(":")
    if package == "reasoning_gym":
        from amft_fast.tasks.gym import task

        return task.dry_run(name, cfg.gym, cfg.options)
    if package == "verifiers":
        from amft_fast.tasks.verifiers import task

        return task.dry_run(name, cfg.verifiers, cfg.options)
    if cfg.section is not None:
        made_by, settings, lines = maker(cfg.name), cfg.section, []
    else:
        made_by = own.find(cfg.name)
        settings, lines = own.typed(made_by, cfg.options, cfg.name), [f"task: {cfg.name} is there"]
    looks = getattr(made_by, "dry_run", None)
    return lines if looks is None else [*lines, *looks(settings, hub)]
