"""Report: what was done with the poses of a batch."""

from dataclasses import dataclass, field, fields
from typing import NamedTuple

from tabulate import tabulate

from gradhooks.units import format_bytes


class MemoryUse(NamedTuple):
    """Bytes beyond the model, its `.grad` and the step of one pose.

    Attributes:
        allowed: What the option `memory` allows.
        used: What the batch keeps until its backward, as far as it was measured: graphs of plain chunks, and copies of
            the gradients.
    """

    allowed: int
    used: int

    def __str__(self) -> str:
        return f"{format_bytes(self.used)} of {format_bytes(self.allowed)}"


@dataclass
class Report:
    """What was done with the poses of a batch. The counts are final after the outer backward.

    Attributes:
        poses: The number of poses, on this process. Set when the batch is read.
        groups: The number of groups. Set when the batch is read.
        inputs: What the poses are, such as `4 poses of shape (5, 16)`. Set when the batch is read.
        plain: The number of poses that ran plainly, on the real parameters. Set by the first run.
        chunks: The number of chunks in which the poses ran the first time. Set by the first run.
        backwards: The number of poses that went through a backward of the model; a pose that did so twice counts
            twice. Counted by the engine.
        recomputed: The number of poses that ran a second time. Counted by the second run.
        skipped: The number of poses without a backward, since their coefficients are negligible. Set by the
            accumulator.
        memory: What was allowed and used beyond one pose's step. Set by the first run.
        accumulator: The name of the accumulator of the poses that did not run plainly. Set when it begins.
        reason: Why this accumulator. Set when it begins.
    """

    poses: int = 0
    groups: int = 1
    inputs: str = ""
    plain: int = 0
    chunks: int = 0
    backwards: int = 0
    recomputed: int = 0
    skipped: int = 0
    memory: MemoryUse = field(default=MemoryUse(0, 0))
    accumulator: str = ""
    reason: str = ""

    def reset_counts(self) -> None:
        """Set the counts of an attempt that failed to 0."""
        self.plain = self.chunks = self.backwards = self.recomputed = self.skipped = 0

    def _rows(self) -> list[tuple[str, str]]:
        return [(field.name.replace("_", " "), str(getattr(self, field.name))) for field in fields(self)]

    def __str__(self) -> str:
        return tabulate(self._rows(), tablefmt="plain", disable_numparse=True)

    def _repr_html_(self) -> str:
        return tabulate(self._rows(), tablefmt="html", disable_numparse=True)
