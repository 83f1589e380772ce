"""Plain chunks: poses that run on the real parameters, whose graphs stay until the outer backward, as in PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor

from gradhooks.engine.batch import Batch
from gradhooks.engine.model_output import check_shape
from gradhooks.engine.open_graphs import OpenGraph
from gradhooks.engine.progress import progress_of
from gradhooks.engine.report import Report
from gradhooks.engine.schedule import StartAgainError

Observe = Callable[[Tensor], None]

MARGIN = 2
"""Chunks are not measured if all plain poses fit at this multiple of what their graphs are expected to keep."""


def run_plain_chunks(batch: Batch, start: int, stop: int, observe: Observe, *, earlier: Tensor | None = None) -> Tensor:
    """Return the predictions of the poses `start .. stop - 1` with their graphs, shape `(stop - start, *prediction)`.

    Args:
        batch: The batch.
        start: The index of the first pose.
        stop: The index after the last pose.
        observe: Called in the outer backward with their coefficients, shape `(stop - start, *prediction)`.
        earlier: The predictions of the poses before `start`, whose shape these must have.

    Raises:
        PredictionError: The predictions differ in shape.
        StartAgainError: The graphs keep more than was expected and allowed. What was measured is remembered.
    """
    schedule, need = batch.schedule, batch.schedule.need
    room = schedule.graph_room
    is_planned = need.known is not None
    measure = MARGIN * (stop - start) * need.graph_bytes > room
    rows: list[Tensor] = []
    first, used = start, 0
    with progress_of(batch.options.progress, len(batch.poses), "poses", done=start) as report_progress:
        while start < stop:
            size = schedule.plain_chunk_size(stop - start)
            limit = schedule.split_beyond(room - used)
            run = batch.runner.run_plainly(batch.poses, start, start + size, limit, measure=measure)
            rows.append(run.predictions)
            check_shape(rows[0] if earlier is None else earlier, rows[-1], start)
            used += run.bytes
            if used > room and is_planned:
                raise StartAgainError(f"graphs of {used} bytes do not fit in {room}")
            start += rows[-1].shape[0]
            report_progress(start)
    batch.report.chunks += len(rows)
    batch.report.plain += stop - first
    predictions = rows[0] if len(rows) == 1 else torch.cat(rows)
    if predictions.grad_fn is not None:
        # One hook for all chunks: a gradient of `cat` reaches them at the same time.
        predictions.register_hook(_OnBackward(batch.open_graphs.hold(used), batch.report, observe))
    return predictions


class _OnBackward:
    """Called when the outer backward reaches the predictions of plain chunks."""

    __torch_unserializable__ = True  # read by PyTorch: a pickle of the predictions leaves the hook out, silently

    def __init__(self, graph: OpenGraph, report: Report, observe: Observe) -> None:
        self._graph = graph
        self._report = report
        self._observe = observe

    def __call__(self, coefficients: Tensor) -> None:
        self._graph.release()
        self._report.backwards += coefficients.shape[0]
        self._observe(coefficients)
