"""SecondRun: run poses again once their coefficients are known.

Chunks that ran together run together again, last to first, which is the order of autograd: the sums then agree with
those of the full graph to the last bit. Where some poses of a chunk are skipped, or a chunk is too large for a graph,
the remaining poses are packed into chunks of their own, provided that the first run changed no state and that a
prediction does not depend on the other poses of its chunk.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradhooks.engine.accumulation import Chunk
from gradhooks.engine.context import ForwardContext
from gradhooks.engine.drift import DriftCheck
from gradhooks.engine.gradient_sums import Gradients
from gradhooks.engine.pose_inputs import Poses, PoseSubset
from gradhooks.engine.prediction_digest import DigestCheck, PredictionDigest
from gradhooks.engine.progress import progress_of
from gradhooks.engine.running_sums import RunningSums
from gradhooks.errors import ReplayError
from gradhooks.numerics import per_row
from gradhooks.row_arguments import rows_of


class RerunJob(NamedTuple):
    """A chunk to run again.

    Attributes:
        poses: The poses that `chunk` counts.
        chunk: The chunk.
        rows: The rows of its predictions among those of the first run.
        selected: How many of its poses get a backward.
    """

    poses: Poses
    chunk: Chunk
    rows: slice | list[int]
    selected: int


class SecondRun:
    """Runs poses again.

    Args:
        context: The poses.
        chunks: The chunks of the first run.
        stateless: Whether the first run left the state of the model as it was.
    """

    def __init__(self, context: ForwardContext, chunks: Sequence[Chunk], *, stateless: bool) -> None:
        self._context = context
        self._chunks = chunks
        self._stateless = stateless

    def gradients(self, predictions: Tensor | PredictionDigest, cotangents: Tensor, selected: Tensor) -> Gradients:
        """Return `sum_i cotangents[i] dy_i/dtheta` over the selected poses.

        Args:
            predictions: Shape `(N, *prediction)`: the predictions of the first run, or their digest.
            cotangents: Shape `(N, *prediction)`.
            selected: Shape `(N,)`, bool, on the CPU.

        Raises:
            ReplayError: A second run gave other predictions than the first.
        """
        jobs = self._jobs(selected)
        if not jobs:
            return [None] * len(self._context.leaves.shadows)
        if not selected.all():
            mask = selected.to(cotangents.device, cotangents.dtype, non_blocking=True)
            cotangents = cotangents * per_row(mask, cotangents)
        batch = self._context.batch

        def attempt() -> Gradients:
            size = batch.schedule.chunk_size(max(map(_length, jobs)))
            if self._may_pack and not all(self._may_run_unchanged(job) for job in jobs):
                try:
                    return self._run(self._packed(jobs, selected, size), predictions, cotangents, packed=True)
                except ReplayError:
                    # A prediction depends on the other poses of its chunk: run the chunks of the first run.
                    batch.learned.chunk_dependent[batch.mode] = True
            return self._run(jobs, predictions, cotangents)

        return batch.schedule.retry_smaller(attempt, resizable=self._stateless)

    def jobs(self, selected: Tensor, size: int) -> list[RerunJob]:
        """Return the jobs that run the selected poses again, in chunks of `size` poses if they may be packed."""
        jobs = self._jobs(selected)
        return self._packed(jobs, selected, size) if self._may_pack and jobs else jobs

    @property
    def _may_pack(self) -> bool:
        batch = self._context.batch
        return self._stateless and not batch.learned.chunk_dependent.get(batch.mode, False)

    def _may_run_unchanged(self, job: RerunJob) -> bool:
        length = _length(job)
        return job.selected == length and self._context.batch.schedule.may_run_again(length, job.chunk.pose_bytes)

    def _jobs(self, selected: Tensor) -> list[RerunJob]:
        """Return the chunks of the first run that contain a selected pose, last to first."""
        flags: list[bool] = selected.tolist()
        jobs = []
        for chunk in reversed(self._chunks):
            count = sum(flags[chunk.start : chunk.stop])
            if count:
                jobs.append(RerunJob(self._context.poses, chunk, slice(chunk.start, chunk.stop), count))
        return jobs

    def _packed(self, jobs: Sequence[RerunJob], selected: Tensor, size: int) -> list[RerunJob]:
        """Return the selected poses in chunks of `size`, last to first."""
        indices: list[int] = selected.nonzero().flatten().tolist()
        poses = PoseSubset(self._context.poses, indices)
        chunks = [Chunk(max(0, stop - size), stop, jobs[0].chunk.before) for stop in range(len(indices), 0, -size)]
        return [RerunJob(poses, chunk, indices[chunk.start : chunk.stop], chunk.stop - chunk.start) for chunk in chunks]

    def _run(
        self,
        jobs: Sequence[RerunJob],
        predictions: Tensor | PredictionDigest,
        cotangents: Tensor,
        *,
        packed: bool = False,
    ) -> Gradients:
        context, batch = self._context, self._context.batch
        drift = (
            DriftCheck(context, predictions, packed=packed)
            if isinstance(predictions, Tensor)
            else DigestCheck(context, predictions, packed=packed)
        )
        done = 0
        total = sum(job.selected for job in jobs)
        with (
            context.rerunning(),
            RunningSums(context.leaves.hooks, count=1) as sums,
            progress_of(batch.options.progress, total, "second run") as report_progress,
        ):
            for job, of_job in zip(jobs, _cotangents_of(jobs, cotangents, packed=packed), strict=True):
                if not (self._stateless and done):  # a stateless model is still in the state before
                    batch.parts.state.restore(job.chunk.before)
                live = context.run(job.poses, job.chunk)
                drift.add(job.rows, live.detach())
                if live.requires_grad:
                    context.backward(live, of_job)
                del live
                done += job.selected
                report_progress(done)
            drift.refuse()
            batch.report.backwards += done
            batch.report.recomputed += done
            return sums.take()[0]


def _cotangents_of(jobs: Sequence[RerunJob], cotangents: Tensor, *, packed: bool) -> Sequence[Tensor]:
    """Return the cotangents of each job; those of packed jobs by one kernel, since each list of rows would wait."""
    if not packed:
        return [cotangents[job.rows] for job in jobs]
    in_order = rows_of(cotangents, torch.cat([torch.tensor(job.rows) for job in jobs]))
    parts: Sequence[Tensor] = in_order.split([_length(job) for job in jobs])
    return parts


def _length(job: RerunJob) -> int:
    return job.chunk.stop - job.chunk.start
