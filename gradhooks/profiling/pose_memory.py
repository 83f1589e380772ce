"""PoseMemory: what steps of one, two and three poses need, and from this what a step of a batch needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradhooks.engine.model_output import prediction_rows
from gradhooks.options import call_model
from gradhooks.profiling.batch_plan import BatchPlan
from gradhooks.profiling.peak_memory import PeakMemory
from gradhooks.profiling.training_steps import TrainingBatch


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


def measure_pose_memory(batch: TrainingBatch, index: int, device: torch.device) -> PoseMemory:
    """Run steps of one, two and three copies of a pose. The caller restores the state of the model.

    Args:
        batch: The model and its poses.
        index: Which pose.
        device: The device of the model.
    """
    model, poses, call = batch.model, batch.inputs, batch.call or call_model

    def chunk(count: int) -> Tensor:
        in_place = count <= len(poses) and poses.batched and not poses.collated  # a stack, of which slices are views
        pose = poses.slice(0, count) if in_place else poses.select([index] * count)
        return prediction_rows(call(model, pose), 0, count, poses.batched)

    def step(rows: Callable[[], list[Tensor]], *, fresh: bool) -> int:
        if fresh:
            model.zero_grad()
        with PeakMemory(device) as memory:
            torch.cat(rows()).sum().backward()
        return memory.peak

    def growth(measure: Callable[[int], int], largest: int) -> Growth:
        first = [measure(count) for count in range(1, largest + 1)]
        return Growth(*first, *[first[-1]] * (3 - largest))

    together = 3 if poses.batched else 1
    separate = growth(lambda count: step(lambda: [chunk(1) for _ in range(count)], fresh=True), 3)
    at_once = growth(lambda count: step(lambda: [chunk(count)], fresh=True), together)
    gradients = sum(leaf.grad.nbytes for leaf in model.parameters() if leaf.grad is not None)
    later = growth(lambda count: gradients + step(lambda: [chunk(count)], fresh=False), together)
    with torch.no_grad():
        without_graph = growth(lambda count: _peak(lambda: chunk(count), device), together)
    return PoseMemory(gradients, at_once, separate, later, without_graph)


def _peak(run: Callable[[], object], device: torch.device) -> int:
    with PeakMemory(device) as memory:
        run()
    return memory.peak
