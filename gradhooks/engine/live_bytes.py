"""LiveBytes: counts the bytes of the tensors that operations return, from their creation to their release."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages. A storage first seen as an input is older than the block and counts 0.

    Args:
        device_type: The kind of device whose storages count.

    Attributes:
        live: Bytes that are alive now.
        peak: The largest value of `live` so far.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.peak = self.live = 0
        self._device_type = device_type
        self._sizes: dict[int, int] = {}  # by address, which is unique while the storage lives; -1 if not counted

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        # `torch.tensor(...)` allocates outside dispatch; its result first appears as the input of `lift_fresh`.
        if func is not torch.ops.aten.lift_fresh.default:
            self._record((args, kwargs), counts=False)
        outputs = func(*args, **(kwargs or {}))
        self._record(outputs, counts=True)
        return outputs

    def _record(self, tree: Any, *, counts: bool) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided and leaf.device.type == self._device_type:
                self._record_storage(leaf.untyped_storage(), counts)

    def _record_storage(self, storage: torch.UntypedStorage, counts: bool) -> None:
        address = storage._cdata
        if address not in self._sizes:
            weakref.finalize(storage, self._on_release, address).atexit = False
            self._sizes[address] = 0 if counts else -1
        size = self._sizes[address]
        if size >= 0 and storage.nbytes() != size:  # new, or resized by `out=`
            self._sizes[address] = storage.nbytes()
            self.live += storage.nbytes() - size
            self.peak = max(self.peak, self.live)

    def _on_release(self, address: int) -> None:
        self.live -= max(self._sizes.pop(address), 0)
