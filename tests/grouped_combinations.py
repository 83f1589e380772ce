"""Batches of groups for the accumulators: a combination that combines each group, an engine that knows the groups."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

import gradhooks
from gradhooks import StreamWeights
from gradhooks.engine.pose_engine import PoseEngine

GROUPS: dict[str, list[int]] = {
    "one group": [0] * 7,
    "sorted": [0, 0, 0, 1, 1, 2, 2, 2, 2],
    "interleaved": [0, 1, 2, 0, 1, 2, 2, 1, 0, 0],
    "ragged": [3, 0, 3, 3, 1, 3, 2, 2, 3, 3, 1],
    "one pose each": [2, 0, 3, 1],
}


class EachGroup(gradhooks.Combination):
    """Combine the predictions of each group, shape `(B, *prediction)`."""

    def __init__(self, combination: gradhooks.Combination, groups: Sequence[int]) -> None:
        super().__init__()
        self.combination = combination
        self.groups = torch.tensor(groups)

    def forward(self, predictions: Tensor) -> Tensor:
        count = max(self.groups.tolist()) + 1
        return torch.stack([self.combination(predictions[self.groups == group]) for group in range(count)])

    def stream_weights(self, predictions: Tensor) -> StreamWeights | None:
        return self.combination.stream_weights(predictions)


@contextmanager
def engine_with_groups(groups: Sequence[int], memory_left: int = 0) -> Iterator[None]:
    """Run the block with an engine that reports these groups."""
    changed = {"groups": list(groups), "group_count": max(groups) + 1, "memory_left": memory_left}
    with mock.patch.multiple(PoseEngine, **changed):
        yield
