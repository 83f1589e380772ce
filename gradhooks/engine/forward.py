"""The first run of intercepted poses: each goes through the model once, chunk by chunk."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gradhooks.distributed.collectives import Message
from gradhooks.distributed.pose_parallel import METADATA_LENGTH, PosePartition
from gradhooks.engine.accumulation import Accumulation, NoPoses
from gradhooks.engine.batch import Batch
from gradhooks.engine.chunk_fitting import next_chunk
from gradhooks.engine.context import ForwardContext
from gradhooks.engine.grad_mode import run_without_graph
from gradhooks.engine.leaf_validation import refuse_outside_leaves
from gradhooks.engine.model_output import check_shape, refuse_detached
from gradhooks.engine.model_state import Snapshot
from gradhooks.engine.parameter_values import carry_over_data
from gradhooks.engine.pose_engine import PoseEngine
from gradhooks.engine.pose_runner import NeedsGradModeError
from gradhooks.engine.progress import progress_of
from gradhooks.engine.schedule import StartAgainError
from gradhooks.engine.side_outputs import check_layout
from gradhooks.errors import PosesError

Begin = Callable[[PoseEngine, Tensor], Accumulation]


class FirstRun(NamedTuple):
    """The result of the first run.

    Attributes:
        accumulation: What the accumulator keeps.
        predictions: Shape `(N, *prediction)`: the predictions of the poses on all ranks, detached.
    """

    accumulation: Accumulation
    predictions: Tensor


def run_forward(context: ForwardContext, begin: Begin) -> FirstRun:
    """Run every intercepted pose of this process once. If it raises, the model's state is as before.

    Args:
        context: The poses.
        begin: Begins the accumulation, given the live predictions of the first chunk.

    Raises:
        DistributedError: Another rank failed.
        PredictionError: No prediction requires grad, or the shapes differ.
        UnregisteredTensorError: A prediction depends on a leaf that cannot be intercepted.
    """
    batch, partition = context.batch, context.partition
    state, schedule = batch.parts.state, batch.schedule

    def attempt() -> tuple[Accumulation, Tensor, bool]:
        context.shadows.refuse_left_gradients()
        try:
            with context.on_shadows(), state.preserved(only_on_error=True) as before:
                result = _run_local_poses(context, begin, before)
        except StartAgainError:
            state.refuse_lost_values()
            raise
        carry_over_data(context.shadows.real, context.shadows.shadows)
        return result

    step = "forward"
    with (
        batch.sharded.keep_unsharded(),
        batch.sharded.all_or_none(step),
        partition.collectives.all_or_none(step) as message,
    ):
        try:
            accumulation, rows, differentiable = schedule.retry_smaller(attempt)
        except NeedsGradModeError:
            batch.runner.require_grad_mode()
            accumulation, rows, differentiable = schedule.retry_smaller(attempt)
        message.sent = _metadata(batch, rows, differentiable=differentiable)
    if context.leaves.real and not any(differentiable for differentiable, *_ in message.received):
        refuse_detached(partition.total)
    return FirstRun(accumulation, _gather(batch, partition, rows, message))


def _metadata(batch: Batch, rows: Tensor, *, differentiable: bool = False) -> list[float]:
    """Return what other ranks must know of the predictions of this one: shape, dtype, whether there are sides."""
    has_side = [] if batch.partition.collectives.is_single else [float(batch.runner.layout is not None)]
    return [*batch.partition.encode_metadata(rows, differentiable=differentiable), *has_side]


def _gather(batch: Batch, partition: PosePartition, rows: Tensor, message: Message) -> Tensor:
    """Return the predictions of all ranks; a rank without poses learns what a row contains."""
    if not partition.collectives.is_single and any(numbers[METADATA_LENGTH] for numbers in message.received):
        layouts = partition.collectives.gather_objects(batch.runner.layout)
        first, *others = [layout for rank, layout in enumerate(layouts) if partition.counts[rank]]
        for layout in others:
            check_layout(first, layout, partition.first)
        batch.runner.layout = first
    return partition.gather_predictions(rows, message.received, batch.parts.device)


def _run_local_poses(context: ForwardContext, begin: Begin, before: Snapshot) -> tuple[Accumulation, Tensor, bool]:
    """Return the accumulation, the predictions of this process, and whether any of them requires grad."""
    batch, poses, count = context.batch, context.poses, len(context.poses)
    state, schedule = batch.parts.state, batch.schedule
    if count == 0:
        return NoPoses(len(context.leaves.shadows)), torch.empty(0), False
    engine = PoseEngine(context)
    with progress_of(batch.options.progress, len(batch.poses), "poses") as report_progress:
        chunk = next_chunk(poses, schedule, None, before)
        live = context.run(poses, chunk)
        accumulation = begin(engine, live)
        first, differentiable = live.detach(), live.requires_grad
        # Predictions that were kept one by one would lie between the freed memory of the chunks, and fragment it.
        rows = first if chunk.stop == count else first.new_empty((count, *first.shape[1:]))
        while True:
            check_shape(first, live, context.first + chunk.start)
            if rows is not first:
                rows[chunk.start : chunk.stop] = live.detach()
            engine.chunks.append(chunk)
            accumulation.add(chunk, live)
            del live  # the next chunk needs the memory of its graph
            report_progress(chunk.stop)
            if chunk.stop == count:
                break
            chunk = next_chunk(poses, schedule, chunk, state.snapshot(), accumulation.longest_chunk(chunk.stop))
            # While no prediction requires grad, a graph shows whether this one does.
            if accumulation.keeps_graph or not differentiable:
                live = context.run(poses, chunk)
            else:
                live = run_without_graph(context, chunk)
            differentiable |= live.requires_grad
    stateless = state.unchanged_since(before)
    engine.end_first_run(stateless=stateless)
    if state.noticed_late and len(engine.chunks) > 1:
        raise StartAgainError("the forward changed state that no forward changed before")
    if not stateless and _would_spread(batch, rows, len(engine.chunks)):
        schedule.split_chunks()
        raise StartAgainError("the backward of a chunk would spread the NaN of a dropped pose to its other poses")
    batch.report.chunks += len(engine.chunks)
    return accumulation, rows, differentiable


def _would_spread(batch: Batch, rows: Tensor, chunk_count: int) -> bool:
    """Return whether a pose is dropped from a chunk of several. A model without state runs the others again."""
    return batch.options.nonfinite == "drop" and chunk_count < len(rows) and not rows.isfinite().all()


def predict(batch: Batch) -> Tensor:
    """Return the predictions of all poses on all ranks, shape `(M, *prediction)`, detached, without an accumulator."""
    partition, schedule = batch.partition, batch.schedule

    def attempt() -> Tensor:
        with batch.parts.state.preserved(only_on_error=True):
            return _predict_local_poses(batch)

    with batch.sharded.keep_unsharded(), partition.collectives.all_or_none("forward") as message:
        rows = schedule.retry_smaller(attempt)
        message.sent = _metadata(batch, rows)
    return _gather(batch, partition, rows, message)


def _predict_local_poses(batch: Batch) -> Tensor:
    first = rows = torch.empty(0)
    start, count = 0, len(batch.poses)
    batch.report.chunks = 0
    with progress_of(batch.options.progress, count, "poses") as report_progress:
        while start < count:
            size = batch.schedule.prediction_chunk_size(count - start)
            limit = batch.schedule.split_beyond(batch.schedule.room)
            run = batch.runner.run_plainly(batch.poses, start, start + size, limit, measure=False)
            if run.predictions.requires_grad and batch.poses.loaded:
                raise PosesError(
                    f"the prediction of pose {start} requires grad, although no parameter of the model does; poses "
                    "that are read while they run are not searched for tensors that require grad: pass list(poses)"
                )
            refuse_outside_leaves(batch, run.predictions, start)
            live = run.predictions.detach()
            if start == 0:
                first = live
                rows = first if len(first) == count else first.new_empty((count, *first.shape[1:]))
            check_shape(first, live, start)
            if rows is not first:
                rows[start : start + len(live)] = live
            start += len(live)
            batch.report.chunks += 1
            report_progress(start)
    return rows
