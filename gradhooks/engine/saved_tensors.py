"""Measure what autograd graphs keep alive."""

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


@contextmanager
def record_saved_tensors(excluded: Container[int]) -> Iterator[dict[int, int]]:
    """Record the tensors that the graphs built in the block save for their backward.

    Args:
        excluded: Storage addresses that do not count, such as those of the parameters.

    Yields:
        Bytes by storage address. Saved-tensor hooks, unlike a dispatch mode, do not disable `torch.compile`.
    """
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that saves its own output would otherwise be a reference cycle

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        yield saved


def storage_addresses(model: nn.Module, tensors: Iterable[Tensor] = ()) -> set[int]:
    """Return the storage addresses of the parameters and buffers of `model` and of `tensors`."""
    held = chain(tensors, model.parameters(), model.buffers())
    return {tensor.untyped_storage().data_ptr() for tensor in held}
