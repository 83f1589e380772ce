"""Measure how much memory a piece of code needs; on a CPU counted to the byte."""

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import Self


class PeakMemory:
    """Measures the peak of the tensor memory that a `with` block allocates, in addition to what existed before.

    On CUDA it reads the statistics of the caching allocator. On a CPU the resident size of the process shows nothing
    below 100 MB, so it counts the storages that operations return, from their creation to their release: the same
    number in every run.

    >>> with PeakMemory() as memory:
    ...     total = torch.ones(1000).exp().sum()
    >>> memory.peak
    8000

    On a CPU it does not see three things: what a kernel allocates and frees before it returns, the memory of `numpy`,
    and operations in threads other than the one that entered the block. A backward on CPU tensors runs in the calling
    thread, also where one backward runs inside another. Counting slows operations down, so time a block without it.
    Compiled code runs uncompiled inside the block; without that, it would stay uncompiled after the block.

    Args:
        device: The device whose memory is measured.

    Attributes:
        peak: Bytes. On CUDA it is set at the end of the block.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._counter: _StorageCounter | None = None
        self._before = self._cuda_peak = 0

    @property
    def peak(self) -> int:
        return self._cuda_peak if self._counter is None else self._counter.peak

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._eager = torch.compiler.set_stance("force_eager")
            self._eager.__enter__()
            self._counter = _StorageCounter(self._device.type)
            self._counter.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._counter is not None:
            self._counter.__exit__(kind, error, trace)
            self._eager.__exit__(kind, error, trace)
        else:
            torch.cuda.synchronize(self._device)
            self._cuda_peak = torch.cuda.max_memory_allocated(self._device) - self._before


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the peak of the memory that `step` allocates, in addition to what exists before it."""
    with PeakMemory(device) as memory:
        step()
    return memory.peak


class _StorageCounter(TorchDispatchMode):
    """Counts the bytes of live storages. A storage first seen as an input is older than the block and counts 0."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.peak = self._live = 0
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
            self._live += storage.nbytes() - size
            self.peak = max(self.peak, self._live)

    def _on_release(self, address: int) -> None:
        self._live -= max(self._sizes.pop(address), 0)
