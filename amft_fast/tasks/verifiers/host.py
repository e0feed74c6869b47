"""A verifiers environment under way: its event loop in a thread, and the model endpoint through which it asks the policy.

An environment of verifiers drives the conversation itself and calls a model when it wants an answer; the trainer draws many
samples at once and brings the answers. So each episode here runs until it asks, and waits there until `answer` is called.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import json
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import web
from verifiers.v1 import EvalClientConfig, ModelContext
from verifiers.v1.clients.client import SESSION_ID_HEADER

from amft_fast.errors import RewardFailure
from amft_fast.tasks.tools import calls
from amft_fast.tasks.verifiers import harness

HARNESS = "amft_fast_policy"  # verifiers imports a harness by its id, which takes no dots
sys.modules.setdefault(HARNESS, harness)
MODEL = "policy"
AT_ONCE = 256


class Play:
    """One episode, as the host's loop has it. `trained` is the trace whose model calls are the policy's."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[tuple[list[dict[str, Any]], asyncio.Future[str]]] = asyncio.Queue()
        self.waiting: asyncio.Future[str] | None = None
        self.task: asyncio.Task[Any] | None = None
        self.traces: list[Any] = []
        self.trained: Any = None
        self.first: Any = None


class Host:
    """Runs the episodes of `env`. `seconds`: how long an environment may take from an answer to its next question."""

    def __init__(self, env: Any, seconds: float) -> None:
        self.env, self.seconds = env, seconds
        self.plays: dict[str, Play] = {}
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="verifiers", daemon=True)
        self.thread.start()
        self._live: set[Play] = set()
        _allow_open_files()
        self._call(self._open())
        self._pools = itertools.cycle(self.contexts)
        atexit.register(self.close)

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    # ---------------------------------------------------------------------------------------------------------- the loop

    async def _open(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        # A client of verifiers holds 1000 connections at most; each waiting episode needs one.
        self.contexts = [
            ModelContext(
                model=MODEL, client=EvalClientConfig(base_url=f"http://127.0.0.1:{port}/v1", headers={"x-pool": str(i)})
            )
            for i in range(8)
        ]
        self._stop, opened = asyncio.Event(), self.loop.create_future()
        self._serving = self.loop.create_task(self._serve(opened))
        await opened

    async def _serve(self, opened: asyncio.Future[None]) -> None:
        """Holds what the environment's episodes share; entered and left by one task, as anyio wants it."""
        try:
            async with self.env.serving():
                opened.set_result(None)
                await self._stop.wait()
        except BaseException as e:
            if not opened.done():
                opened.set_exception(e)
            else:
                raise

    async def _complete(self, request: web.Request) -> web.Response:
        """A model call of an episode: answered when the trainer has drawn it."""
        play = self.plays.get(request.headers.get(SESSION_ID_HEADER, ""))
        if play is None:
            return web.json_response({"error": {"message": "no such episode"}}, status=404)
        body, answer = await request.json(), self.loop.create_future()
        session = request.headers[SESSION_ID_HEADER]
        trace = next(t for t in play.traces if t.id == session)
        play.trained = play.trained or trace
        if play.trained is not trace or not trace.agent.trainable:
            seat = trace.agent.name or "agent"
            return web.json_response({"error": {"message": f"the seat {seat!r} has no model: {ONE_SEAT}"}}, status=400)
        messages, tools = body["messages"], body.get("tools")
        if tools:  # where our messages have them
            messages = [{**messages[0], "tools": tools}, *messages[1:]]
        play.asked.put_nowait((messages, answer))
        return web.json_response(_completion(await answer, bool(tools)))

    async def _next(self, play: Play) -> list[dict[str, Any]] | Any:
        """The messages of the next question, or the finished episode."""
        question = self.loop.create_task(play.asked.get())
        try:
            await asyncio.wait({question, play.task}, timeout=self.seconds, return_when=asyncio.FIRST_COMPLETED)
            if question.done():
                messages, play.waiting = question.result()
                return messages
            if play.task.done():
                self._forget(play)
                return play.task.result()
        finally:
            question.cancel()
        play.task.cancel()
        raise TimeoutError

    async def _begin(self, play: Play, task: Any) -> Any:
        def minted(trace: Any) -> None:
            play.traces.append(trace)
            self.plays[trace.id] = play

        context = next(self._pools)
        play.task = self.loop.create_task(self.env.run_episode(task, context, on_trace=minted))
        return await self._next(play)

    async def _answer(self, plays: list[Play], texts: list[str]) -> list[Any]:
        for play, text in zip(plays, texts):
            play.waiting.set_result(text)
        return await asyncio.gather(*map(self._next, plays), return_exceptions=True)

    def _forget(self, play: Play) -> None:
        for trace in play.traces:
            self.plays.pop(trace.id, None)
        self._live.discard(play)

    async def _drop(self, play: Play) -> None:
        self._forget(play)
        if play.waiting is not None:
            play.waiting.cancel()
        if play.task is not None and not play.task.done():
            play.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await play.task

    # --------------------------------------------------------------------------------------------------- from other threads

    @property
    def room(self) -> bool:
        """Whether another episode may go on by itself: each holds four open files."""
        return self.active < AT_ONCE

    @property
    def active(self) -> int:
        """Episodes that have begun and are neither judged nor let go."""
        return len(self._live)

    def begin(self, task: Any) -> Play:
        """An episode, which goes on to its first question by itself."""
        play = Play()
        self._live.add(play)
        play.first = asyncio.run_coroutine_threadsafe(self._begin(play, task), self.loop)
        return play

    def first(self, play: Play, name: str) -> Any:
        """What an episode asks first (messages), or what came of one that asks nothing."""
        with self._said(name):
            return play.first.result()

    def answer(self, plays: list[Play], texts: list[str], names: list[str]) -> list[Any]:
        """What each asks next, or its finished episode; all go on at once."""
        found = self._call(self._answer(plays, texts))
        for outcome, name in zip(found, names):
            if isinstance(outcome, BaseException):
                with self._said(name):
                    raise outcome
        return found

    @contextlib.contextmanager
    def _said(self, name: str):
        try:
            yield
        except TimeoutError:
            raise RewardFailure(
                f"{name}: the environment took more than {self.seconds:g} s; raise task.verifiers.seconds"
            ) from None

    def drop(self, play: Play) -> None:
        """Ends an episode that nobody asks any more. Waits for nothing: it may be called while memory is collected."""
        if not self.loop.is_closed() and self.thread.is_alive():
            _later(self.loop, lambda: self.loop.create_task(self._drop(play)))

    def close(self) -> None:
        """Ends the environment; what it shares over episodes is let go of."""
        atexit.unregister(self.close)
        if not self.thread.is_alive():
            return
        with contextlib.suppress(Exception):
            self._call(self._close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    async def _close(self) -> None:
        self._stop.set()
        for play in set(self.plays.values()):
            await self._drop(play)
        await asyncio.wait({self._serving}, timeout=10)
        await self._runner.cleanup()


ONE_SEAT = "one seat of an environment is the policy's; the others take task.options.env.SEAT.model and .client"


def _allow_open_files() -> None:
    """As many as the system lets this process have: the usual 1024 are 250 episodes."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limits here
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _later(loop: asyncio.AbstractEventLoop, work: Callable[[], Any]) -> None:
    with contextlib.suppress(RuntimeError):  # closed in between
        loop.call_soon_threadsafe(work)


def _completion(text: str, tools: bool) -> dict[str, Any]:
    """An answer as OpenAI has it; what the policy calls is read of its text where it was offered tools."""
    called = [call for call in calls(text) if not call.problem] if tools else []
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if called:
        message["tool_calls"] = [
            {"id": f"call-{i}", "type": "function", "function": {"name": c.name, "arguments": json.dumps(c.arguments)}}
            for i, c in enumerate(called)
        ]
    return {
        "id": "policy",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls" if called else "stop"}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }
