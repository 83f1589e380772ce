"""Report: what was done with the poses of a group."""

from dataclasses import dataclass, fields

from tabulate import tabulate


@dataclass
class Report:
    """What was done with the poses of a group. The counts are final after the outer backward.

    Attributes:
        poses: The number of poses, on this process. Set by `MultiPose`.
        chunks: The number of chunks in which they ran the first time. Set by the first run.
        backwards: The number of poses that went through a backward of the model; a pose that did so twice counts
            twice. Counted by the engine.
        recomputed: The number of poses that ran a second time. Counted by the second run.
        skipped: The number of poses without a backward, since their coefficients are negligible. Set by the
            accumulator.
        graphs_kept: The number of poses whose graph was kept for the outer backward. Set by the accumulator.
        accumulator: The name of the accumulator that did the work. Set when it begins.
        reason: Why this accumulator. Set when it begins.
    """

    poses: int = 0
    chunks: int = 0
    backwards: int = 0
    recomputed: int = 0
    skipped: int = 0
    graphs_kept: int = 0
    accumulator: str = ""
    reason: str = ""

    def reset_counts(self) -> None:
        """Set the counts of an attempt that failed to 0."""
        self.chunks = self.backwards = self.recomputed = self.skipped = self.graphs_kept = 0

    def _rows(self) -> list[tuple[str, str]]:
        return [(field.name.replace("_", " "), str(getattr(self, field.name))) for field in fields(self)]

    def __str__(self) -> str:
        return tabulate(self._rows(), tablefmt="plain", disable_numparse=True)

    def _repr_html_(self) -> str:
        return tabulate(self._rows(), tablefmt="html", disable_numparse=True)
