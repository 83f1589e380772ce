"""The first run: every pose of this process goes through the model once, chunk by chunk."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gradhooks.distributed.pose_parallel import METADATA_LENGTH
from gradhooks.engine.accumulation import Accumulation, Chunk, NoPoses
from gradhooks.engine.context import ForwardContext
from gradhooks.engine.model_output import check_rows
from gradhooks.engine.model_state import Snapshot
from gradhooks.engine.parameter_hooks import RunningSums
from gradhooks.engine.pose_engine import PoseEngine
from gradhooks.engine.pose_inputs import Poses
from gradhooks.engine.pose_runner import NeedsGradModeError
from gradhooks.engine.progress import progress_of
from gradhooks.engine.saved_tensors import storage_addresses
from gradhooks.errors import PredictionError

Begin = Callable[[PoseEngine, Tensor], Accumulation]


class FirstRun(NamedTuple):
    """The result of the first run.

    Attributes:
        accumulation: What the accumulator keeps.
        predictions: Shape `(N, *prediction)`: the predictions of all poses on all ranks, detached.
    """

    accumulation: Accumulation
    predictions: Tensor


def run_forward(context: ForwardContext, begin: Begin) -> FirstRun:
    """Run every pose of this process once. If it raises, buffers and random state are as before.

    Args:
        context: The group.
        begin: Begins the accumulation, given the live predictions of the first chunk.

    Raises:
        DistributedError: Another rank failed.
        PredictionError: No prediction requires grad, or the shapes differ.
        UnregisteredTensorError: A prediction depends on a leaf that cannot be intercepted.
    """
    partition, sizes = context.partition, context.chunk_sizes
    with context.shadows, context.sharded.keep_unsharded(), context.state.preserved(only_on_error=True) as before:

        def attempt() -> tuple[Accumulation, Tensor, bool]:
            try:
                return _run_local_poses(context, begin, before)
            except BaseException:  # another attempt may follow
                context.state.restore(before)
                context.shadows.hooks.clear()
                context.report.reset_counts()
                raise

        step = "forward"
        with context.sharded.all_or_none(step), partition.collectives.all_or_none(step, METADATA_LENGTH) as message:
            try:
                accumulation, rows, differentiable = sizes.retry_smaller(attempt)
            except NeedsGradModeError:
                context.runner.require_grad_mode()
                accumulation, rows, differentiable = sizes.retry_smaller(attempt)
            message.sent = partition.encode_metadata(rows, differentiable=differentiable)
        if not any(differentiable for differentiable, *_ in message.received):
            raise PredictionError(
                f"no prediction of the {partition.total} poses requires grad, though the model has parameters that do; "
                "does it detach its output, or compute it under torch.no_grad()? (To predict only, call it under "
                "no_grad.)"
            )
        device = context.shadows.leaves[0].device
        return FirstRun(accumulation, partition.gather_predictions(rows, message.received, device))


def _run_local_poses(context: ForwardContext, begin: Begin, before: Snapshot) -> tuple[Accumulation, Tensor, bool]:
    """Return the accumulation, the predictions of this process, and whether any of them requires grad."""
    count, sizes, poses = len(context.poses), context.chunk_sizes, context.poses
    if count == 0:
        return NoPoses(len(context.shadows.leaves)), torch.empty(0), False
    finite = context.options.nonfinite == "raise"
    engine = PoseEngine(context)
    with progress_of(context.options.progress, count, "poses") as report_progress:
        _measure_first_poses(context, context.runner.run)
        chunk = Chunk(0, sizes.next(count), before)
        live = _run_with_graph(context, chunk)
        accumulation = begin(engine, live)
        rows = [live.detach()]
        differentiable = live.requires_grad
        while True:
            check_rows(rows[0], rows[-1], chunk.start, finite=finite)
            engine.chunks.append(chunk)
            accumulation.add(chunk, live)
            del live  # the next chunk needs the memory of its graph
            report_progress(chunk.stop)
            if chunk.stop == count:
                break
            chunk = Chunk(chunk.stop, chunk.stop + sizes.next(count - chunk.stop), context.state.snapshot())
            with accumulation.forward_context():
                # While no prediction requires grad, a graph shows whether this one does.
                with_graph = accumulation.keeps_graph or not differentiable
                live = (
                    context.run(poses, chunk)
                    if with_graph
                    else context.runner.run_without_graph(poses, chunk.start, chunk.stop)
                )
            differentiable |= live.requires_grad
            rows.append(live.detach())
    context.report.chunks = len(engine.chunks)
    engine.end_first_run(stateless=context.state.unchanged_since(before))
    return accumulation, torch.cat(rows), differentiable


def _run_with_graph(context: ForwardContext, chunk: Chunk) -> Tensor:
    """Run the first chunk; if its size is new, also through a backward whose gradients are dropped."""
    live = context.run(context.poses, chunk)
    if context.chunk_sizes.is_unproven(chunk.stop):
        if live.requires_grad and not context.sharded:
            with RunningSums(context.shadows.hooks, count=1):
                context.backward(live, torch.zeros_like(live), retain_graph=True)
        context.chunk_sizes.mark_proven(chunk.stop)
    return live


def _measure_first_poses(context: ForwardContext, run: Callable[[Poses, int, int], Tensor]) -> None:
    if context.chunk_sizes.needs_measuring and len(context.poses):
        excluded = storage_addresses(context.model, context.shadows.leaves)
        with context.state.preserved():
            context.chunk_sizes.measure(lambda count: run(context.poses, 0, count), len(context.poses), excluded)


def predict(context: ForwardContext) -> Tensor:
    """Return the predictions of all poses on all ranks, shape `(N, *prediction)`, detached, without an accumulator.

    The model runs in the grad mode of the caller: a frozen model may still differentiate by its inputs.
    """
    partition, sizes = context.partition, context.chunk_sizes

    def attempt() -> Tensor:
        _measure_first_poses(context, context.runner.predict)
        with context.state.preserved(only_on_error=True):
            return _predict_local_poses(context)

    collectives = partition.collectives
    with context.sharded.keep_unsharded(), collectives.all_or_none("forward", METADATA_LENGTH) as message:
        rows = sizes.retry_smaller(attempt) if sizes.automatic else _predict_local_poses(context)
        message.sent = partition.encode_metadata(rows)
    device = next((tensor.device for tensor in context.model.parameters()), torch.device("cpu"))
    return partition.gather_predictions(rows, message.received, device)


def _predict_local_poses(context: ForwardContext) -> Tensor:
    rows: list[Tensor] = []
    start, count = 0, len(context.poses)
    with progress_of(context.options.progress, count, "poses") as report_progress:
        while start < count:
            stop = start + context.chunk_sizes.next(count - start)
            rows.append(context.runner.predict(context.poses, start, stop).detach())
            check_rows(rows[0], rows[-1], start, finite=context.options.nonfinite == "raise")
            report_progress(stop)
            start = stop
    context.report.chunks = len(rows)
    return torch.cat(rows) if rows else torch.empty(0)
