"""Tell `.grad is None` from a zero gradient: leaves that no pose reaches, or only skipped poses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradhooks.engine.context import ForwardContext
from gradhooks.engine.gradient_sums import Gradients
from gradhooks.engine.rerun import SecondRun

UNUSED_AFTER = 5
"""The number of groups in which a parameter is searched for without success before it counts as unused."""


def add_zeros_for_skipped(
    context: ForwardContext, second_run: SecondRun, skipped: Tensor, gradients: Gradients
) -> None:
    """Set the gradient of leaves that only skipped poses reach to zero.

    The search costs a forward of each skipped pose. A parameter that counts as unused is searched for again only after
    a pose with a backward has reached it.

    Args:
        context: The intercepted poses.
        second_run: Runs the skipped poses.
        skipped: Shape `(N,)`, bool, on the CPU.
        gradients: The gradients, None where no pose with a backward reaches the leaf. Changed in place.
    """
    if all(gradient is not None for gradient in gradients):
        return
    unused_count = context.batch.learned.unused_count
    names = context.leaves.names(context.batch.model)
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None:
            unused_count.pop(name, None)
    sought = [
        index
        for index, name in enumerate(names)
        if gradients[index] is None and unused_count.get(name, 0) < UNUSED_AFTER
    ]
    if not sought or not skipped.any():
        return
    reached = context.batch.schedule.retry_smaller(lambda: _reached(context, second_run, skipped, sought))
    first_input = len(names) - len(context.leaves.inputs)
    for index in sought:
        if index in reached:
            gradients[index] = torch.zeros_like(context.leaves.shadows[index])
            unused_count.pop(names[index], None)
        elif index < first_input:
            unused_count[names[index]] = unused_count.get(names[index], 0) + 1


def _reached(context: ForwardContext, second_run: SecondRun, skipped: Tensor, sought: Sequence[int]) -> set[int]:
    """Return which of the sought leaves a skipped pose reaches."""
    indices = {id(context.leaves.shadows[index]): index for index in sought}
    reached: set[int] = set()
    size = context.batch.schedule.chunk_size(len(context.poses))
    with context.rerunning():
        for job in second_run.jobs(skipped, size):
            context.batch.parts.state.restore(job.chunk.before)
            predictions = context.batch.runner.run(job.poses, job.chunk.start, job.chunk.stop)
            leaves = context.validator.reached_leaves(predictions)
            reached |= {indices[id(leaf)] for leaf in leaves if id(leaf) in indices}
            if len(reached) == len(sought):
                break
    return reached
