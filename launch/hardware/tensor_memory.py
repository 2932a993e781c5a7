"""Bytes of the tensors that exist while code runs, on any device and for fake tensors too."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Context that counts the bytes of distinct storages of tensors: those that operations in it create, and those that `add` is given.

    now: bytes at present; peak: the most so far, since `restart` if called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[weakref.ref[Any], int] = {}
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were created outside of the context."""
        for tensor in tensors:
            if tensor.device.type == "meta":  # has no memory
                continue
            storage = tensor.untyped_storage()
            known = self._known.get(id(storage))
            if known is not None and known() is storage:
                self._resize(known, storage.nbytes())
                continue
            reference = weakref.ref(storage, self._forget)
            self._known[id(storage)] = reference
            self._sizes[reference] = 0
            self._resize(reference, storage.nbytes())

    def restart(self) -> None:
        """Look for the peak from here on."""
        self.peak = self.now

    def _resize(self, reference: weakref.ref[Any], size: int) -> None:
        self.now += size - self._sizes[reference]
        self._sizes[reference] = size
        self.peak = max(self.peak, self.now)

    def _forget(self, reference: weakref.ref[Any]) -> None:
        self.now -= self._sizes.pop(reference)
