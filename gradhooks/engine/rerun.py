"""SecondRun: run poses again once their coefficients are known.

Chunks that ran together run together again, last to first, which is the order of autograd: the sums then agree with
those of the full graph to the last bit. Where some poses of a chunk are skipped, or a chunk is too large for a graph,
the remaining poses are packed into chunks of their own, provided that the first run changed no state and that a
prediction does not depend on the other poses of its chunk.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from gradhooks.engine.accumulation import Chunk
from gradhooks.engine.context import ForwardContext
from gradhooks.engine.drift import refuse_drift
from gradhooks.engine.gradient_sums import Gradients
from gradhooks.engine.parameter_hooks import RunningSums
from gradhooks.engine.pose_inputs import Poses, PoseSubset
from gradhooks.engine.progress import progress_of
from gradhooks.errors import ReplayError
from gradhooks.numerics import at_least_float32, per_row

NO_GRAPHS: Mapping[int, Tensor] = MappingProxyType({})


class RerunJob(NamedTuple):
    """A chunk to run again, or whose graph was kept.

    Attributes:
        poses: The poses that `chunk` counts.
        chunk: The chunk.
        rows: The rows of its predictions among those of the group.
        selected: How many of its poses get a backward.
        live: The predictions of the first run with their graph, if it was kept.
    """

    poses: Poses
    chunk: Chunk
    rows: slice | list[int]
    selected: int
    live: Tensor | None = None


class SecondRun:
    """Runs poses of a group again.

    Args:
        context: The group.
        chunks: The chunks of the first run.
        stateless: Whether the first run drew no random numbers and wrote no buffers.
    """

    def __init__(self, context: ForwardContext, chunks: Sequence[Chunk], *, stateless: bool) -> None:
        self._context = context
        self._chunks = chunks
        self._stateless = stateless

    def gradients(
        self,
        predictions: Tensor,
        cotangents: Tensor,
        selected: Tensor,
        kept_graphs: Mapping[int, Tensor],
        *,
        retain_graph: bool,
    ) -> Gradients:
        """Return `sum_i cotangents[i] dy_i/dtheta` over the selected poses.

        Args:
            predictions: Shape `(N, *prediction)`: the predictions of the first run.
            cotangents: Shape `(N, *prediction)`.
            selected: Shape `(N,)`, bool, on the CPU.
            kept_graphs: Predictions with graphs, by the first pose of their chunk, which need no second run.
            retain_graph: Whether these graphs are needed again.

        Raises:
            ReplayError: A second run gave other predictions than the first.
        """
        chosen = [chunk for chunk in reversed(self._chunks) if selected[chunk.start : chunk.stop].any()]
        if not chosen:
            return [None] * len(self._context.shadows.leaves)
        masked = cotangents * per_row(selected.to(cotangents), cotangents)
        unused = [kept_graphs]

        def attempt() -> Gradients:
            size = self._context.chunk_sizes.next(max(chunk.stop - chunk.start for chunk in chosen))
            live = unused.pop() if unused else NO_GRAPHS  # an attempt that failed has freed the kept graphs
            jobs = [self._job(chunk, selected, live.get(chunk.start)) for chunk in chosen]
            if self._may_pack and not all(_fits(job, size) for job in jobs):
                try:
                    packed = self.packed(jobs, selected, size)
                    return self._run(packed, predictions, masked, retain_graph=retain_graph, packed=True)
                except ReplayError:
                    # A prediction depends on the other poses of its chunk: run the chunks of the first run.
                    self._context.learned.chunk_dependent = True
                    jobs = [job._replace(live=None) for job in jobs]
            return self._run(jobs, predictions, masked, retain_graph=retain_graph)

        return self._context.chunk_sizes.retry_smaller(attempt, resizable=self._stateless)

    def jobs(self, selected: Tensor, size: int) -> list[RerunJob]:
        """Return the jobs that run the selected poses again, packed if the model is stateless."""
        jobs = [self._job(chunk, selected) for chunk in self._chunks if selected[chunk.start : chunk.stop].any()]
        return self.packed(jobs, selected, size) if self._stateless and jobs else jobs

    @property
    def _may_pack(self) -> bool:
        return self._stateless and not self._context.learned.chunk_dependent

    def _job(self, chunk: Chunk, selected: Tensor, live: Tensor | None = None) -> RerunJob:
        rows = slice(chunk.start, chunk.stop)
        return RerunJob(self._context.poses, chunk, rows, int(selected[rows].sum()), live)

    def packed(self, jobs: Sequence[RerunJob], selected: Tensor, size: int) -> list[RerunJob]:
        """Return the kept graphs, then the selected poses in chunks of `size`, last to first."""
        kept = [job for job in jobs if job.live is not None]
        run_again = sorted(job.chunk[:2] for job in jobs if job.live is None)
        indices = [index for start, stop in run_again for index in range(start, stop) if selected[index]]
        poses = PoseSubset(self._context.poses, indices)
        chunks = [Chunk(max(0, stop - size), stop, jobs[0].chunk.before) for stop in range(len(indices), 0, -size)]
        return [
            *kept,
            *(RerunJob(poses, chunk, indices[chunk.start : chunk.stop], chunk.stop - chunk.start) for chunk in chunks),
        ]

    def _run(
        self,
        jobs: Sequence[RerunJob],
        predictions: Tensor,
        cotangents: Tensor,
        *,
        retain_graph: bool,
        packed: bool = False,
    ) -> Gradients:
        context = self._context
        second: list[Tensor] = []
        done = recomputed = 0
        total = sum(job.selected for job in jobs)
        with (
            context.rerunning(),
            RunningSums(context.shadows.hooks, count=1) as sums,
            progress_of(context.options.progress, total, "second run") as report_progress,
        ):
            for job in self._merged(jobs):
                live = job.live
                if live is None:
                    if not (self._stateless and second):  # a stateless model is still in the state before
                        context.state.restore(job.chunk.before)
                    live = context.run(job.poses, job.chunk)
                    second.append(live.detach())
                    recomputed += job.selected
                if live.requires_grad:
                    keep = retain_graph and job.live is not None
                    context.backward(live, cotangents[job.rows], retain_graph=keep)
                del live
                done += job.selected
                report_progress(done)
            if second:
                rows = [torch.arange(len(predictions))[job.rows] for job in jobs if job.live is None]
                refuse_drift(context, torch.cat(rows), torch.cat(second), predictions, packed=packed)
            context.report.backwards += done
            context.report.recomputed += recomputed
            return sums.take()[0]

    def _merged(self, jobs: Sequence[RerunJob]) -> list[RerunJob]:
        """Merge the leading kept graphs into one job, so that one backward adds them as that of the full graph does.

        Leaves narrower than float32 are added in their own dtype within one backward; there each graph gets a backward
        of its own, and the sums are float32.
        """
        kept = list(takewhile(lambda job: job.live is not None, jobs))
        narrow = any(at_least_float32(leaf.dtype) != leaf.dtype for leaf in self._context.shadows.leaves)
        if not kept[1:] or narrow:
            return list(jobs)
        rows = [index for job in kept for index in range(job.chunk.start, job.chunk.stop)]
        live = torch.cat([job.live for job in kept if job.live is not None])
        selected = sum(job.selected for job in kept)
        return [kept[0]._replace(rows=rows, selected=selected, live=live), *jobs[len(kept) :]]


def _fits(job: RerunJob, size: int) -> bool:
    return job.live is not None or job.selected == job.chunk.stop - job.chunk.start <= size
