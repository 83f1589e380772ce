"""Learned: what earlier batches have shown, kept by `MultiPose` from batch to batch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

StackForm = tuple[tuple[int, str], ...]
"""Number of axes and dtype of each tensor in stacked poses."""

Mode = str
"""Whether the model trains, to what autocast casts, whether graphs are kept: what a pose needs may differ."""


class PoseNeed(NamedTuple):
    """The memory of a pose of a chunk that was measured.

    Attributes:
        graph_bytes: What the graph keeps until its backward.
        temporary_bytes: What forward and backward allocate beside it while they run.
        input_bytes: The input.
    """

    graph_bytes: int
    temporary_bytes: int
    input_bytes: int

    @property
    def step_bytes(self) -> int:
        """What the step of the pose needs."""
        return self.graph_bytes + self.temporary_bytes


class NeedRange(NamedTuple):
    """What poses with the smallest and with the largest input need, as far as they were measured."""

    smallest: PoseNeed
    largest: PoseNeed


@dataclass
class Learned:
    """Each attribute is written by one module.

    Attributes:
        pose_needs: Written by `memory_need.py`.
        saved_tensors: How many tensors the graph of a chunk saves, which tells how many operators are launched. Written
            by `memory_need.py`.
        hooks_refused: Whether the model refuses hooks on saved tensors (transforms of `torch.func`). Written by
            `memory_need.py`.
        memory_limit: The bytes that the option `memory` stands for, after running out of memory a part of them, with
            the option itself. Written by `schedule.py`.
        largest_chunk: The largest chunk that may run after running out of memory. Written by `schedule.py`.
        chunk_dependent: Whether a prediction depends on the other poses of its chunk. Written by
            `chunk_dependence.py` and `rerun.py`.
        row_per_pose: Forms of stacked poses for which the model returns a row per pose. Written by `stack_promise.py`.
        needs_grad_mode: The modes in which the model cannot run outside grad mode. Written by `grad_mode.py`.
        unused_count: By parameter name, the number of batches in a row in which no pose reached the parameter although
            all were inspected. Written by `unused_parameters.py`.
    """

    pose_needs: dict[Mode, NeedRange] = field(default_factory=dict)
    saved_tensors: dict[Mode, int] = field(default_factory=dict)
    hooks_refused: bool = False
    memory_limit: tuple[str | float, int] | None = None
    largest_chunk: int | None = None
    chunk_dependent: dict[Mode, bool] = field(default_factory=dict)
    row_per_pose: set[StackForm] = field(default_factory=set)
    needs_grad_mode: set[Mode] = field(default_factory=set)
    unused_count: dict[str, int] = field(default_factory=dict)

    def as_plain_values(self) -> dict[str, Any]:
        """Return a dictionary of numbers, strings and containers of them."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {
            **values,
            "pose_needs": {mode: [list(need) for need in needs] for mode, needs in self.pose_needs.items()},
            "row_per_pose": sorted(self.row_per_pose),
            "needs_grad_mode": sorted(self.needs_grad_mode),
            "chunk_dependent": dict(self.chunk_dependent),
            "unused_count": dict(self.unused_count),
            "saved_tensors": dict(self.saved_tensors),
        }

    @classmethod
    def of_plain_values(cls, values: Mapping[str, Any]) -> "Learned":
        """Return what `as_plain_values` has written; entries of another version are left out."""
        learned = cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})
        needs = values.get("pose_needs", {}).items()
        learned.pose_needs = {mode: NeedRange(*(PoseNeed(*need) for need in ends)) for mode, ends in needs}
        learned.chunk_dependent, learned.unused_count = dict(learned.chunk_dependent), dict(learned.unused_count)
        learned.saved_tensors = dict(learned.saved_tensors)
        learned.row_per_pose, learned.needs_grad_mode = set(learned.row_per_pose), set(learned.needs_grad_mode)
        return learned
