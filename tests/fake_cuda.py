"""A CUDA device without memory: tensors of `FakeTensorMode` that know shape, type and device, and nothing else.

`fake_cuda()` is the context. In it the whole step runs as it would on a GPU, kernel launches excepted, which `Launch` stands
in for. What a CPU never shows raises an error there: operands on two devices, an argument of the wrong type for a kernel, a
function that lacks an argument in this version of torch, and a wait of the host for the device (`Waits`, which names the line).

Not shown: what kernels compute, streams, memory. Not to be done in it: copy.deepcopy of a model (torch copies storages that
are not there, and corrupts its heap).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).parent.parent
SHIM = "AMFT_FAKE_CUDA_SHIM"  # environment: the library that `build_shim` made


def build_shim(folder: Path) -> str | None:
    """The library of fake_cuda.cpp, or None without a C++ compiler."""
    home = Path(importlib.util.find_spec("torch").origin).parent
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "clang++", "c++") if c and shutil.which(c)), None)
    if compiler is None:
        return None
    out = folder / "fake_cuda.so"
    flags = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-I{home}/include", f"-L{home}/lib", f"-Wl,-rpath,{home}/lib"]
    source = str(ROOT / "tests" / "fake_cuda.cpp")
    done = subprocess.run(
        [compiler, *flags, source, "-o", str(out), "-lc10", "-ltorch_cpu"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return str(out)


if os.environ.get(SHIM):
    assert "torch" not in sys.modules, "the shim comes before torch"
    _shim = ctypes.CDLL(os.environ[SHIM])

import torch  # noqa: E402

if os.environ.get(SHIM):
    _shim.amft_set_guard()

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402


class HostWaitsError(AssertionError):
    """An operation for which the host waits until the device has caught up."""


class Waits(TorchDispatchMode):
    """Refuses what the host would wait for: reading a value, a result whose shape depends on values, a copy between host and
    device that is not from pinned memory and asynchronous. Counts the operations it saw in `seen`."""

    READS = frozenset(
        {"_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "equal", "is_nonzero", "unique_dim"}
        | {"_unique2", "unique_consecutive", "repeat_interleave", "bincount", "item"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        self.seen[name] = self.seen.get(name, 0) + 1
        why = self._why(name.partition("::")[2], args, kwargs)
        if why:
            raise HostWaitsError(f"{name} at {_line()}: {why}")
        return func(*args, **kwargs)

    def _why(self, op, args, kwargs):
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        on_device = any(isinstance(a, torch.Tensor) and a.device.type == "cuda" for a in args)
        if op in self.READS and on_device:
            return "the host reads a value of the device"
        indices = args[1] if op in ("index", "index_put_", "_index_put_impl_") and on_device else ()
        if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
            return "a mask as an index makes a shape that only the device knows"
        if op == "_to_copy":
            return self._copy(first, torch.device(kwargs.get("device") or first.device), kwargs.get("non_blocking"))
        if op == "copy_":
            return self._copy(args[1], first.device, args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        return None

    @staticmethod
    def _copy(source, target, asynchronous):
        if source.device.type == target.type:
            return None
        if target.type == "cpu":
            return "a copy to the host"
        if not asynchronous or not getattr(source, "pinned", False):
            return "a copy to the device that is not from pinned memory and asynchronous"
        return None


def _line() -> str:
    """The innermost line of the project on the stack."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.parent.name == "amft_kernels" or any(p in path.parents for p in (ROOT / "amft_fast", ROOT / "kernels")):
            return f"{path.name}:{frame.lineno} ({frame.name})"
    return "no line of the project"


def _pin(tensor: torch.Tensor, *_) -> torch.Tensor:
    tensor.pinned = True
    return tensor


