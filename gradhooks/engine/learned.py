"""Learned: what earlier batches have shown, kept by `MultiPose` from batch to batch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

StackForm = tuple[tuple[int, torch.dtype], ...]
"""Number of axes and dtype of each tensor in stacked poses."""

Mode = str
"""Whether the model trains, to what autocast casts, whether graphs are kept: what a pose needs may differ."""


@dataclass
class PoseNeed:
    """The memory of a pose, as far as it was measured: the largest per pose of the chunks that were.

    Attributes:
        graph_bytes: What the graph keeps until its backward.
        temporary_bytes: What forward and backward allocate beside it while they run.
        input_bytes: The input.
    """

    graph_bytes: int = 0
    temporary_bytes: int = 0
    input_bytes: int = 0


@dataclass
class Learned:
    """Each attribute is written by one module.

    Attributes:
        pose_needs: Written by `memory_need.py`.
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

    pose_needs: dict[Mode, PoseNeed] = field(default_factory=dict)
    hooks_refused: bool = False
    memory_limit: tuple[str | float, int] | None = None
    largest_chunk: int | None = None
    chunk_dependent: dict[Mode, bool] = field(default_factory=dict)
    row_per_pose: set[StackForm] = field(default_factory=set)
    needs_grad_mode: set[Mode] = field(default_factory=set)
    unused_count: dict[str, int] = field(default_factory=dict)

    def as_plain_values(self) -> dict[str, Any]:
        """Return a dictionary of numbers, strings and containers of them."""
        return asdict(self)

    @classmethod
    def of_plain_values(cls, values: Mapping[str, Any]) -> "Learned":
        """Return what `as_plain_values` has written; entries of another version are left out."""
        known = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        learned = cls(**known)
        learned.pose_needs = {mode: PoseNeed(**need) for mode, need in values.get("pose_needs", {}).items()}
        learned.chunk_dependent = dict(learned.chunk_dependent)
        learned.unused_count = dict(learned.unused_count)
        return learned
