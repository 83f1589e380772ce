"""The forward of a batch: what fits in memory runs plainly, and the rest is intercepted."""

from typing import NamedTuple

import torch
from torch import Tensor

from gradhooks.accumulators.base import Accumulator
from gradhooks.accumulators.sharded_recompute import begin_sharded
from gradhooks.autograd_function import attach_to_graph
from gradhooks.engine.audit import audit
from gradhooks.engine.batch import Batch
from gradhooks.engine.context import intercept
from gradhooks.engine.findings import TRUSTED, Findings
from gradhooks.engine.forward import predict, run_forward
from gradhooks.engine.model_output import refuse_detached, refuse_nonfinite
from gradhooks.engine.plain import run_plain_chunks
from gradhooks.engine.pose_inputs import inputs_that_require_grad
from gradhooks.engine.schedule import StartAgainError
from gradhooks.numerics import at_least_float32, widened


class DroppedPosesError(Exception):
    """Internal: a plain pose is dropped. A backward with the coefficient 0 would make NaN of its gradients."""


class AuditDueError(Exception):
    """Internal: some poses do not run plainly, and nothing is known about the model."""


class Predictions(NamedTuple):
    """The predictions of a batch, of shape `(M, *prediction)`, twice, so that two parts of a coefficient stay apart.

    Attributes:
        for_combination: In float32 or wider.
        for_user: In the dtype of the model.
        side: What `call=` returned beside them, shape `(M, *side)`, or None.
    """

    for_combination: Tensor
    for_user: Tensor
    side: Tensor | None = None


def _unpacked(batch: Batch, for_combination: Tensor, for_user: Tensor) -> Predictions:
    """Return predictions and sides that went through the engine together."""
    layout = batch.runner.layout
    if layout is None:
        return Predictions(for_combination, for_user)
    predictions, side = layout.unpack(for_user)
    dtype = layout.prediction.dtype
    combined = layout.unpack(for_combination)[0].to(at_least_float32(dtype))
    return Predictions(combined, predictions.to(dtype), side)


def run_batch(batch: Batch, accumulator: Accumulator) -> Predictions:
    """Return the predictions of a batch as part of autograd's graph. If it raises, the model's state is as before."""
    plainly = _may_run_plainly(batch, accumulator)
    if not (torch.is_grad_enabled() and (plainly or _requires_grad(batch))):
        batch.report.accumulator = accumulator.name
        batch.report.reason = "no gradient is computed: grad mode is off, or nothing requires grad"
        rows = predict(batch)
        predictions = _unpacked(batch, rows, rows)
        _check(batch, predictions.for_user)
        return predictions
    findings = None if plainly else _findings(batch)
    if plainly:
        accumulator.begin_plain()

    def attempt() -> Predictions:
        batch.runner.refuse_changed_poses()
        with batch.parts.state.preserved(only_on_error=True):
            batch.report.reset_counts()
            predictions = _run(batch, accumulator, findings, plainly=plainly)
            if batch.parts.trainable and not predictions.for_user.requires_grad:
                refuse_detached(len(predictions.for_user))
            _check(batch, predictions.for_user)
            batch.report.memory = batch.schedule.use
            return predictions

    while True:
        try:
            return batch.schedule.retry_smaller(attempt) if plainly else attempt()
        except DroppedPosesError:  # noqa: PERF203 - at most three turns
            plainly, findings = False, _findings(batch)
        except AuditDueError:
            findings = _findings(batch)


def _findings(batch: Batch) -> Findings:
    """Return what the audit found out about the model in its present mode; run it if it is due."""
    mode = (batch.mode, batch.parts.state.training_flags)
    known = batch.parts.findings
    if mode not in known or batch.ranks_audit:
        if not (batch.options.audit or batch.ranks_audit):
            return TRUSTED
        known[mode] = audit(batch)
    return known[mode]


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


def _run(batch: Batch, accumulator: Accumulator, findings: Findings | None, *, plainly: bool) -> Predictions:
    count, schedule = len(batch.poses), batch.schedule
    parts: list[tuple[Tensor, Tensor]] = []  # for the combination, and for the user

    def run_plainly(first: int, last: int) -> None:
        earlier = parts[0][1] if parts else None
        live = run_plain_chunks(batch, first, last, accumulator.observe_plain, earlier=earlier)
        parts.append((widened(live), live))

    start, stop = 0, count
    if plainly:
        if schedule.needs_measuring:  # the first poses show what a pose needs
            start = min(count, batch.options.chunk_size or 1)
            run_plainly(0, start)
        stop = schedule.first_plain(count)
    if start > 0 and stop > 0:
        raise StartAgainError("now that the need of a pose is known, the first poses do not run plainly")
    if stop or not plainly:  # with a process group, this rank may have no poses
        if findings is None:
            raise AuditDueError
        context = intercept(batch, 0, stop, findings)
        first_run = run_forward(context, begin_sharded if batch.sharded else accumulator.begin)
        parts.append(attach_to_graph(context, *first_run))
    else:
        batch.report.accumulator, batch.report.reason = "none", "the graphs of all poses fit in the allowed memory"
    if max(start, stop) < count:
        run_plainly(max(start, stop), count)
    if len(parts) == 1:
        return _unpacked(batch, *parts[0])
    for_user = torch.cat([each for _, each in parts])
    if batch.combination.combination is None:
        return _unpacked(batch, for_user, for_user)
    return _unpacked(batch, torch.cat([each for each, _ in parts]), for_user)
