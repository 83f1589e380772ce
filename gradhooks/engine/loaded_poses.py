"""LoadedPoses: poses that are read while they run, chunk by chunk, and read again for a second run."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradhooks.engine.nested import map_tensors, tensors_in
from gradhooks.engine.pose_inputs import Poses
from gradhooks.engine.pose_sources import PoseSource
from gradhooks.engine.prepared_input import PreparedInput
from gradhooks.errors import PosesError
from gradhooks.options import Collate

Change = Callable[[int, Any], Any]
"""Returns a changed pose, given its index and the pose."""


class LoadedPoses:
    """Poses of a source.

    A tensor that requires grad must be the same object in both runs, so such poses are refused where they are
    intercepted; where they run plainly they are as in PyTorch.

    Args:
        source: Where the poses come from.
        collate: Makes the model's input from a list of poses.
        indices: Which poses of the source these are; all by default.
        changes: What is done to each pose that was read, in order.
    """

    def __init__(
        self,
        source: PoseSource,
        collate: Collate | None,
        indices: range | None = None,
        changes: tuple[Change, ...] = (),
    ) -> None:
        self._source = source
        self._collate = collate
        self._indices = range(len(source)) if indices is None else indices
        self._changes = changes
        self._prepared = PreparedInput()
        self.batched = self.collated = collate is not None
        self.loaded = not source.keeps

    def __len__(self) -> int:
        return len(self._indices)

    def slice(self, start: int, stop: int) -> Any:
        return self._prepared.take(start, stop, lambda: self.select(range(start, stop)))

    def prepare(self, start: int, stop: int) -> int:
        return self._prepared.make(start, stop, lambda: self.select(range(start, stop)))

    def select(self, indices: Sequence[int]) -> Any:
        positions = [self._indices[index] for index in indices]
        poses = self._source.read(positions)
        for change in self._changes:
            poses = [change(index, pose) for index, pose in zip(positions, poses, strict=True)]
        return poses[0] if self._collate is None else self._collate(poses)

    def differing_tensors(self, index: int) -> list[str]:
        """Return the paths of the tensors of a pose, read twice, that differ."""
        position = [self._indices[index]]
        first, second = (list(tensors_in(self._source.read(position)[0])) for _ in range(2))
        if [path for path, _ in first] != [path for path, _ in second]:
            return ["pose"]
        return [path for (path, one), (_, other) in zip(first, second, strict=True) if not _equal(one, other)]

    def original_index(self, index: int) -> int:
        return self._indices[index]

    def narrow(self, start: int, stop: int) -> Poses:
        return LoadedPoses(self._source, self._collate, self._indices[start:stop], self._changes)

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Poses:
        def change(index: int, pose: Any) -> Any:
            for path, tensor in tensors_in(pose):
                if tensor.requires_grad:
                    raise PosesError(
                        f"pose {index}: {path} requires grad, and the poses are read again for a second run, which "
                        "makes another tensor; pass list(poses), which keeps them, or detach it"
                    )
            return map_tensors(function, pose)

        return LoadedPoses(self._source, self._collate, self._indices, (*self._changes, change))

    def change(self, index: int, function: Callable[[Tensor], Tensor]) -> Poses:
        changed = self._indices[index]

        def change(index: int, pose: Any) -> Any:
            return map_tensors(function, pose) if index == changed else pose

        return LoadedPoses(self._source, self._collate, self._indices, (*self._changes, change))


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
