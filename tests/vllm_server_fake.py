"""A stand-in for vLLM servers in processes of their own, for faults without vLLM.

`python vllm_server_fake.py` reads lines "PORT VOCABULARY" and forks a server for each, whose process id it prints: torch is
imported once. A server speaks the routes that `HttpTarget` uses, receives weights over a real gloo group, and answers with
tokens that are a hash of (prompt, seed, sample, weights), so that a test can tell which weights drew a token. A pause holds
what is drawn, token by token. `POST /fault {...}` makes it misbehave, `GET /paused` tells how it was paused.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from amft_fast.rollout.vllm import weight_sync as ws
from amft_fast.rollout.vllm.channels import broadcast, gloo_group, meet


def tokens(prompt, seed, index, weights, length, vocabulary):
    digest = hashlib.blake2b(json.dumps([prompt, seed + index, weights]).encode(), digest_size=32).digest()
    return [d % vocabulary for d in digest[: max(1, min(length, 32))]]


class Server:
    def __init__(self, vocabulary):
        self.vocabulary, self.fault, self.served, self.worker = vocabulary, {}, 0, threading.Lock()
        self.tensors, self.version, self.group, self.info, self.active = {}, "default", None, None, False
        self.running, self.stepping, self.pauses = threading.Event(), threading.Lock(), []
        self.running.set()

    @property
    def weights(self):
        """A number that tells one set of weights from another."""
        return float(sum(t.double().sum() for t in self.tensors.values()))

    def complete(self, body):
        self.served += 1
        asked, count = body["sampling_params"], max(1, min(body["sampling_params"]["max_tokens"], 32))
        ids, labels = [[] for _ in range(asked["n"])], []
        while len(labels) < count:
            time.sleep(self.fault.get("slow", 0) / count)
            self.running.wait()
            with self.stepping:
                if self.running.is_set():
                    prompt, weights = body["token_ids"], self.weights
                    for i, own in enumerate(ids):
                        own.append(tokens(prompt, asked["seed"], i, weights, count, self.vocabulary)[len(own)])
                    labels.append(self.version)
        if self.served > self.fault.get("die_after", 1 << 30):
            os._exit(3)
        starts = [i for i in range(count) if i == 0 or labels[i] != labels[i - 1]]
        spans = [{"version": labels[a], "start": a, "end": b} for a, b in zip(starts, [*starts[1:], count])]
        logprobs = {"content": [{"logprob": -0.5}] * count}
        common = {"finish_reason": "length", "weight_versions": spans}
        choices = [{"index": i, "token_ids": own, "logprobs": logprobs, **common} for i, own in enumerate(ids)]
        kind = self.fault.get("garbage")
        if kind == "token":
            choices[-1]["token_ids"][0] = 10**6
        elif kind == "logprob":
            choices[-1]["logprobs"] = {"content": [{"logprob": None}] * count}
        elif kind == "label":
            choices[-1]["weight_versions"] = [{"version": "0", "start": 0, "end": count + 1}]
        elif kind == "count":
            choices.pop()
        elif kind == "shape":
            return {"choices": [{"text": "hello"}]}
        elif kind == "json":
            return b"<html>bad gateway</html>"
        return {"choices": choices}

    def update(self, info):
        if not self.active:
            raise RuntimeError("start_weight_update must be called before update_weights.")
        kinds = [getattr(torch, d) for d in info["dtype_names"]]
        specs = [ws.TensorSpec(n, d, tuple(s)) for n, d, s in zip(info["names"], kinds, info["shapes"])]
        try:
            for k, bucket in enumerate(ws.plan_buckets(specs, self.info["bucket_bytes"])):
                if k == self.fault.get("die_at_bucket"):
                    os._exit(4)
                buffer = torch.empty(bucket.size, dtype=torch.uint8)
                broadcast(self.group, buffer).wait()
                self.tensors |= dict(ws.unpack(buffer, bucket, specs))
        except BaseException:
            self.group, self.active = None, False
            raise

    def handle(self, path, body):
        path, _, query = path.partition("?")
        if path == "/pause":
            self.pauses.append(query)
            with self.stepping:
                self.running.clear()
            return {}
        if path == "/resume":
            self.running.set()
            return {}
        if path == "/paused":
            return {"paused": self.pauses}
        if path == "/inference/v1/generate":
            return self.complete(body)
        if path == "/v1/models":
            return {"data": [{"id": "fake", "max_model_len": 256}]}
        if path == "/get_world_size":
            return {"world_size": 1}
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/collective_rpc":
            return {"results": [[]]}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/fault":
            self.fault = body
            return {}
        if path == "/health":
            return {}
        with self.worker:
            return self.handle_weights(path, body)

    def handle_weights(self, path, body):
        """One at a time, as a worker does."""
        if path == "/init_weight_transfer_engine":
            self.info = body["init_info"]
            store = meet(self.info["address"], self.info["world_size"], self.info["timeout_s"])
            args = self.info["host"], self.info["rank_offset"], self.info["world_size"], self.info["timeout_s"]
            self.group = gloo_group(store, *args)
        if path == "/start_weight_update":
            if self.active:
                raise RuntimeError("start_weight_update called while a weight update is already active.")
            self.active = True
        if path == "/update_weights":
            self.update(body["update_info"])
        if path == "/finish_weight_update":
            if not self.active:
                raise RuntimeError("finish_weight_update called without a matching start_weight_update.")
            self.active, self.version = False, body["weight_version"] or self.version
        return {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(None)

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null"))

    def answer(self, body):
        try:
            status, result = 200, self.server.state.handle(self.path, body)
        except Exception as e:
            status, result = 500, {"error": str(e)}
        data = result if isinstance(result, bytes) else json.dumps(result).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def serve(port, vocabulary):
    ThreadingHTTPServer.request_queue_size = 128
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    server.state = Server(vocabulary)
    server.serve_forever()


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the servers
    for line in sys.stdin:
        if pid := os.fork():
            print(pid, flush=True)
        else:
            os.setsid()
            serve(*map(int, line.split()))
