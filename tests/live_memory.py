"""The bytes of all tensor storages alive at once, counted at the dispatcher: a memory profiler that works on a CPU."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """`now` and `peak`: bytes of the storages made inside the block that are alive, and the most there ever were."""

    def __init__(self, known=()):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor):
                if t.layout == torch._mkldnn:  # oneDNN's own, which shows no storage
                    self._see(t, id(t), t.numel() * t.element_size())
                else:
                    storage = t.untyped_storage()
                    self._see(storage, storage._cdata, storage.nbytes())
        return out

    def _see(self, owner, key, size):
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(owner, self._drop, key, size)

    def _drop(self, key, size):
        self.seen.discard(key)
        self.now -= size
