"""vLLM servers as the rollout engine: one or several, started here or found by URL, any of which may die, hang or lie.

A prompt's samples depend on its seed and the weights alone, so a group that failed is asked for again, of any server, and
gives the same samples: nothing is lost and nothing counted twice. Each answer names the weights that drew it, and does not
count unless they are those that it was asked of, or in flight later ones. A server that failed is started again and given the
weights of the present version before it answers; one that cannot be is left out until the next sync. When none is left,
`RolloutFailure` ends the run.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from amft_fast.engine.world import World
from amft_fast.errors import RolloutFailure, UserError
from amft_fast.interfaces import Completion, Request, Sampling
from amft_fast.rollout.vllm.groups import EngineError, RequestGroup, group_requests
from amft_fast.rollout.vllm.http_target import HttpTarget
from amft_fast.rollout.vllm.server import ServerProcess
from amft_fast.rollout.vllm.setup import Copy, Setup, check_lengths
from amft_fast.rollout.vllm.weight_sync import IncompleteError, TransferError

THREADS_PER_SERVER = 64  # groups asked of one server at a time


@dataclass
class Member:
    """One server of the fleet. `trouble` says why it may not be asked, `ready` that it has been given weights."""

    number: int
    process: ServerProcess | None
    target: HttpTarget | None = None
    trouble: str | None = "has not been started"
    ready: bool = False
    torn: bool = False  # a transfer broke off in it
    restarts: int = 0

    @property
    def name(self) -> str:
        return f"vLLM server {self.number}" + (f" ({self.target.name})" if self.target else "")


@dataclass
class Draw:
    """The work of one call of `generate`: groups still to be drawn, and what was drawn by whom."""

    groups: list[RequestGroup]
    todo: deque[int]
    done: dict[int, list[Completion]] = field(default_factory=dict)
    fatal: Exception | None = None
    over: bool = False


class ServedEngine:
    """Rollouts from servers over HTTP, weights over NCCL, IPC or gloo."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.cfg = setup, setup.cfg
        self.wire = setup.wire()
        self.vocabulary = setup.model.config.get_text_config().vocab_size
        self.version: int | None = None
        self.newest = 0 if setup.rank == 0 else math.inf  # version given, or being given, as far as it is known here
        self.changing = threading.RLock()  # held by the thread that starts servers or gives them weights
        self.copy = Copy() if setup.weights is None else None
        self.weight_sync = setup.make_sync(self.wire)
        self.key = self._key()
        self.world = World(setup.rank, setup.world_size)
        self.fleet: list[Member] = []
        self.closed = False
        atexit.register(self.close)
        own = not self.cfg.urls and self.world.main
        if own:
            self.fleet = self._planned()
            self._start(self.fleet)
        started = [(m.target.name, m.process.api_key, m.trouble) for m in self.fleet]
        found = [(url, self.key, None) for url in self.cfg.urls] or self.world.broadcast(started)
        if not own:
            self.fleet = self._found(found)
        for m in self.fleet:
            if m.trouble is not None:
                self.close()
                raise UserError(f"rollout.vllm: {m.name} {m.trouble}")

    def _key(self) -> str | None:
        name = self.cfg.api_key_env
        if name and not os.environ.get(name):
            raise UserError(f"rollout.vllm.api_key_env names {name}, which is not set or empty")
        return os.environ.get(name) if name else None

    def _found(self, servers: list[tuple[str, str | None, str | None]]) -> list[Member]:
        """Servers by (URL, key, trouble): those of rollout.vllm.urls, or on other ranks those that rank 0 has started."""
        fleet = [Member(i, None, self._target(url, key), trouble) for i, (url, key, trouble) in enumerate(servers)]
        for m in fleet:
            if m.trouble is None:
                self._greet(m)
        return fleet

    def _planned(self) -> list[Member]:
        settings = self.setup.engine_settings(self.wire)
        settings |= {"disable_uvicorn_access_log": True, "enable_scale_out": True}  # the latter: tokens in, tokens out
        return [
            Member(
                i,
                ServerProcess(
                    settings,
                    host=self.cfg.host,
                    log=Path(self.setup.folder) / "vllm" / f"server-{i}.log",
                    api_key=self.key,
                    environment=self._environment(i),
                    python=self.cfg.python,
                ),
            )
            for i in range(self.cfg.num_servers)
        ]

    def _environment(self, number: int) -> dict[str, str]:
        adapters = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if self.setup.adapter is not None else {}
        return adapters | self._device_environment(number)

    def _device_environment(self, number: int) -> dict[str, str]:
        if self.setup.device.type == "cpu":
            # Compiling the sampler for a CPU takes half a minute and gains nothing in eager mode.
            return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
        own = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if self.setup.backend == "ipc" else {}
        if self.cfg.devices:
            return own | {"CUDA_VISIBLE_DEVICES": self.cfg.devices[number]}
        taken, per = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), self.cfg.tensor_parallel_size
        visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
        visible = visible or [str(i) for i in range(torch.cuda.device_count())]
        chosen = visible[taken + number * per : taken + (number + 1) * per]
        if len(chosen) < per:
            raise UserError(
                f"rollout.vllm: server {number} needs {per} GPUs after the trainer's {taken}, {len(visible)} are visible: name "
                "them in rollout.vllm.devices, or use mode colocate"
            )
        return own | {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}

    # ------------------------------------------------------------------------------------------------- up and running

    def _target(self, url: str, key: str | None) -> HttpTarget:
        flight = self.setup.in_flight, self.setup.recompute_kv, self.cfg.router_replay
        return HttpTarget(
            url, key, self.cfg.call_timeout_s, self.cfg.generate_timeout_s, self.setup.image_token, *flight
        )

    def _greet(self, member: Member) -> bool:
        """Asks a server that answers what it is; afterwards it waits for weights. False when it does not answer yet."""
        state = member.target.alive(self.cfg.health_timeout_s)
        if state != "ok":
            member.trouble = f"does not answer: {state}"
            return False
        try:
            member.target.describe(self.vocabulary)
        except EngineError as e:
            member.trouble = str(e)
            return False
        member.trouble = None
        return True

    def _start(self, members: Iterable[Member]) -> None:
        """Starts servers side by side; those that do not come up in time have `trouble` afterwards."""
        waiting = list(members)
        for m in waiting:
            m.ready = False
            m.process.start()
            m.target, m.torn, m.trouble = self._target(m.process.url, m.process.api_key), False, "does not answer yet"
        deadline = time.monotonic() + self.cfg.start_timeout_s
        while waiting and time.monotonic() < deadline:
            self._check_stop()
            for m in list(waiting):
                if (code := m.process.ended()) is not None:
                    m.trouble = f"ended with code {code} at its start: {m.process.last_words()} (see {m.process.log})"
                    waiting.remove(m)
                elif self._greet(m):
                    waiting.remove(m)
            time.sleep(0.1)
        for m in waiting:
            m.trouble = f"did not come up within {self.cfg.start_timeout_s:g} s (see {m.process.log})"
            m.process.stop()

    def _check_stop(self) -> None:
        """Raises InterruptedError, also in a thread that draws ahead, when a stop is asked for or the engine is closed."""
        if self.closed or self.setup.should_stop():
            raise InterruptedError("stopped while sampling")

    def _up(self) -> list[Member]:
        return [m for m in self.fleet if m.trouble is None]

    def _usable(self) -> list[Member]:
        return [m for m in self._up() if m.ready]

    def _revive(self) -> list[Member]:
        """Brings back what can be: own servers are started again, found ones asked again. Returns those that came back, none
        of which has the present weights."""
        again = []
        for m in self.fleet:
            if m.trouble is None:
                continue
            self.setup.say(f"{m.name} {m.trouble}")
            if m.process is not None and m.restarts < self.cfg.max_restarts:
                m.restarts += 1
                again.append(m)
        self._start(again)
        found = self._found_again()
        return [m for m in again if m.trouble is None] + found

    def _found_again(self) -> list[Member]:
        """Servers found by URL that were left out and answer again."""
        found = [m for m in self.fleet if m.process is None and m.trouble is not None]
        for m in found:
            m.ready = False
        found = [m for m in found if self._greet(m)]
        for m in found:
            m.torn = True
        return found

    # ----------------------------------------------------------------------------------------------------- weights

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """New weights to all servers, in place; dead ones are started again. Rank 0 sends, the others only help to gather.

        In flight other threads may be drawing. Raises RolloutFailure when after the retries no server has them, UserError when
        they are not all there.
        """
        with self.changing:
            self.newest = max(self.newest, version)
            named = self.copy.tee(named_tensors) if self.copy is not None else named_tensors
            try:
                if self.setup.rank == 0:
                    self._found_again()
                    self._send(self._up(), named, version)
                else:
                    for _ in named:
                        pass
                    for m in self.fleet:  # one that rank 0 had to leave out is found out by its version
                        m.trouble, m.ready = None, True
                        if self.setup.adapter is not None:
                            m.target.use_adapter(version)
            except BaseException:
                self.version = None
                raise
            self.version = version

    def _present(self) -> Callable[[], Iterable[tuple[str, torch.Tensor]]]:
        return self.copy if self.copy is not None else self.setup.weights

    def _send(self, members: list[Member], named: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """`members` get the weights; those that fail are brought back and tried again."""
        for attempt in range(self.cfg.max_retries + 1):
            if attempt:
                self._after_failure(members)
                members = self._up()
                named = self._present()()
            if not members:
                members = self._revive()
                if not members:
                    break
            self._clear(members)
            members = [m for m in members if m.trouble is None]
            try:
                self.weight_sync.send([m.target for m in members], named, version)
                for m in members:
                    m.ready = True
                return
            except IncompleteError as e:
                for m in members:
                    m.torn = True
                raise UserError(f"rollout.engine vllm: {e}") from e
            except TransferError as e:
                for m in members:
                    m.torn = True
                self.setup.say(f"weights of version {version} did not arrive (attempt {attempt + 1}): {e}")
        raise RolloutFailure(f"no vLLM server could be given the weights of version {version}: {self._troubles()}")

    def _after_failure(self, members: list[Member]) -> None:
        """After a broken transfer: who does not answer is brought back, the others go on with an empty update."""
        for m in members:
            state = m.target.alive(self.cfg.health_timeout_s)
            if state != "ok":
                m.trouble = f"failed in a transfer of weights: {state}"
        self._clear([m for m in members if m.trouble is None])
        self._revive()

    def _clear(self, members: list[Member]) -> None:
        for m in members:
            if m.torn:
                try:
                    m.target.pause()  # what is under way waits for whole weights
                    self.weight_sync.clear(m.target)
                    m.torn = False
                except (EngineError, UserError) as e:
                    m.trouble = f"could not be made ready for weights: {e}"

    # ---------------------------------------------------------------------------------------------------- rollouts

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order. Raises RolloutFailure after `max_retries` rounds with servers that failed."""
        if self.version is None:
            raise RolloutFailure("no vLLM server has a whole set of weights to answer with")
        groups = check_lengths(group_requests(requests), min(m.target.max_model_len for m in self.fleet))
        draw = Draw(groups, deque(range(len(groups))))
        for _ in range(self.cfg.max_retries + 1):
            self._check_stop()
            # Other ranks wait for rank 0, which may need them for a sync, with no lock in their hands.
            with self.changing if self.world.main else contextlib.nullcontext():
                if not self._usable() or any(m.process is not None and m.trouble is not None for m in self.fleet):
                    self._rejoin()
            self._round(draw, sampling)
            if not draw.todo:
                break
        else:
            raise RolloutFailure(
                f"{len(draw.todo)} prompts could not be drawn in {self.cfg.max_retries + 1} rounds: {self._troubles()}"
            )
        out: list[Completion | None] = [None] * len(requests)
        for g, samples in draw.done.items():
            for i, completion in zip(groups[g].members, samples, strict=True):
                out[i] = completion
        return out

    def _rejoin(self) -> None:
        """Brings failed servers back in mid-step, with the present weights; other ranks wait for rank 0 to do so."""
        if self.world.main:
            if back := self._revive():
                self._send(back, self._present()(), self.version)
        else:
            self._wait_for_rank_0()
        if not self._usable():
            raise RolloutFailure(f"no vLLM server is left: {self._troubles()}")

    def _wait_for_rank_0(self) -> None:
        deadline = time.monotonic() + self.cfg.start_timeout_s
        while not self._usable() and time.monotonic() < deadline:
            self._check_stop()
            for m in self.fleet:
                m.ready = self._greet(m) and self._has_present(m)
            time.sleep(0.2)

    def _round(self, draw: Draw, sampling: Sampling) -> None:
        """Draws what is to be drawn from the servers that can be asked; what fails is put back."""
        draw.over, members = False, self._usable()
        threads = [
            threading.Thread(target=self._ask, args=(m, draw, sampling), name=f"rollout-{m.number}", daemon=True)
            for _ in range(min(THREADS_PER_SERVER, len(draw.todo)))
            for m in members  # in turn, so that a short queue is shared out too
        ]
        for t in threads:
            t.start()
        try:
            self._watch(threads, members)
        finally:
            draw.over = True
            if any(t.is_alive() for t in threads):
                for m in members:
                    m.target.abort()
        if draw.fatal is not None:
            raise draw.fatal

    def _ask(self, member: Member, draw: Draw, sampling: Sampling) -> None:
        """One thread's work: group after group from the common queue, until it is empty or the server fails."""
        while not draw.over and member.trouble is None and draw.fatal is None:
            target, version = member.target, self.version
            if version is None:  # a sync has failed
                return
            try:
                number = draw.todo.popleft()
            except IndexError:
                return
            try:
                draw.done[number] = self._checked(target.generate(draw.groups[number], sampling), version)
            except EngineError as e:
                draw.todo.append(number)
                if member.target is target:  # else it has been started again meanwhile
                    member.trouble = member.trouble or f"failed: {e}"
            except Exception as e:
                draw.todo.append(number)
                draw.fatal = e

    def _watch(self, threads: list[threading.Thread], members: list[Member]) -> None:
        """Waits for the threads; meanwhile asks the servers for their health, and cuts off one that hangs."""
        next_check = time.monotonic() + self.cfg.health_every_s
        while any(t.is_alive() for t in threads):
            self._check_stop()
            for t in threads:
                t.join(0.05)
                if t.is_alive():
                    break
            if time.monotonic() < next_check:
                continue
            for m in members:
                if m.trouble is None and (state := m.target.alive(self.cfg.health_timeout_s)) != "ok":
                    m.trouble = f"does not answer its health check: {state}"
                if m.trouble is not None:
                    m.target.abort()
            next_check = time.monotonic() + self.cfg.health_every_s

    def _checked(self, samples: list[Completion], version: int) -> list[Completion]:
        """The samples, where weights of `version` drew them, or in flight later ones. Raises EngineError else: somebody has
        started the server again, say."""
        for sample in samples:
            drawn = [v for v, _ in sample.versions]
            if drawn != sorted(drawn) or drawn[0] < version or drawn[-1] > self.newest:
                wrong = next((v for v in drawn if not version <= v <= self.newest), drawn[0])
                raise EngineError(f"has weights of version {wrong} instead of {version}")
        return samples

    def _has_present(self, member: Member) -> bool:
        """Whether a server that rank 0 has brought back holds the present weights by now."""
        try:
            found = member.target.weight_version()
        except (EngineError, UserError) as e:
            member.trouble = f"failed: {e}"
            return False
        if found != str(self.version):
            member.trouble = f"has weights of version {found} instead of {self.version}"
        return member.trouble is None

    def _troubles(self) -> str:
        return "; ".join(f"{m.name} {m.trouble}" for m in self.fleet if m.trouble) or "all of them failed in turn"

    def rest(self) -> None:
        """The servers' devices are their own."""

    def health(self) -> str:
        """ "ok", or which servers may not be asked and why."""
        return "ok" if len(self._usable()) == len(self.fleet) else self._troubles()

    def close(self) -> None:
        """Leaves the transfer's group and ends the servers that were started here."""
        self.closed = True
        atexit.unregister(self.close)
        with contextlib.suppress(Exception):
            self.weight_sync.close()
        for m in self.fleet:
            if m.process is not None:
                m.process.stop()