class Launch:
    """Stands in for a Triton kernel: checks that the arguments are those of the kernel and of the types that its loads expect,
    and leaves the outputs, which have no contents here, as they are. `calls`: the arguments of every launch."""

    def __init__(self, kernel, model_dtype: torch.dtype) -> None:
        self.kernel, self.calls = kernel, []
        models = ("hidden_ptr", "weight_ptr", "grad_ptr", "bias_ptr", "out_ptr", "query_ptr", "keys_ptr", "values_ptr")
        self.types = dict.fromkeys(models, model_dtype)
        self.types |= {
            "targets_ptr": torch.int64,
            "position_ptr": torch.int64,
            "arrived_ptr": torch.int32,
        }  # others: fp32

    def __getitem__(self, grid):
        assert all(isinstance(n, int) and 0 < n < 2**31 for n in grid), grid
        return self._launch

    def _launch(self, **given):
        options = {"num_warps", "num_stages"}
        name = self.kernel.fn.__name__
        wanted, got = set(self.kernel.arg_names), set(given) - options
        if wanted != got:
            raise TypeError(f"{name}: arguments missing {sorted(wanted - got)}, unknown {sorted(got - wanted)}")
        for argument, value in given.items():
            if isinstance(value, torch.Tensor):
                self._check(name, argument, value)
            elif argument.endswith("_ptr") and value is not None:
                raise TypeError(f"{name}: {argument} is {type(value).__name__}, no tensor")
        self.calls.append(given)

    def _check(self, name, argument, tensor):
        wanted = self.types.get(argument, torch.float32)
        if tensor.device.type != "cuda" or tensor.dtype != wanted:
            raise TypeError(f"{name}: {argument} should be {wanted} on cuda, got {tensor.dtype} on {tensor.device}")
        if tensor.stride(-1) != 1:
            raise TypeError(f"{name}: {argument} is not dense, strides {tensor.stride()}")


class Products(TorchDispatchMode):
    """Matrix products in a wider type than their operands', which torch 2.11 has no right fake form of."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out):
            return func(*args, **kwargs)
        *tensors, dtype = (a for a in args if isinstance(a, (torch.Tensor, torch.dtype)))
        left, right, out = *tensors[-2:], kwargs["out"]
        if {t.device.type for t in (*tensors, out)} != {"cuda"}:
            raise RuntimeError(f"{func}: operands on {[str(t.device) for t in (*tensors, out)]}")
        if left.dtype != right.dtype or out.dtype != dtype or any(t.dtype != dtype for t in tensors[:-2]):
            raise RuntimeError(f"{func}: types {[t.dtype for t in (*tensors, out)]}, asked for {dtype}")
        if out.shape != (left.shape[0], right.shape[1]) or left.shape[1] != right.shape[0]:
            raise RuntimeError(f"{func}: shapes {[tuple(t.shape) for t in (*tensors, out)]}")
        return out


@contextlib.contextmanager
def fake_cuda(model_dtype: torch.dtype = torch.bfloat16):
    """Tensors made within, or moved to "cuda" there, are on a device that is not there. Gives the launches by kernel name."""
    from amft_kernels import decode_attention, fused_logprob_triton, rows_launch

    from amft_fast import multi_tensor
    from amft_fast.model import attention, layers

    rows = ("policy_rows_kernel", "policy_parts_kernel", "logprob_rows_kernel", "slab_grad_kernel")
    kernels = dict.fromkeys(rows, rows_launch) | {
        "fused_stats_kernel": fused_logprob_triton,
        "decode_attention_kernel": decode_attention,
    }
    launches = {name: Launch(getattr(module, name), model_dtype) for name, module in kernels.items()}
    properties = SimpleNamespace(total_memory=85_000_000_000, multi_processor_count=132, name="fake")
    with contextlib.ExitStack() as stack:
        for name, module in kernels.items():
            stack.enter_context(mock.patch.object(module, name, launches[name]))
        cuda = {"get_device_capability": lambda *_: (9, 0), "get_device_properties": lambda *_: properties}
        cuda["device"] = lambda *_: contextlib.nullcontext()
        for name, stand_in in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", _pin))
        # csrc is given addresses of memory, and there is none: torch's form of the probe serves, whether or not csrc was built.
        stack.enter_context(mock.patch.object(multi_tensor, "_library", lambda _: "tensors without memory"))
        for cached in (attention.backend, layers._dear):
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(Products())
        yield launches
