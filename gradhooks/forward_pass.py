"""The forward of a batch: what fits in memory runs plainly, and the rest is intercepted."""

from typing import NamedTuple

import torch
from torch import Tensor

from gradhooks.accumulators.base import Accumulator
from gradhooks.accumulators.sharded_recompute import begin_sharded
from gradhooks.autograd_function import attach_to_graph
from gradhooks.engine.batch import Batch
from gradhooks.engine.context import intercept
from gradhooks.engine.forward import predict, run_forward
from gradhooks.engine.model_output import refuse_detached, refuse_nonfinite
from gradhooks.engine.plain import run_plain_chunks
from gradhooks.engine.pose_inputs import inputs_that_require_grad
from gradhooks.engine.schedule import StartAgainError
from gradhooks.numerics import at_least_float32


class DroppedPosesError(Exception):
    """Internal: a plain pose is dropped. A backward with the coefficient 0 would make NaN of its gradients."""


class Predictions(NamedTuple):
    """The predictions of a batch, of shape `(M, *prediction)`, twice, so that two parts of a coefficient stay apart.

    Attributes:
        for_combination: In float32 or wider.
        for_user: In the dtype of the model.
    """

    for_combination: Tensor
    for_user: Tensor


def run_batch(batch: Batch, accumulator: Accumulator) -> Predictions:
    """Return the predictions of a batch as part of autograd's graph. If it raises, the model's state is as before."""
    plainly = _may_run_plainly(batch, accumulator)
    if not (torch.is_grad_enabled() and (plainly or _requires_grad(batch))):
        batch.report.accumulator = accumulator.name
        batch.report.reason = "no gradient is computed: grad mode is off, or nothing requires grad"
        predictions = predict(batch)
        _check(batch, predictions)
        return Predictions(predictions, predictions)
    if plainly:
        accumulator.begin_plain()

    def attempt(*, plainly: bool = plainly) -> Predictions:
        batch.runner.refuse_changed_poses()
        with batch.parts.state.preserved(only_on_error=True):
            batch.report.reset_counts()
            predictions = _run(batch, accumulator, plainly=plainly)
            if batch.parts.trainable and not predictions.for_user.requires_grad:
                refuse_detached(len(predictions.for_user))
            _check(batch, predictions.for_user)
            batch.report.memory = batch.schedule.use
            return predictions

    try:
        return batch.schedule.retry_smaller(attempt) if plainly else attempt()
    except DroppedPosesError:
        return attempt(plainly=False)


def _requires_grad(batch: Batch) -> bool:
    return batch.parts.trainable or bool(inputs_that_require_grad(batch.poses))


def _check(batch: Batch, predictions: Tensor) -> None:
    if batch.options.nonfinite == "raise":
        refuse_nonfinite(predictions.detach())
    if batch.options.nonfinite == "drop" and batch.report.plain and not predictions.detach().isfinite().all():
        raise DroppedPosesError


def _may_run_plainly(batch: Batch, accumulator: Accumulator) -> bool:
    return (
        batch.schedule.left > 0
        and accumulator.uses_plain_chunks
        and batch.partition.collectives.is_single
        and not batch.sharded
        and batch.combination.combine_gradients is None
    )


def _run(batch: Batch, accumulator: Accumulator, *, plainly: bool) -> Predictions:
    count, schedule = len(batch.poses), batch.schedule
    parts: list[Predictions] = []

    def run_plainly(first: int, last: int) -> None:
        earlier = parts[0].for_user if parts else None
        rows = run_plain_chunks(batch, first, last, accumulator.observe_plain, earlier=earlier)
        live = rows[0] if len(rows) == 1 else torch.cat(rows)
        parts.append(Predictions(live.to(at_least_float32(live.dtype)), live))

    start, stop = 0, count
    if plainly:
        if schedule.needs_measuring:  # the first poses show what a pose needs
            start = min(count, batch.options.chunk_size or 1)
            run_plainly(0, start)
        stop = schedule.first_plain(count)
    if start > 0 and stop > 0:
        raise StartAgainError("now that the need of a pose is known, the first poses do not run plainly")
    if stop or not plainly:  # with a process group, this rank may have no poses
        parts.append(_run_intercepted(batch, accumulator, 0, stop))
    else:
        batch.report.accumulator, batch.report.reason = "none", "the graphs of all poses fit in the allowed memory"
    if max(start, stop) < count:
        run_plainly(max(start, stop), count)
    if len(parts) == 1:
        return parts[0]
    for_user = torch.cat([part.for_user for part in parts])
    if batch.combination.combination is None:
        return Predictions(for_user, for_user)
    return Predictions(torch.cat([part.for_combination for part in parts]), for_user)


def _run_intercepted(batch: Batch, accumulator: Accumulator, start: int, stop: int) -> Predictions:
    context = intercept(batch, start, stop)
    first_run = run_forward(context, begin_sharded if batch.sharded else accumulator.begin)
    return Predictions(*attach_to_graph(context, *first_run))
