"""The ways by which weights travel to vLLM engines; weight_sync.py says when.

`GlooChannel` is ours, with its other end in vllm_worker.py. `VllmChannel` drives vLLM's own trainer side over NCCL or CUDA IPC,
and is as thin as that allows.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from amft_fast.rollout.vllm.weight_sync import FanOut, TensorSpec, TransferError, plan_buckets, unpack

LOCAL = ("127.0.0.1", "localhost", "::1")


def gloo_group(store: dist.Store, host: str, rank: int, world_size: int, timeout_s: float):
    """A gloo group apart from torch's global one, of the ranks that meet at `store`; returns once all are there."""
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=timeout_s)
    # Left alone, gloo asks for the host's own name, which may be another network than the one that was allowed.
    device = dist.ProcessGroupGloo.create_device
    options._devices = [device(hostname=host) if host in LOCAL else dist.ProcessGroupGloo.create_default_device()]
    return dist.ProcessGroupGloo(dist.PrefixStore("amft", store), rank, world_size, options)


def broadcast(group: Any, buffer: torch.Tensor) -> Any:
    """Starts to send `buffer` from rank 0 to all others; to be waited for."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return group.broadcast([buffer], options)


def meet(address: str, world_size: int, timeout_s: float) -> dist.Store:
    """The store at `file:PATH` (one machine, nothing listens) or `tcp:HOST:PORT`, as one who comes to it."""
    kind, _, rest = address.partition(":")
    if kind == "file":
        return dist.FileStore(rest, world_size)
    host, _, port = rest.rpartition(":")
    return dist.TCPStore(host, int(port), world_size, False, timeout=timedelta(seconds=timeout_s))


class GlooChannel:
    """Packed buckets over gloo: two buffers, one filled while the other one travels."""

    def __init__(self, fan: FanOut, specs: list[TensorSpec], host: str, bucket_bytes: int, timeout_s: float) -> None:
        self.fan, self.specs, self.timeout_s = fan, specs, timeout_s
        self.buckets = plan_buckets(specs, bucket_bytes)
        largest = max(b.size for b in self.buckets)
        self.buffers = [torch.empty(largest, dtype=torch.uint8, pin_memory=torch.cuda.is_available()) for _ in range(2)]
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="weight-sync-rpc")
        self.folder: Path | None = None
        world_size = 1 + sum(fan.sizes)
        address, store = self._listen(host, world_size)
        init = {
            "address": address,
            "host": host,
            "rank_offset": 1,
            "world_size": world_size,
            "bucket_bytes": bucket_bytes,
            "timeout_s": timeout_s,
        }
        joined = self.pool.submit(fan.init_weight_transfer_engine, init)
        try:
            self.group = gloo_group(store, host, 0, world_size, timeout_s)
        except RuntimeError as e:
            raise TransferError(
                _first(joined) or f"the engines did not join the group: {str(e).splitlines()[0]}"
            ) from e
        joined.result()

    def _listen(self, host: str, world_size: int) -> tuple[str, dist.Store]:
        if host in LOCAL:
            self.folder = Path(tempfile.mkdtemp(prefix="amft-gloo-"))
            path = str(self.folder / "store")
            return f"file:{path}", dist.FileStore(path, world_size)
        store = dist.TCPStore(host, 0, world_size, True, wait_for_workers=False)
        return f"tcp:{host}:{store.port}", store

    def send(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """One whole update. Raises TransferError; the group is of no use afterwards."""
        info = {
            "names": [s.name for s in self.specs],
            "dtype_names": [str(s.dtype).removeprefix("torch.") for s in self.specs],
            "shapes": [list(s.shape) for s in self.specs],
        }
        self.fan.start_weight_update()
        # An engine that fails leaves the group, which ends our wait for it, and ours the others'; only one that refuses without
        # leaving keeps us for the whole of timeout_s.
        update = self.pool.submit(self.fan.update_weights, info)
        try:
            self._broadcast(iter(tensors))
        except RuntimeError as e:
            raise TransferError(_first(update) or f"the transfer broke off: {str(e).splitlines()[0]}") from e
        update.result()
        self.fan.finish_weight_update()

    def _broadcast(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        works: list[Any] = [None, None]
        try:
            for k, bucket in enumerate(self.buckets):
                self._wait(works[k % 2])
                buffer = self.buffers[k % 2][: bucket.size]
                for (name, place), (got, tensor) in zip(unpack(buffer, bucket, self.specs), tensors):
                    assert name == got, (name, got)
                    place.copy_(tensor, non_blocking=True)
                if torch.cuda.is_available():
                    torch.cuda.current_stream().synchronize()
                works[k % 2] = broadcast(self.group, buffer)
            next(tensors, None)  # the stream's own check that nothing is left
            for work in works:
                self._wait(work)
        except BaseException:
            # Connections close with the last reference to the group, which each unfinished work holds too.
            works.clear()
            self.group = work = None
            raise

    def _wait(self, work: Any) -> None:
        if work is not None:
            work.wait(timedelta(seconds=self.timeout_s))

    def close(self) -> None:
        self.group = None  # closes the connections: gloo's abort() does not wake those who wait
        self.pool.shutdown(wait=False)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _first(future: Future) -> str:
    """What the engines' side said, when it has failed too: it knows better than a broken connection."""
    with contextlib.suppress(TimeoutError):
        error = future.exception(timeout=5.0)
        return "" if error is None else str(error)
    return ""


class VllmChannel:
    """vLLM's own trainer side for `nccl` and `ipc`, packed, within a bound of time that NCCL itself does not have."""

    def __init__(
        self,
        fan: FanOut,
        specs: list[TensorSpec],
        backend: str,
        host: str,
        bucket_bytes: int,
        timeout_s: float,
    ) -> None:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        class Source(WeightSource):
            tensors: Iterable[tuple[str, torch.Tensor]] = ()

            def metadata(self) -> list[ParamMeta]:
                return [ParamMeta(s.name, s.dtype, s.shape) for s in specs]

            def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                return iter(self.tensors)

        self.backend, self.timeout_s, self.source = backend, timeout_s, Source()
        if backend == "nccl":
            info = NCCLTrainerInitInfo(
                host, get_open_port(), 1 + sum(fan.sizes), packed_buffer_size_bytes=bucket_bytes, rank=0
            )
        else:  # one buffer holds the largest tensor, or vLLM refuses it
            largest = max(s.nbytes for s in specs)
            info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=max(bucket_bytes, largest), rank=0)
        self.engine = self._bounded(
            lambda: WeightTransferTrainerFactory.trainer_init(info, client=fan, source=self.source)
        )

    def send(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.source.tensors = tensors
        # vLLM packs on streams of its own, which do not wait for the optimizer's kernels.
        torch.cuda.current_stream().synchronize()
        self._bounded(self.engine.send_weights)

    def _bounded(self, call) -> Any:
        """The call in a thread on this device; TransferError when it takes longer than the bound."""
        device, box = torch.cuda.current_device(), Future()

        def run() -> None:
            try:
                torch.cuda.set_device(device)
                box.set_result(call())
            except BaseException as e:
                box.set_exception(e)

        # A daemon thread: one that hangs in NCCL must not keep the process from ending.
        threading.Thread(target=run, name="weight-sync-send", daemon=True).start()
        try:
            return box.result(self.timeout_s)
        except TimeoutError as e:
            raise TransferError(f"the {self.backend} transfer did not end within {self.timeout_s:g} s") from e

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.engine.shutdown()  # aborts the communicator
