"""The seams between the parts: what a task, a rollout engine and an update engine promise each other.

Imports no torch at run time, so that a task or a config can be used without it. Everything here is a plain dataclass or a
`typing.Protocol`: a class fits by having the methods, not by inheriting. Small in-memory fakes for tests are in
`tests/fakes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from amft_fast.config import ObjectiveConfig
    from amft_fast.data.batch import Batch
    from amft_fast.engine.world import World
    from amft_fast.model.policy import PolicyOutput


# ---------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `role` is system, user, assistant, or tool for what a call gave; `images` holds PIL images or
    paths. `tools`, on a message of the prompt, are the JSON schemas of what the policy may call (tasks/tools.py)."""

    role: str
    content: str
    images: tuple[Any, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Item:
    """One problem. `id` is stable over runs and machines: seeds and splits are derived from it."""

    id: str
    data: Any


@dataclass(frozen=True)
class Demo:
    """One demonstration: a problem and the response to imitate.

    `messages` is the prompt (ends with a user message), `response` the text of the assistant's answer. `more` holds further
    turns of a longer conversation: what is said to the policy, and its answer to that. All its answers are imitated.
    """

    id: str
    messages: tuple[Message, ...]
    response: str
    more: tuple[tuple[Message, str], ...] = ()


@dataclass(frozen=True)
class StepResult:
    """What the environment answers to one response of the policy.

    `message` is the text sent back to the policy for another try, or None when there is none; `reward` is of this turn
    alone; `done` ends the episode; `info` must hold `success: bool` and may hold floats, which are averaged into the
    metrics under their names (`kind`, if given, is counted). `answer`, if given, is the answer that was read of the response as
    text, None where none could be read. `state`, if given, names the situation that the response was made in: turn-level
    advantages compare the turns of one prompt's samples that were made in the same one.
    """

    message: Message | None
    reward: float
    done: bool
    info: dict[str, Any]


class Episode(Protocol):
    """One attempt at one problem. `messages` is the prompt, made once at the start."""

    messages: Sequence[Message]

    def step(self, text: str) -> StepResult: ...


class Task(Protocol):
    """A family of problems.

    `splits` names what `prompts` knows: always `train`, `val`, `test`; `ood` (and others) where the task has them.
    `prompts(split)` and `demos(split)` are sized and indexable, and the same on every call and every machine.
    `max_turns` bounds the episodes. Any text of a prompt must come from `start(item).messages`. What a task may have beside
    these is in `TaskHooks`.
    """

    splits: tuple[str, ...]
    max_turns: int

    def prompts(self, split: str) -> Sequence[Item]: ...
    def demos(self, split: str) -> Sequence[Demo]: ...
    def start(self, item: Item) -> Episode: ...


class TaskHooks(Protocol):
    """What a task may have, each looked for by its name and used where it is there.

    prepare       reads data, before all else, for the policy's encoder (rollout.encoder.Encoder) and answers of so many tokens;
                  returns lines that say what became of it
    step_all      with one turn, where answers are dear to judge: the results of `step` for many episodes at once
    demo          the demonstration of one of the training prompts, None where it has none; without it, methods that ask for the
                  demonstration of a prompt look for its id among `demos("train")`
    gold          the right answer to a problem (or one of them) as text, for people to compare with
    picture       draws an episode for the report: a PIL image, or SVG as text
    warn_of_base  a sentence when the model at this path spoils the task (it has seen what is held out)
    dry_run       of what makes the task (its class), from its section of the config: lines on what `--dry-run` found
    """

    def prepare(self, encoder: Any, max_new_tokens: int) -> list[str]: ...
    def step_all(self, episodes: Sequence[Episode], texts: Sequence[str]) -> list[StepResult]: ...
    def demo(self, item: Item) -> Demo | None: ...
    def gold(self, item: Item) -> str: ...
    def picture(self, item: Item, sample: Sample) -> Any: ...
    def warn_of_base(self, path: str) -> str | None: ...
    @staticmethod
    def dry_run(settings: Any, hub: Hub) -> list[str]: ...


class Hub(Protocol):
    """The Hugging Face hub, as a dry run asks it."""

    def look_up(self, kind: str, name: str) -> str:
        """A line on whether the hub has this `model` or `dataset`. Raises UserError when it has not."""
        ...


# ------------------------------------------------------------------------------------------------------------- rollouts


@dataclass
class Turn:
    """One turn of a sample: where the policy's tokens of it end in `response_ids`, what they earned, and in what `state`
    of the task (its number among the turns, unless the task says more)."""

    end: int
    reward: float
    state: str = ""


@dataclass
class Sample:
    """One response (all turns of it), exactly as the engine returned it; never re-tokenised.

    `versions` says which weights drew the policy's tokens, in order, as runs (version, tokens); where there are none it was
    `weight_version`, which is the oldest of them.

    `response_ids` holds everything after the prompt: the policy's tokens (`loss_mask` 1) and, between turns, the
    verifier's (`loss_mask` 0). `behavior_logprobs` are log-probs of the distribution sampled from, natural log, 0.0 where
    the mask is 0. With many ranks these and `prompt_ids` are arrays (rollouts.pack). `reward` is the sum over turns, and so
    is `entropy`, of the distributions that the policy's tokens were drawn from (None where an engine does not tell).
    """

    prompt_ids: list[int]
    response_ids: list[int]
    loss_mask: list[int]
    behavior_logprobs: list[float]
    weight_version: int
    finish_reason: str  # "stop" or "length", of the last turn
    prompt_id: str
    group_id: int
    turns: list[Turn] = field(default_factory=list)
    images: tuple[Any, ...] = ()
    hint: int = 0  # first tokens of `response_ids` that were given, not sampled (their mask is 0)
    reward: float = 0.0
    advantage: float | None = None  # mean over the policy's tokens, once the step has judged it
    entropy: float | None = 0.0
    versions: list[tuple[int, int]] = field(default_factory=list)
    experts: np.ndarray | None = None  # of prompt and response, as `Completion.experts`
    success: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.experts, list):  # as JSON has them
            self.experts = np.array(self.experts, np.int16)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(version, tokens) of the weights that drew the policy's tokens, in order."""
        return self.versions or [(self.weight_version, sum(self.loss_mask))]

    def lists(self) -> dict[str, list]:
        """Its tokens as JSON has them."""
        tokens = {k: list(getattr(self, k)) for k in ("prompt_ids", "response_ids", "loss_mask", "behavior_logprobs")}
        return tokens | {"experts": None if self.experts is None else self.experts.tolist()}


