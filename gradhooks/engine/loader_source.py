"""LoaderSource: poses of a DataLoader that reads a dataset in a known order, through its workers in both runs."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from gradhooks.errors import PosesError

Item = int | list[int]
"""An index of the dataset, or the indices of a batch."""
Range = tuple[int, int]


class LoaderSource:
    """A DataLoader that reads a dataset in a known order.

    The first run takes what the loader gives. The second run asks for the chunks of the first, last to first, which
    other workers read ahead in that order. What is asked for in another order is read without workers.

    Args:
        loader: The loader.
        items: What each of its items consists of.
    """

    keeps = False

    def __init__(self, loader: DataLoader[Any], items: Sequence[Item]) -> None:
        self._loader = loader
        self._items = items
        self._iterator: Iterator[Any] | None = iter(loader)  # draws a seed for the workers, as a loop over it does
        self._position = 0
        self._chunks: list[Range] = []
        self._newest: dict[int, Any] = {}  # a chunk that turns out too large is read again, in part
        self._read_ahead: Iterator[list[Any]] | None = None
        self._expected: list[Range] = []  # what `_read_ahead` gives, the next one last

    def __len__(self) -> int:
        return len(self._items)

    def read(self, indices: Sequence[int]) -> list[Any]:
        if self._iterator is None:
            self._newest = {}
            return self._read_again(indices)
        self._note_chunk(indices[0], indices[-1] + 1)
        self._newest = {index: self._next(index) for index in indices}
        return list(self._newest.values())

    def _note_chunk(self, start: int, stop: int) -> None:
        while self._chunks and self._chunks[-1][1] > start:  # the batch has started again, or the chunk was split
            self._chunks.pop()
        self._chunks.append((start, stop))

    def _next(self, index: int) -> Any:
        if index in self._newest:
            return self._newest[index]
        if self._iterator is None or index != self._position:
            return self._read_directly(index)
        try:
            pose = next(self._iterator)
        except StopIteration:
            raise PosesError(f"poses ended after {index} of the {len(self)} poses that len(poses) promises") from None
        self._position += 1
        if self._position == len(self):
            self._iterator = None  # ends the workers
        return pose

    def _read_again(self, indices: Sequence[int]) -> list[Any]:
        wanted = (indices[0], indices[-1] + 1)
        is_chunk = len(indices) == wanted[1] - wanted[0] and wanted in self._chunks
        if self._read_ahead is None and is_chunk and self._loader.num_workers and not self._expected:
            self._expected = self._chunks[: self._chunks.index(wanted) + 1]
            self._read_ahead = self._workers(self._expected[::-1])
        if self._read_ahead is not None and self._expected[-1] == wanted:
            self._expected.pop()
            poses = next(self._read_ahead)
            if not self._expected:
                self._read_ahead = None
            return poses
        self._read_ahead = None  # ends the workers; `_expected` stays, so that no others are started
        return [self._read_directly(index) for index in indices]

    def _workers(self, chunks: Sequence[Range]) -> Iterator[list[Any]]:
        """Yield the poses of chunks, which workers like those of the loader read ahead."""
        loader = self._loader
        items = [self._items[index] for start, stop in chunks for index in range(start, stop)]
        order: dict[str, Any] = (
            {"batch_size": None, "sampler": items} if loader.batch_sampler is None else {"batch_sampler": items}
        )
        again: DataLoader[Any] = DataLoader(
            loader.dataset,
            **order,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
            generator=torch.Generator(),  # the seed of the workers is not drawn from the model's random numbers
        )
        poses = iter(again)
        for start, stop in chunks:
            yield [next(poses) for _ in range(start, stop)]

    def _read_directly(self, index: int) -> Any:
        item, dataset = self._items[index], self._loader.dataset
        data = [dataset[each] for each in item] if isinstance(item, list) else dataset[item]
        return self._loader.collate_fn(data)


def items_in_order(loader: DataLoader[Any]) -> Sequence[Item] | None:
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
