"""TrainingBatch: a model and a batch of poses, which every compared step runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradhooks import registry
from gradhooks.combination import BoundCombination
from gradhooks.engine.pose_forms import as_poses
from gradhooks.engine.pose_inputs import Poses
from gradhooks.engine.side_outputs import Layout, output_rows
from gradhooks.group_validation import group_index, read_index
from gradhooks.groups import Groups
from gradhooks.numerics import at_least_float32
from gradhooks.options import Call, Collate, call_model
from gradhooks.prediction import MultiPosePrediction, combine

CombinationLike = str | Callable[..., Tensor] | None


@dataclass(frozen=True)
class TrainingBatch:
    """A model and the poses on which every step trains it.

    Attributes:
        model: The bare model.
        poses: A list of poses, a stacked tensor, a mapping of stacked tensors, or `Groups`.
        combination: As for `MultiPose`.
        groups: The group of each pose, if `poses` are not `Groups`; by default they are one group.
        call: As for `MultiPose`.
        collate: As for `MultiPose`.
    """

    model: nn.Module
    poses: Any
    combination: CombinationLike
    groups: Any = None
    call: Call | None = None
    collate: Collate | None = None
    _layouts: list[Layout | None] = field(default_factory=lambda: [None])  # what a row contains

    @cached_property
    def inputs(self) -> Poses:
        """The poses in the form in which the engine slices them."""
        poses = self.poses.poses if isinstance(self.poses, Groups) else self.poses
        return as_poses(poses, self.collate)

    @cached_property
    def index(self) -> Tensor | None:
        """The group of each pose, shape `(M,)`; None for one group."""
        groups = self.poses.index if isinstance(self.poses, Groups) else self.groups
        return None if groups is None else read_index(groups, len(self.inputs))

    @cached_property
    def bound(self) -> BoundCombination:
        """The combination with the groups."""
        combination = None if self.combination is None else registry.combinations.resolve(self.combination)
        bound = BoundCombination(combination, len(self.inputs))
        if self.index is None:
            return bound
        groups = group_index(self.index, None, empty_allowed=False, combination_name=bound.name)
        return replace(bound, groups=groups)

    def run(self, start: int, stop: int) -> Tensor:
        """Return the predictions of the poses `start .. stop - 1`, shape `(stop - start, *prediction)`, with graph."""
        output = (self.call or call_model)(self.model, self.inputs.slice(start, stop))
        rows, layout = output_rows(output, start, stop, self.inputs.batched, may_have_side=self.call is not None)
        self._layouts[:] = [layout]
        return rows

    def checkpointed(self, start: int, stop: int) -> Tensor:
        """Return what `run` returns, through `torch.utils.checkpoint`."""
        rows: Tensor = checkpoint(self.run, start, stop, use_reentrant=False)
        return rows

    def unpacked(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the predictions, and the sides if there are any, of the rows that `run` returned."""
        (layout,) = self._layouts
        return (rows, None) if layout is None else layout.unpack(rows)

    def combined(self, rows: Sequence[Tensor]) -> MultiPosePrediction:
        """Return the prediction of the batch from the predictions of its chunks."""
        predictions = rows[0] if len(rows) == 1 else torch.cat(list(rows))
        predictions, side = self.unpacked(predictions)
        wide = predictions.to(at_least_float32(predictions.dtype))
        return combine(self.bound, wide, predictions, "propagate", side=side)