@dataclass(frozen=True)
class Request:
    """Ask an engine to continue `prompt_ids`. `seed` fixes the sample whatever else rides in the batch."""

    prompt_ids: tuple[int, ...]
    seed: int
    max_new_tokens: int
    images: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What an engine returns for a `Request`: token ids (the stop token included) and their log-probs. `entropy`: of the
    distributions that they were drawn from, in nats, summed; None where an engine does not tell. `versions`: runs (version,
    tokens) of the weights that drew them, where those were changed in their midst; `weight_version` is the oldest then.
    `experts` [tokens, layers, k], where an engine tells them: those that the routers of a mixture sent each token to, the
    prompt's too and all but the last, whose hidden state drew nothing."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop" | "length"
    weight_version: int
    entropy: float | None = None
    versions: tuple[tuple[int, int], ...] = ()
    experts: np.ndarray | None = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Training uses temperature alone; top_p is for evaluation.

    `temperature` 0 is greedy. `stop_token_ids` end a response.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()


class RolloutEngine(Protocol):
    """Draws text. `episodes.run` drives it over turns; an engine itself knows nothing of tasks.

    `rest` says that nothing will be asked before the next `sync`: an engine on the trainer's GPU gives its memory back.
    An engine that can go on with a conversation where it stands is a `Converses` as well.
    """

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]: ...
    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None: ...
    def rest(self) -> None: ...
    def health(self) -> str: ...
    def close(self) -> None: ...


class Converses(Protocol):
    """An engine that keeps what it has computed of a conversation: each completion is given to `reply` with its request's
    number, and goes on with what that returns, or ends with None."""

    def converse(
        self,
        requests: list[Request],
        sampling: Sampling,
        reply: Callable[[int, Completion], Request | None],
    ) -> None: ...


# -------------------------------------------------------------------------------------------------------------- updates


class UpdateEngine(Protocol):
    """Owns parameters, gradients and the optimizer. The loop does not know which one it has.

    A step is: `backward` for each micro-batch, then `step`. A probed step runs the SFT micro-batches, `end_sweep("sft")`,
    the RL micro-batches, `end_sweep("rl")`, `probe()`, `step`. A utility gradient is `backward` on the utility's batches
    and `take_gradient`, which returns this rank's shards and clears them.
    """

    world: World
    sequence: World  # the ranks that share a micro-batch, each with a part of its tokens
    rank: int
    world_size: int
    device: torch.device
    cut: bool  # parameters are there in parts only, outside the model's forward pass
    attempts: int  # updates that the present weights and moments come from, the skipped ones included
    bad_in_row: torch.Tensor  # updates in a row that were skipped because their gradient was not finite, on the device
    bad_total: torch.Tensor  # all of those
    skipped: int  # the same, as the loop has read it last and told the engine

    def backward(self, batch: Batch, objective: ObjectiveConfig | None = None) -> PolicyOutput: ...
    def logprobs(self, batch: Batch, model: Any = None, temperature: float | None = None): ...
    def plain_copy(self) -> nn.Module: ...
    def reference(self) -> Any: ...
    def export(self, folder: Path) -> None: ...
    def set_lr(self, lr: float) -> None: ...
    def end_sweep(self, name: str) -> None: ...
    def take_gradient(self) -> list[torch.Tensor]: ...
    def probe(self, halves: Sequence[list[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]: ...
    def step(self) -> torch.Tensor: ...
    def snapshot(self) -> dict[str, Any]: ...
    def saved_snapshot(self, snapshot: dict[str, Any]) -> dict[str, Any]: ...
    def restore(self, snapshot: dict[str, Any]) -> None: ...
    def named_full_params(self, max_bytes: int = 1 << 30) -> Iterator[tuple[str, torch.Tensor]]: ...
    def named_factors(self) -> Iterator[tuple[str, torch.Tensor]]: ...
    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor: ...
    def by_name(self, flats: list[torch.Tensor]) -> Iterator[tuple[Any, torch.Tensor]]: ...
    def from_names(self, state: Any, prefix: str) -> list[torch.Tensor]: ...
    def state_bytes(self) -> int: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
