"""The poses of a batch in the forms that a user may pass, sliced into chunks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gradhooks.engine.model_output import describe
from gradhooks.engine.nested import map_tensors, tensors_in
from gradhooks.engine.prepared_input import PreparedInput
from gradhooks.errors import PosesError
from gradhooks.options import Collate

Stack = Tensor | Mapping[str, Tensor]


class Poses(Protocol):
    """The poses of a batch.

    Attributes:
        batched: Whether axis 0 of the model's output is the pose.
        collated: Whether a model's input is made by `collate`, of new memory, and not that of the user's poses.
        loaded: Whether a pose is read for each run and not kept.
    """

    batched: bool
    collated: bool
    loaded: bool

    def __len__(self) -> int: ...

    def slice(self, start: int, stop: int) -> Any:
        """Return the model's input for the poses `start .. stop - 1`."""

    def prepare(self, start: int, stop: int) -> int:
        """Return the bytes of the model's input for the poses `start .. stop - 1`, which the next `slice` returns."""

    def select(self, indices: Sequence[int]) -> Any:
        """Return the model's input for the poses at `indices`."""

    def original_index(self, index: int) -> int:
        """Return the index of a pose among those that the user passed."""

    def narrow(self, start: int, stop: int) -> "Poses":
        """Return the poses `start .. stop - 1`."""

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Poses":
        """Return the same poses with `function` applied to each tensor."""

    def change(self, index: int, function: Callable[[Tensor], Tensor]) -> "Poses":
        """Return the same poses with `function` applied to each tensor of one pose."""


class StackedPoses:
    """A tensor, or a mapping of tensors, whose axis 0 is the pose."""

    batched = True
    collated = loaded = False

    def __init__(self, stack: Stack, first: int = 0, length: int | None = None) -> None:
        self._stack = stack
        self._length = stack_length(stack) if length is None else length
        self._first = first

    def __len__(self) -> int:
        return self._length

    def slice(self, start: int, stop: int) -> Any:
        if start == 0 and stop == self._length:
            return self._stack
        return map_tensors(lambda tensor: tensor[start:stop], self._stack)

    def prepare(self, start: int, stop: int) -> int:
        return sum(tensor.nbytes for _, tensor in tensors_in(self.slice(start, stop)))

    def select(self, indices: Sequence[int]) -> Any:
        rows = torch.tensor(indices)
        # Not tensor[indices], which waits for the device.
        return map_tensors(
            lambda tensor: tensor.index_select(0, rows.to(tensor.device, non_blocking=True)), self._stack
        )

    def original_index(self, index: int) -> int:
        return self._first + index

    def narrow(self, start: int, stop: int) -> Poses:
        return StackedPoses(self.slice(start, stop), self._first + start)

    def shapes_and_dtypes(self) -> list[tuple[torch.Size, torch.dtype]]:
        """Return the shape and dtype of each tensor of a pose, without slicing the stack."""
        return [(tensor.shape[1:], tensor.dtype) for _, tensor in tensors_in(self._stack)]

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Poses:
        return StackedPoses(map_tensors(function, self._stack), self._first)

    def change(self, index: int, function: Callable[[Tensor], Tensor]) -> Poses:
        def changed(tensor: Tensor) -> Tensor:
            return tensor.detach().index_copy(
                0, torch.tensor([index], device=tensor.device), function(tensor[index : index + 1].detach())
            )

        return self.map_tensors(changed)


class ListedPoses:
    """A list of poses of any type; `collate` makes the model's input from several of them."""

    loaded = False

    def __init__(self, poses: Sequence[Any], collate: Collate | None, first: int = 0) -> None:
        self._poses = poses
        self._collate = collate
        self._first = first
        self._prepared = PreparedInput()
        self.batched = self.collated = collate is not None

    def __len__(self) -> int:
        return len(self._poses)

    def slice(self, start: int, stop: int) -> Any:
        return self._prepared.take(start, stop, lambda: self.select(range(start, stop)))

    def prepare(self, start: int, stop: int) -> int:
        return self._prepared.make(start, stop, lambda: self.select(range(start, stop)))

    def select(self, indices: Sequence[int]) -> Any:
        if self._collate is not None:
            return self._collate([self._poses[index] for index in indices])
        return self._poses[indices[0]]

    def original_index(self, index: int) -> int:
        return self._first + index

    def narrow(self, start: int, stop: int) -> Poses:
        return ListedPoses(self._poses[start:stop], self._collate, self._first + start)

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Poses:
        return ListedPoses([map_tensors(function, pose) for pose in self._poses], self._collate, self._first)

    def change(self, index: int, function: Callable[[Tensor], Tensor]) -> Poses:
        poses = list(self._poses)
        poses[index] = map_tensors(function, poses[index])
        return ListedPoses(poses, self._collate, self._first)


class PoseSubset:
    """Some poses of a batch, at `indices`."""

    def __init__(self, poses: Poses, indices: Sequence[int]) -> None:
        self._poses = poses
        self._indices = indices
        self.batched, self.collated, self.loaded = poses.batched, poses.collated, poses.loaded

    def __len__(self) -> int:
        return len(self._indices)

    def slice(self, start: int, stop: int) -> Any:
        indices = list(self._indices[start:stop])
        first, last = indices[0], indices[-1]
        is_contiguous = last - first == len(indices) - 1
        return self._poses.slice(first, last + 1) if is_contiguous else self._poses.select(indices)

    def prepare(self, start: int, stop: int) -> int:
        return sum(tensor.nbytes for _, tensor in tensors_in(self.slice(start, stop)))

    def select(self, indices: Sequence[int]) -> Any:
        return self._poses.select([self._indices[index] for index in indices])

    def original_index(self, index: int) -> int:
        return self._poses.original_index(self._indices[index])

    def narrow(self, start: int, stop: int) -> Poses:
        return PoseSubset(self._poses, self._indices[start:stop])

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Poses:
        return PoseSubset(self._poses.map_tensors(function), self._indices)

    def change(self, index: int, function: Callable[[Tensor], Tensor]) -> Poses:
        return PoseSubset(self._poses.change(self._indices[index], function), self._indices)


def inputs_that_require_grad(poses: Poses) -> list[Tensor]:
    """Return the tensors in the poses that require grad; none outside grad mode."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            found.append(tensor)
        return tensor

    if torch.is_grad_enabled():
        poses.map_tensors(collect)
    return found


def stack_length(stack: Stack) -> int:
    """Return the number of poses in a stack.

    Raises:
        PosesError: A tensor has no axis 0, or the lengths differ.
    """
    if isinstance(stack, Tensor) and stack.dim() > 0:
        return stack.shape[0]
    tensors = {"poses": stack} if isinstance(stack, Tensor) else stack
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            raise PosesError(
                f"a mapping of stacked poses must hold tensors with the poses along axis 0; {name!r} is "
                f"{describe(tensor)}; pass a list of mappings instead, one for each pose"
            )
    lengths = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(lengths.values())) > 1:
        raise PosesError(f"stacked poses must agree in the length of axis 0, got {lengths}")
    return next(iter(lengths.values()), 0)
