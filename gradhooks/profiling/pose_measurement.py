"""Measure what steps of one, two and three poses need."""

from collections.abc import Callable

import torch
from torch import Tensor

from gradhooks.engine.side_outputs import output_rows
from gradhooks.options import call_model
from gradhooks.profiling.peak_memory import peak_bytes
from gradhooks.profiling.pose_memory import Growth, PoseMemory
from gradhooks.profiling.training_batch import TrainingBatch


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
        return output_rows(call(model, pose), 0, count, poses.batched, may_have_side=True)[0]

    def step(rows: Callable[[], list[Tensor]], *, fresh: bool) -> int:
        if fresh:
            model.zero_grad()
        return peak_bytes(lambda: torch.cat(rows()).sum().backward(), device)

    def growth(measure: Callable[[int], int], largest: int) -> Growth:
        first = [measure(count) for count in range(1, largest + 1)]
        return Growth(*first, *[first[-1]] * (3 - largest))

    together = 3 if poses.batched else 1
    separate = growth(lambda count: step(lambda: [chunk(1) for _ in range(count)], fresh=True), 3)
    at_once = growth(lambda count: step(lambda: [chunk(count)], fresh=True), together)
    gradients = sum(leaf.grad.nbytes for leaf in model.parameters() if leaf.grad is not None)
    later = growth(lambda count: gradients + step(lambda: [chunk(count)], fresh=False), together)
    with torch.no_grad():
        without_graph = growth(lambda count: peak_bytes(lambda: chunk(count), device), together)
    return PoseMemory(gradients, at_once, separate, later, without_graph)
