"""Learned: what earlier batches have shown, kept by `MultiPose` from batch to batch."""

from dataclasses import dataclass, field
from typing import NamedTuple

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
        hooks_refused: Whether the model refuses hooks on saved tensors (transforms of `torch.func`). Written by
            `memory_need.py`.
        memory_limit: The bytes that the option `memory` stands for, after running out of memory a part of them, with
            the option itself. Written by `schedule.py`.
        largest_chunk: The largest chunk that may run after running out of memory. Written by `schedule.py`.
        chunk_dependent: Whether a prediction depends on the other poses of its chunk. Written by
            `chunk_dependence.py` and `rerun.py`.
        unused_count: By parameter name, the number of batches in a row in which no pose reached the parameter although
            all were inspected. Written by `unused_parameters.py`.
    """

    pose_needs: dict[Mode, NeedRange] = field(default_factory=dict)
    hooks_refused: bool = False
    memory_limit: tuple[str | float, int] | None = None
    largest_chunk: int | None = None
    chunk_dependent: dict[Mode, bool] = field(default_factory=dict)
    unused_count: dict[str, int] = field(default_factory=dict)
