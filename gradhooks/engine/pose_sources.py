"""PoseSource: where poses that are not all in memory come from, and how one is read again.

Rules:
    1. A first run reads the poses in order, each when its chunk is about to run; a second run asks for them by index.
    2. A pose that is read again must be the same pose. What is read inside a run may draw from the generators that a
       second run restores; what the workers of a DataLoader draw cannot be repeated, and is found as drift.
    3. What cannot be read again must not draw from those generators while a run reads it: a batch that starts again
       restores them, and would read other poses than without a restart. What draws is read to its end at once.
"""

from collections import UserList, deque
from collections.abc import Iterable, Sequence, Sized
from itertools import islice
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader

from gradhooks.engine.loader_source import LoaderSource, items_in_order
from gradhooks.errors import PosesError
from gradhooks.random_state import default_source, global_sources

_IN_MEMORY = (list, tuple, deque, UserList, nn.Module)


class PoseSource(Protocol):
    """Reads poses by their indices.

    Attributes:
        keeps: Whether all poses that were read stay in memory.
    """

    keeps: bool

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[Any]:
        """Return the poses at `indices`."""


class IndexedSource:
    """An object with `__getitem__` and a length, such as a Dataset, which is asked for a pose every time.

    Args:
        poses: The object. If it has `__getitems__`, as datasets of PyTorch may, that reads several poses at once.
    """

    keeps = False

    def __init__(self, poses: Any) -> None:
        self._poses = poses

    def __len__(self) -> int:
        return len(self._poses)

    def read(self, indices: Sequence[int]) -> list[Any]:
        read_several = getattr(self._poses, "__getitems__", None)
        if read_several is not None and len(indices) > 1:
            return list(read_several(list(indices)))
        return [self._poses[index] for index in indices]


class KeptSource:
    """An iterable whose poses cannot be asked for again, such as a generator: what was read is kept.

    Args:
        poses: The iterable. Its first pose is read at once, the first two of a DataLoader.
        count: The number of poses.
        promise: What says so, for messages.
        devices: Those whose random generators a run restores.
    """

    keeps = True

    def __init__(self, poses: Iterable[Any], count: int, promise: str, devices: Iterable[torch.device]) -> None:
        self._iterator = iter(poses)
        self._count = count
        self._promise = promise
        self._poses: list[Any] = []
        self._generators = [*map(default_source, devices), *global_sources()]
        first = 0
        if isinstance(poses, DataLoader):  # its sampler may draw a seed before the first pose
            self._advance(1)
            first = min(1, count - 1)
        self.read([first])

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> list[Any]:
        stop = max(indices) + 1
        if stop > len(self._poses):
            before = [generator.get() for generator in self._generators]
            self._advance(stop)
            pairs = zip(self._generators, before, strict=True)
            if any(generator.read_if_changed(state) is not state for generator, state in pairs):
                self._advance(self._count)  # Rule 3
        return [self._poses[index] for index in indices]

    def _advance(self, stop: int) -> None:
        """Read until `stop` poses are kept."""
        self._poses += islice(self._iterator, max(0, stop - len(self._poses)))
        if len(self._poses) < stop:
            raise PosesError(f"poses ended after {len(self._poses)} of the {self._count} poses that {self._promise}")
        if stop == self._count and next(self._iterator, self) is not self:
            raise PosesError(f"poses has more than the {self._count} poses that {self._promise}")


def source_of(poses: Any, count: int | None, devices: Iterable[torch.device]) -> PoseSource | None:
    """Return the source of poses that are read while they run; None if they are in memory, or must be read before.

    Args:
        poses: What the user passed.
        count: The number of poses, if group numbers were passed with them.
        devices: Those whose random generators a run restores.
    """
    if isinstance(poses, _IN_MEMORY):
        return None
    length = _length(poses)
    if isinstance(poses, DataLoader) and length:
        items = items_in_order(poses)
        if items is not None:
            return LoaderSource(poses, items)
    # What has keys is asked for by key, not by position.
    elif length and hasattr(poses, "__getitem__") and not hasattr(poses, "keys"):
        return IndexedSource(poses)
    if length:
        return KeptSource(poses, length, "len(poses) promises", devices)
    return KeptSource(poses, count, "have a group number", devices) if count and length is None else None


def _length(poses: Any) -> int | None:
    if not isinstance(poses, Sized):
        return None
    try:
        return len(poses)
    except (TypeError, NotImplementedError):  # a DataLoader over a dataset without a length
        return None
