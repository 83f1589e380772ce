"""PoseMemory: what steps of few poses need, and from this what a step of a batch needs."""

from dataclasses import dataclass
from typing import NamedTuple

from gradhooks.profiling.batch_plan import BatchPlan


class Growth(NamedTuple):
    """A number of bytes that grows with the number of poses: linearly from the second on."""

    one: int
    two: int
    three: int

    def of(self, count: int) -> int:
        """Return the bytes of `count` poses."""
        return self.one if count == 1 else self.two + (count - 2) * (self.three - self.two)


@dataclass(frozen=True)
class PoseMemory:
    """Peaks of memory, in addition to the model and the poses.

    Attributes:
        gradients: One copy of the gradients.
        chunk: A step of one chunk.
        separate: A step of poses that run one by one, whose graphs are kept until all have run.
        later: A step of one chunk with the gradients of an earlier step, those included.
        without_graph: A forward of one chunk without a graph.
    """

    gradients: int
    chunk: Growth
    separate: Growth
    later: Growth
    without_graph: Growth

    def plain(self, count: int, chunk_size: int) -> int:
        """Return the peak of a step of plain poses, the last of which run in a chunk of `chunk_size`."""
        if count == 0:
            return 0
        return self.chunk.of(chunk_size) + self.separate.of(count - chunk_size + 1) - self.separate.one

    def peak(self, plan: BatchPlan) -> int:
        """Return the peak of a step of a batch."""
        plain, gradients = self.plain(plan.plain, plan.plain_chunk_size), self.gradients
        if plan.intercepted == 0:
            return plain
        if plan.accumulator == "store":
            return max((plan.intercepted - 1) * gradients + self.chunk.one, (plan.intercepted + 1) * gradients)
        chunk = self.later.of(plan.chunk_size)
        if plan.intercepted <= plan.chunk_size:  # the first gradients are not added to others
            chunk = self.chunk.of(plan.chunk_size)
        if plan.gradient_copies:  # the sums of a stream exist while the plain poses run
            sums = plan.gradient_copies * gradients
            return max(chunk + sums - gradients, plain + sums if plain else 0)
        if plain:  # their gradients exist during the second run
            chunk = max(chunk + gradients, plain)
        return max(chunk, self.without_graph.of(plan.chunk_size))
