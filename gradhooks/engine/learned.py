"""Learned: what earlier groups have shown, kept by `MultiPose` from group to group."""

from dataclasses import dataclass, field


@dataclass
class ChunkSizeState:
    """What is known about `chunk_size="auto"`.

    Attributes:
        size: The number of poses that may run at once; None before the first group.
        proven: The largest number that went through a forward and a backward.
    """

    size: int | None = None
    proven: int = 0


@dataclass
class Learned:
    """Each attribute is written by one module.

    Attributes:
        chunk_size: Written by `chunk_sizes.py`.
        chunk_dependent: Whether a prediction depends on the other poses of its chunk. Written by `rerun.py`.
        unused_count: By parameter name, the number of groups in a row in which no pose reached the parameter although
            all were inspected. Written by `unused_parameters.py`.
    """

    chunk_size: ChunkSizeState = field(default_factory=ChunkSizeState)
    chunk_dependent: bool = False
    unused_count: dict[str, int] = field(default_factory=dict)
