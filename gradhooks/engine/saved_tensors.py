"""Measure what autograd graphs keep alive."""

import sys
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Function = TypeVar("Function", bound=Callable[..., Any])


class _Saved(NamedTuple):
    """A saved tensor, and its version when it was saved."""

    tensor: Tensor
    version: int


@contextmanager
def record_saved_tensors(excluded: Container[int]) -> Iterator[dict[int, int]]:
    """Record the tensors that the graphs built in the block save for their backward.

    The graphs behave as they do without recording: derivatives of higher order, and the error for a tensor that was
    changed in place, which autograd itself does not check for saved tensors with hooks.

    Args:
        excluded: Storage addresses that do not count, such as those of the parameters.

    Yields:
        Bytes by storage address. Saved-tensor hooks, unlike a dispatch mode, do not disable `torch.compile`.
    """
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> _Saved:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            saved[storage.data_ptr()] = storage.nbytes()
        return _Saved(tensor.detach(), tensor._version)  # a node that saves its own output would be a reference cycle

    with torch.autograd.graph.saved_tensors_hooks(_not_compiled(record), _not_compiled(_unpack)):
        yield saved


def _not_compiled(function: Function) -> Function:
    """Return the function, which runs as it is where the code that calls it is being compiled."""
    if "torch._dynamo" not in sys.modules:  # importing it takes a second
        return function
    return cast("Function", torch.compiler.disable(function))


def _unpack(saved: _Saved) -> Tensor:
    if saved.tensor._version != saved.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
            f"of shape {tuple(saved.tensor.shape)} is at version {saved.tensor._version}; expected version "
            f"{saved.version} instead"
        )
    return saved.tensor


def storage_addresses(model: nn.Module, tensors: Iterable[Tensor] = ()) -> set[int]:
    """Return the storage addresses of the parameters and buffers of `model` and of `tensors`."""
    held = chain(tensors, model.parameters(), model.buffers())
    return {tensor.untyped_storage().data_ptr() for tensor in held if not is_lazy(tensor)}
