"""What skipped poses leave in `.grad`: zeros instead of None, and the rows of sparse gradients.

A leaf that no pose reaches has `.grad` None, one that only skipped poses reach has zeros. A sparse gradient has entries
for all poses that reach it, zeros among them: optimizers such as `SparseAdam` update these rows and no others.
"""

from torch import Tensor

from gradhooks.engine.context import ForwardContext
from gradhooks.engine.gradient_sums import Gradients
from gradhooks.engine.rerun import SecondRun
from gradhooks.engine.zero_gradients import zero_gradients

UNUSED_AFTER = 5
"""The number of groups in which a parameter is searched for without success before it counts as unused."""


def add_zeros_for_skipped(
    context: ForwardContext, second_run: SecondRun, skipped: Tensor, gradients: Gradients
) -> None:
    """Add the zeros of skipped poses to the gradients, where they make a difference.

    For leaves that no other pose reaches, the search costs a forward of each skipped pose, and a backward of those that
    reach one. A parameter that counts as unused is searched for again only after a pose with a backward has reached it.
    Where gradients are sparse, each skipped pose costs a forward and a backward.

    Args:
        context: The intercepted poses.
        second_run: Runs the skipped poses.
        skipped: Shape `(N,)`, bool, on the CPU.
        gradients: The gradients, None where no pose with a backward reaches the leaf. Changed in place.
    """
    sparse = {index for index, gradient in enumerate(gradients) if gradient is not None and gradient.is_sparse}
    if not sparse and all(gradient is not None for gradient in gradients):
        return
    unused_count = context.batch.learned.unused_count
    names = context.leaves.names(context.batch.model)
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None:
            unused_count.pop(name, None)
    sought = {
        index
        for index, name in enumerate(names)
        if gradients[index] is None and unused_count.get(name, 0) < UNUSED_AFTER
    }
    if not (sought or sparse) or not skipped.any():
        return
    zeros = context.batch.schedule.retry_smaller(lambda: _zeros(context, second_run, skipped, sought, sparse))
    first_input = len(names) - len(context.leaves.inputs)
    for index, gradient in enumerate(zeros):
        total = gradients[index]
        if gradient is not None:
            gradients[index] = gradient if total is None else (total + gradient.to(total.dtype)).coalesce()
            unused_count.pop(names[index], None)
        elif index in sought and index < first_input:
            unused_count[names[index]] = unused_count.get(names[index], 0) + 1


def _zeros(
    context: ForwardContext, second_run: SecondRun, skipped: Tensor, sought: set[int], sparse: set[int]
) -> Gradients:
    """Return the zeros of the leaves `sought` that a skipped pose reaches, and those of sparse gradients."""
    shadows = context.leaves.shadows
    zeros: Gradients = [None] * len(shadows)
    missing, sparse = set(sought), set(sparse)
    size = context.batch.schedule.chunk_size(len(context.poses))
    with context.rerunning():
        for job in second_run.jobs(skipped, size):
            context.batch.parts.state.restore(job.chunk.before)
            predictions = context.batch.runner.run(job.poses, job.chunk.start, job.chunk.stop)
            reached = set(map(id, context.validator.reached_leaves(predictions)))
            wanted = [index for index in sorted(missing | sparse) if id(shadows[index]) in reached]
            for index, gradient in zip(wanted, zero_gradients(context, predictions, wanted), strict=True):
                total = zeros[index]
                zeros[index] = gradient if total is None else (total + gradient).coalesce()
                if gradient.is_sparse:
                    sparse.add(index)
            missing.difference_update(wanted)
            if not (missing or sparse):
                break
    return zeros
