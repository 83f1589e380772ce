"""PoseSource: where poses that are not all in memory come from, and how one is read again.

Rules:
    1. A first run reads the poses in order, each when its chunk is about to run; a second run asks for them by index.
    2. A pose that is read again must be the same pose. What is read inside a run may draw from the generators that a
       second run restores; what the workers of a DataLoader draw cannot be repeated, and is found as drift.
    3. What cannot be read again must not draw from those generators while a run reads it. So a generator is no source
       (its poses are read before the first forward), and neither is a DataLoader without workers in random order.
"""

from collections import UserList, deque
from collections.abc import Iterator, Sequence, Sized
from itertools import islice
from typing import Any, Protocol

from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from gradhooks.errors import PosesError

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


class LoaderSource:
    """A DataLoader that reads a dataset in a known order: first through its workers, later from the dataset.

    Args:
        loader: The loader.
        items: What each of its items consists of: an index of the dataset, or the indices of a batch.
    """

    keeps = False

    def __init__(self, loader: DataLoader[Any], items: Sequence[int | list[int]]) -> None:
        self._loader = loader
        self._items = items
        self._iterator: Iterator[Any] | None = iter(loader)  # draws a seed for the workers, as a loop over it does
        self._position = 0
        self._newest: dict[int, Any] = {}  # a chunk that turns out too large is read again, in part

    def __len__(self) -> int:
        return len(self._items)

    def read(self, indices: Sequence[int]) -> list[Any]:
        poses = {index: self._read(index) for index in indices}
        self._newest = poses if self._iterator is not None else {}
        return list(poses.values())

    def _read(self, index: int) -> Any:
        if index in self._newest:
            return self._newest[index]
        if self._iterator is None or index != self._position:
            return self._read_again(index)
        try:
            pose = next(self._iterator)
        except StopIteration:
            raise _ended(index, len(self)) from None
        self._position += 1
        if self._position == len(self):
            self._iterator = None  # ends the workers
        return pose

    def _read_again(self, index: int) -> Any:
        item, dataset = self._items[index], self._loader.dataset
        data = [dataset[each] for each in item] if isinstance(item, list) else dataset[item]
        return self._loader.collate_fn(data)


class KeptSource:
    """A DataLoader whose workers read in an order that cannot be repeated: what was read is kept.

    Args:
        loader: The loader. Its first pose is read at once, since its sampler may draw a seed for that.
    """

    keeps = True

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._iterator = iter(loader)
        self._count = len(loader)
        self._poses: list[Any] = []
        self.read([0])

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> list[Any]:
        stop = max(indices) + 1
        self._poses += islice(self._iterator, max(0, stop - len(self._poses)))
        if len(self._poses) < stop:
            raise _ended(len(self._poses), self._count)
        if stop == self._count and next(self._iterator, self) is not self:
            raise PosesError(f"poses has more than the {self._count} poses that len(poses) promises")
        return [self._poses[index] for index in indices]


def source_of(poses: Any) -> PoseSource | None:
    """Return the source of poses that are read while they run; None if they are in memory, or must be read before."""
    if isinstance(poses, _IN_MEMORY):
        return None
    length = _length(poses)
    if not length:
        return None
    if isinstance(poses, DataLoader):
        items = _items_in_order(poses)
        if items is not None:
            return LoaderSource(poses, items)
        return KeptSource(poses) if poses.num_workers else None
    # What has keys is asked for by key, not by position.
    return IndexedSource(poses) if hasattr(poses, "__getitem__") and not hasattr(poses, "keys") else None


def _length(poses: Any) -> int | None:
    if not isinstance(poses, Sized):
        return None
    try:
        return len(poses)
    except (TypeError, NotImplementedError):  # a DataLoader over a dataset without a length
        return None


def _items_in_order(loader: DataLoader[Any]) -> Sequence[int | list[int]] | None:
    """Return what each item of a loader consists of, if that is the same in each pass; None if it is not."""
    sampler, batches = loader.sampler, loader.batch_sampler
    if isinstance(sampler, SequentialSampler):
        indices: Sequence[int] = range(len(sampler))
    elif isinstance(sampler, (list, tuple, range)):
        indices = sampler
    else:
        return None
    if batches is None:
        return indices
    if type(batches) is not BatchSampler:
        return None
    return list(BatchSampler(indices, batches.batch_size, batches.drop_last))


def _ended(found: int, count: int) -> PosesError:
    return PosesError(f"poses ended after {found} of the {count} poses that len(poses) promises")
