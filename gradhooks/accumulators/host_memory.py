"""HostMemory: one block of the host's memory for many tensors that come from a device."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 64


class HostMemory:
    """Gives out parts of few large blocks, since an allocation of pinned memory costs more than the copy into it.

    Args:
        block_bytes: The size of a block; a larger tensor gets a block of its own.
        pinned: Whether the memory is pinned, so that a device can copy into it while the host goes on.
    """

    def __init__(self, block_bytes: int, *, pinned: bool) -> None:
        self._block_bytes = block_bytes
        self._pinned = pinned
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor of this shape in the memory."""
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > len(self._block):
            self._block = torch.empty(max(size, self._block_bytes), dtype=torch.uint8, pin_memory=self._pinned)
            self._used = 0
        part = self._block[self._used : self._used + size]
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return part.view(dtype).view(tuple(shape))
