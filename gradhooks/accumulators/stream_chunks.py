"""StreamChunks: where the chunks of a stream end, and how many backwards they need.

A chunk needs a backward for each of its groups, and one for each sum of a group that has several poses in it. Where the
poses of each group follow one another, chunks of which the library chooses the size therefore end where a group does.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, groupby

from gradhooks.numerics import even_size


class StreamChunks:
    """The chunks of one batch.

    Args:
        groups: The group of each pose; None for one group.
        pose_count: `N`.
        fixed: Whether the user set the size of chunks.

    Attributes:
        groups: The group of each pose.
        group_count: How many groups these poses have.
    """

    def __init__(self, groups: Sequence[int] | None, pose_count: int, *, fixed: bool) -> None:
        self.groups = [0] * pose_count if groups is None else groups
        runs = [(group, sum(1 for _ in members)) for group, members in groupby(self.groups)]
        self.group_count = len({group for group, _ in runs})
        consecutive = self.group_count == len(runs)
        self._ends = list(accumulate(length for _, length in runs)) if consecutive and not fixed else None

    def longest(self, start: int) -> int | None:
        """Return how many poses the chunk that begins at `start` has at most; None for any number."""
        return None if self._ends is None else self._ends[bisect_right(self._ends, start)] - start

    def backwards(self, size: int, sums: int) -> float:
        """Return how many backwards a chunk needs on average, if `size` poses may run together.

        Args:
            size: The number of poses.
            sums: The number of sums for each group.
        """
        if size == 1:
            return 1.0
        chunks = [Counter(self.groups[start:stop]).values() for start, stop in self._chunks(size)]
        return sum(sums if count > 1 else 1 for counts in chunks for count in counts) / len(chunks)

    def mean_size(self, size: int) -> float:
        """Return the average number of poses of a chunk, if `size` poses may run together."""
        return 1.0 if size == 1 else len(self.groups) / len(self._chunks(size))

    def _chunks(self, size: int) -> list[tuple[int, int]]:
        ends = [len(self.groups)] if self._ends is None else self._ends
        spans = zip([0, *ends], ends, strict=False)
        return [
            (start, min(start + step, stop))
            for first, stop in spans
            for step in [even_size(stop - first, size) if self._ends else size]
            for start in range(first, stop, step)
        ]
