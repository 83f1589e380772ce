"""Measure how much memory a piece of code needs; on a CPU counted to the byte."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from typing_extensions import Self

from gradhooks.engine.live_bytes import LiveBytes


class PeakMemory:
    """Measures the peak of the tensor memory that a `with` block allocates, in addition to what existed before.

    On a device it reads the statistics of its allocator. On a CPU the resident size of the process shows nothing
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
        peak: Bytes. On a device it is set at the end of the block.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._counter: LiveBytes | None = None
        self._before = self._device_peak = 0
        module = None if self._device.type == "cpu" else torch.get_device_module(self._device)
        self._statistics: Any = module if hasattr(module, "max_memory_allocated") else None

    @property
    def peak(self) -> int:
        return self._device_peak if self._counter is None else self._counter.peak

    def __enter__(self) -> Self:
        if self._statistics is not None:
            self._statistics.synchronize(self._device)
            self._statistics.reset_peak_memory_stats(self._device)
            self._before = self._statistics.memory_allocated(self._device)
        else:
            self._eager = torch.compiler.set_stance("force_eager")
            self._eager.__enter__()
            self._counter = LiveBytes(self._device.type)
            self._counter.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._counter is not None:
            self._counter.__exit__(kind, error, trace)
            self._eager.__exit__(kind, error, trace)
        else:
            self._statistics.synchronize(self._device)
            self._device_peak = self._statistics.max_memory_allocated(self._device) - self._before


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the peak of the memory that `step` allocates, in addition to what exists before it."""
    with PeakMemory(device) as memory:
        step()
    return memory.peak
