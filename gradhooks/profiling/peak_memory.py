"""PeakMemory."""

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
    """Measures the peak of the tensor memory that a `with` block allocates, beyond what was there before.

    On CUDA it asks the caching allocator. On a CPU, where the resident size of the process shows nothing below 100 MB,
    it counts the storages that operations return, from their creation to their end: the same number in every run.

    >>> with PeakMemory() as memory:
    ...     total = torch.ones(1000).exp().sum()
    >>> memory.peak
    8000

    On a CPU three things go unseen: what a kernel allocates and frees again before it returns, the memory of `numpy`,
    and operations in threads other than the one that entered the block. A backward on CPU tensors runs in the calling
    thread, also where one runs inside another. The count slows operations down, so time a block without it; what is
    compiled runs uncompiled in it, or it would stay so afterwards.

    Args:
        device: Whose memory.

    Attributes:
        peak: Bytes. On CUDA known when the block has ended.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._storages: _Storages | None = None
        self._before = self._cuda_peak = 0

    @property
    def peak(self) -> int:
        return self._cuda_peak if self._storages is None else self._storages.peak

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._eager = torch.compiler.set_stance("force_eager")
            self._eager.__enter__()
            self._storages = _Storages(self._device.type)
            self._storages.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._storages is not None:
            self._storages.__exit__(kind, error, trace)
            self._eager.__exit__(kind, error, trace)
        else:
            torch.cuda.synchronize(self._device)
            self._cuda_peak = torch.cuda.max_memory_allocated(self._device) - self._before


class _Storages(TorchDispatchMode):
    """Counts live storages. One that is first seen as an input is older than the block, and counts nothing."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._device_type = device_type
        self._sizes: dict[int, int] = {}  # by address, which is unique for as long as the storage lives

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        # `torch.tensor(...)` allocates out of sight and shows its result first as the input of this operation.
        if func is not torch.ops.aten.lift_fresh.default:
            self._note((args, kwargs), counts=False)
        outputs = func(*args, **(kwargs or {}))
        self._note(outputs, counts=True)
        return outputs

    def _note(self, tree: Any, *, counts: bool) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided and leaf.device.type == self._device_type:
                self._note_storage(leaf.untyped_storage(), counts)

    def _note_storage(self, storage: torch.UntypedStorage, counts: bool) -> None:
        address = storage._cdata
        if address not in self._sizes:
            weakref.finalize(storage, self._forget, address).atexit = False
            self._sizes[address] = 0 if counts else -1
        known = self._sizes[address]
        if known >= 0 and storage.nbytes() != known:  # new, or resized by `out=`
            self._sizes[address] = storage.nbytes()
            self._live += storage.nbytes() - known
            self.peak = max(self.peak, self._live)

    def _forget(self, address: int) -> None:
        self._live -= max(self._sizes.pop(address), 0)
