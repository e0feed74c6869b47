"""The processes of a run, and how they share work: what they decide is replicated, what they compute is split.

Every rank holds all samples of a step, decides the same from them (advantages, denominators, micro-batches, μ), and samples,
judges and trains on its share. So group statistics, token counts and the controller need no code of their own for many ranks,
and nothing depends on how many there are. With one process every method returns its argument and nothing is waited for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from amft_fast.errors import RolloutFailure, UserError

T = TypeVar("T")
# A rank may wait this long for one that still samples; a rank that has died is noticed at once, see watch.py.
TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class World:
    """This process's place among the processes of a run. Rank 0 alone writes files and prints."""

    rank: int = 0
    size: int = 1
    group: Any = None  # of torch.distributed; None: the one that all processes have

    def aside(self) -> World:
        """The same processes over connections of their own, for a thread beside the loop. All ranks must call it."""
        if self.size == 1:
            return self
        return World(self.rank, self.size, dist.new_group(backend="gloo", timeout=TIMEOUT))

    def neighbours(self, size: int) -> World:
        """The `size` consecutive ranks that this one is of, as a world of their own. All ranks must call it; `size` divides
        their number."""
        if size == 1:
            return ALONE
        groups = [dist.new_group(list(range(i, i + size)), timeout=TIMEOUT) for i in range(0, self.size, size)]
        return World(self.rank % size, size, groups[self.rank // size])

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, n: int) -> range:
        """This rank's run of n things: shares differ by at most one and may be empty."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def together(self, work: Callable[[], T]) -> list[T]:
        """`work` on every rank; what each returned, by rank. An interruption or failure of one is raised on all of them."""
        if self.size == 1:
            return [work()]
        result: Any = None
        error: Exception | None = None
        try:
            result = work()
        except (InterruptedError, RolloutFailure) as e:
            error = e
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, (result, error), self.group)
        for _, failed in parts:
            if failed is not None:
                raise failed
        return [x for x, _ in parts]

    def spread(self, n: int, work: Callable[[range], list[T]]) -> list[T]:
        """`work` on this rank's share of n things; the results of all ranks, in order, on every rank.

        An interruption or failure on one rank is raised on all of them.
        """
        return [x for part in self.together(lambda: work(self.share(n))) for x in part]

    def gather(self, items: list[T]) -> list[T]:
        """The items of all ranks, rank after rank, on every rank. They are pickled: tensors must lie on the CPU."""
        if self.size == 1:
            return items
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, items, self.group)
        return [x for part in parts for x in part]

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, on every rank; a UserError of it is raised on all of them."""
        result: Any = None
        error: UserError | None = None
        try:
            result = work() if self.main else None
        except UserError as e:
            error = e
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in a new tensor."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest over ranks, element by element, in a new tensor."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def _reduced(self, tensor: torch.Tensor, op: Any) -> torch.Tensor:
        if self.size == 1:
            return tensor
        out = tensor.clone()
        dist.all_reduce(out, op, self.group)
        return out

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return bool(self.max(torch.tensor(float(flag)))) if self.size > 1 else flag

    def barrier(self) -> None:
        if self.size > 1:
            self.any(False)  # over the CPU: NCCL's own barrier guesses devices


ALONE = World()


def leave() -> None:
    """Takes this process out of its group, after a run that all ranks have ended."""
    if dist.is_initialized():
        dist.destroy_process_group()


def launched_size() -> int:
    """How many processes the launcher (torchrun, deepspeed) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's number as the launcher gave it; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def join(device: torch.device) -> World:
    """Joins the processes that the launcher started, by the usual variables RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

    Raises UserError naming the variable that is missing. Without a launcher the world is this process alone.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [n for n in names if n not in os.environ]
    if len(missing) == len(names) or (launched_size() == 1 and missing):
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = "0"
        missing = []
    if missing:
        raise UserError(
            f"several processes: {', '.join(missing)} not set; start them with torchrun or the deepspeed launcher"
        )
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if launched_size() == 1:
            store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, timeout=TIMEOUT, **_meeting_point())
    return World(dist.get_rank(), dist.get_world_size())


def _meeting_point() -> dict[str, Any]:
    """Where the ranks meet, when torch's own way would be wrong.

    torchrun with a fixed --master-port keeps its store when it starts the workers again (torch 2.13), where they find the
    addresses of the dead and wait for ever. So each start has keys of its own. With several nodes their counts of starts may
    differ, and --rdzv-backend c10d, which makes a new store each time, is the way.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("LOCAL_WORLD_SIZE") != env["WORLD_SIZE"]:
        return {}
    rank, size = launched_rank(), launched_size()
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), size, is_master=False, timeout=TIMEOUT)
    start = f"start {env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return {"store": dist.PrefixStore(start, store), "rank": rank, "world_size": size}
