"""A vLLM server spoken to over HTTP: it samples, and carries the calls of a weight transfer (`weight_sync.Target`)."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import time
import urllib.parse
import weakref
from typing import Any

import numpy as np

from amft_fast.errors import UserError
from amft_fast.interfaces import Completion, Sampling
from amft_fast.rollout.vllm import adapter_sync
from amft_fast.rollout.vllm.groups import (
    EngineError,
    RequestGroup,
    as_url,
    asked_for,
    check,
    check_experts,
    check_prompt,
    sampling_settings,
    single_places,
)  # fmt: skip


def unpacked(text: Any) -> np.ndarray | None:
    """An array that came as .npy in base64; None for what is none."""
    try:
        return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
    except (TypeError, ValueError, EOFError):
        return None


def runs_of(labels: Any, tokens: int) -> tuple[tuple[int, int], ...]:
    """Runs (version, tokens) from the spans [start, end) of a sample that vLLM labels with the weights that drew them. Raises
    EngineError unless they are versions and cover the sample."""
    try:
        spans = [(label["version"], label["start"], label["end"]) for label in labels]
    except (TypeError, KeyError) as e:
        raise EngineError(f"garbage: weight versions {str(labels)[:80]}") from e
    if [start for _, start, _ in spans] + [tokens] != [0] + [end for *_, end in spans]:
        raise EngineError(f"garbage: weight versions {str(labels)[:80]} of {tokens} tokens")
    if not all(str(version).isdecimal() for version, *_ in spans):
        raise EngineError(f"has weights of version {spans[0][0]}, which it was not given")
    return tuple((int(version), end - start) for version, start, end in spans)


class HttpTarget:
    """A vLLM server. Connections are kept, one for each thread that calls; every call has its bound of time.

    `in_flight`: a pause holds what is drawn, which goes on afterwards, else it ends it; `recompute_kv`: what has been drawn
    is then read again.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        call_timeout_s: float,
        generate_timeout_s: float,
        image_token: int | None = None,
        in_flight: bool = False,
        recompute_kv: bool = False,
        replay: bool = False,
    ) -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise UserError(f"rollout.vllm.urls: expected http://HOST:PORT, got {url!r}")
        self.host, self.port = parts.hostname, parts.port or 80
        self.name = f"http://{self.host}:{self.port}"
        self.call_timeout_s, self.generate_timeout_s = call_timeout_s, generate_timeout_s
        self.image_token = image_token  # of a model that sees pictures
        self.in_flight, self.recompute_kv, self.replay = in_flight, recompute_kv, replay
        self._updates = 0  # how often it was given weights
        self.adapter: int | None = None  # version of the adapter that answers, where adapters are all that is sent
        self.headers = {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.vocabulary, self.max_model_len, self.model = 1 << 31, 1 << 31, ""
        self._local = threading.local()
        self._open: weakref.WeakSet[http.client.HTTPConnection] = weakref.WeakSet()
        self._opening = threading.Lock()
        self._size: int | None = None
        self._cuts = 0  # how often `abort` was called

    def request(
        self, method: str, path: str, body: Any = None, timeout_s: float | None = None, parse: bool = True
    ) -> Any:
        """The JSON answer; its text without `parse`. Raises EngineError when there is none in time, UserError when the server
        refuses the key."""
        timeout = timeout_s or self.call_timeout_s
        payload = None if body is None else json.dumps(body).encode()
        cuts = self._cuts
        while True:
            connection, kept = self._connection(timeout)
            try:
                connection.request(method, path, payload, self.headers)
                answer = connection.getresponse()
                data = answer.read()
                break
            except (OSError, http.client.HTTPException) as e:
                self._drop()
                # A kept connection may have been closed meanwhile: once more on a new one, unless it was cut on purpose.
                closed = isinstance(e, http.client.RemoteDisconnected | ConnectionResetError | BrokenPipeError)
                if not (kept and closed and cuts == self._cuts):
                    raise EngineError(f"{path}: {type(e).__name__} {e}".strip()) from e
        if answer.status == 403 and b"enable-scale-out" in data:
            raise UserError(f"rollout.vllm: {self.name} was not started with --enable-scale-out (docs/rollouts.md)")
        if answer.status in (401, 403):
            raise UserError(f"rollout.vllm: {self.name} refuses the API key (set rollout.vllm.api_key_env)")
        if answer.status != 200:
            raise (UserError if 400 <= answer.status < 500 else EngineError)(
                f"{self.name}{path}: status {answer.status}: {data[:300].decode(errors='replace')}"
            )
        if not parse:
            return data.decode(errors="replace")
        try:
            return json.loads(data) if data else None
        except ValueError as e:
            raise EngineError(f"{path}: garbage: {data[:80]!r}") from e

    def _connection(self, timeout: float) -> tuple[http.client.HTTPConnection, bool]:
        """This thread's connection, and whether it has been used before."""
        connection = getattr(self._local, "connection", None)
        kept = connection is not None and connection.sock is not None
        if connection is None:
            connection = self._local.connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
            with self._opening:
                self._open.add(connection)
        connection.timeout = timeout
        if kept:
            connection.sock.settimeout(timeout)
        return connection, kept

    def _drop(self) -> None:
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
        self._local.connection = None

    def generate(self, group: RequestGroup, sampling: Sampling) -> list[Completion]:
        """The samples of one group, each with the versions of the weights that drew it."""
        body = {
            "model": self.model if self.adapter is None else adapter_sync.name_of(self.adapter),
            "token_ids": single_places(group, self.image_token),
            "sampling_params": sampling_settings(group, sampling) | {"detokenize": False},
            "cache_salt": f"weights {self._updates}",  # a prompt reads no keys and values of older ones
        }
        if group.images:
            body["content_parts"] = [{"type": "image_url", "url": as_url(image)} for image in group.images]
            body["return_token_ids"] = True
        answer = self.request("POST", "/inference/v1/generate", body, self.generate_timeout_s)
        try:
            choices = sorted(answer["choices"], key=lambda c: c["index"])
            logprobs = [[token["logprob"] for token in c["logprobs"]["content"]] for c in choices]
            found = [(c["token_ids"], logprob, c["finish_reason"]) for c, logprob in zip(choices, logprobs)]
            indices, labels = [c["index"] for c in choices], [c["weight_versions"] for c in choices]
            routed = [c["routed_experts"] if self.replay else None for c in choices]
            check_prompt(answer["prompt_token_ids"] if group.images else None, group)
        except (TypeError, KeyError) as e:
            raise EngineError(f"garbage: {str(answer)[:80]}") from e
        count = asked_for(group, sampling)
        if indices != list(range(count)):
            raise EngineError(f"garbage: samples {indices} where {count} were asked for")
        samples = []
        for sample, label, packed in zip(found, labels, routed):
            ids, drawn, reason = check(*sample, group, self.vocabulary)
            # An adapter of another version has another name.
            runs = runs_of(label, len(ids)) if self.adapter is None else ((self.adapter, len(ids)),)
            tokens = len(group.prompt_ids) + len(ids)
            where = check_experts(unpacked(packed), tokens) if self.replay else None
            samples.append(Completion(ids, drawn, reason, min(v for v, _ in runs), versions=runs, experts=where))
        return samples * (len(group.members) // count)

    def abort(self) -> None:
        """Cuts all connections, so that threads which wait for an answer wait no longer."""
        self._cuts += 1
        with self._opening:
            connections = list(self._open)
        for connection in connections:
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def describe(self, vocabulary: int) -> None:
        """Asks a server that has just come up what it serves."""
        answer = self.request("GET", "/v1/models")
        try:
            self.model, self.max_model_len = answer["data"][0]["id"], answer["data"][0]["max_model_len"]
        except (TypeError, KeyError, IndexError) as e:
            raise EngineError(f"garbage: {str(answer)[:80]}") from e
        self.vocabulary, self._size = vocabulary, None

    def alive(self, timeout_s: float) -> str:
        """ "ok", or why not."""
        try:
            self.request("GET", "/health", timeout_s=timeout_s)
            return "ok"
        except (EngineError, UserError) as e:
            return str(e)

    def world_size(self) -> int:
        if self._size is None:
            self._size = int(self.request("GET", "/get_world_size")["world_size"])
        return self._size

    def pause(self) -> None:
        """Nothing is drawn when this returns. What was begun is given up; in flight it is held, and goes on at `resume`."""
        keep = f"keep&clear_cache={str(self.recompute_kv).lower()}"
        self.request("POST", f"/pause?mode={keep if self.in_flight else 'abort'}")

    def resume(self) -> None:
        self.request("POST", "/resume")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.request("POST", "/init_weight_transfer_engine", {"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        self.request("POST", "/shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        self.request("POST", "/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if update_info.get("ipc_handles") is not None:  # CUDA handles are no JSON: vLLM takes them pickled
            from vllm.distributed.weight_transfer.clients import _json_safe_update_info

            update_info = _json_safe_update_info(update_info)
        self.request("POST", "/update_weights", {"update_info": update_info})

    def missing(self) -> list[str]:
        answer = self.request("POST", "/collective_rpc", {"method": "amft_missing"})
        return [name for worker in answer["results"] for name in worker]

    def finish_weight_update(self, version: str | None) -> None:
        self.request("POST", "/finish_weight_update", {"weight_version": version})
        self._updates += 1

    def load_adapter(self, path: str, version: int) -> None:
        name, old = adapter_sync.name_of(version), self.adapter
        self._drop_adapter(name)  # of an attempt before
        self.request("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, parse=False)
        self.use_adapter(version)
        if old is not None and old != version:
            self._drop_adapter(adapter_sync.name_of(old))

    def use_adapter(self, version: int) -> None:
        """Answers are asked of this one, which another rank has loaded."""
        self.adapter = version
        self._updates += 1

    def _drop_adapter(self, name: str) -> None:
        with contextlib.suppress(EngineError, UserError):
            self.request("POST", "/v1/unload_lora_adapter", {"lora_name": name}, parse=False)

    def reset_caches(self) -> None:
        if self.in_flight:  # the pause has cleared them, or the salt sees to it
            return
        # Blocks are freed a moment after the last request has gone.
        for pause in (0, 0.02, 0.1, 0.5):
            time.sleep(pause)
            if self.request("POST", "/reset_prefix_cache")["success"]:
                break
        else:
            raise EngineError("the prefix cache could not be reset: requests are still running")
        if self.image_token is not None:
            for path in ("/reset_mm_cache", "/reset_encoder_cache"):
                self.request("POST", path)

    def weight_version(self) -> str:
        if self.adapter is not None:
            served = {m["id"] for m in self.request("GET", "/v1/models")["data"]}
            return str(self.adapter) if adapter_sync.name_of(self.adapter) in served else "none"
        return str(self.request("GET", "/weight_info")["weight_version"])
