"""Poses that are run a second time, now that their coefficients are known."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradhooks.engine.context import Chunk, Group
from gradhooks.engine.gradient_sums import Gradients, RunningSums
from gradhooks.engine.leaf_validation import run_guarded
from gradhooks.engine.pose_inputs import Poses
from gradhooks.engine.progress import reporting
from gradhooks.errors import ReplayError
from gradhooks.numerics import wide


class PoseSubset:
    """Some of a group's poses, which keep their numbers."""

    def __init__(self, poses: Poses, places: list[int]) -> None:
        self._poses = poses
        self._places = places
        self.batched = poses.batched

    def __len__(self) -> int:
        return len(self._places)

    def between(self, start: int, stop: int) -> Any:
        places = self._places[start:stop]
        first, last = places[0], places[-1]
        return self._poses.between(first, last + 1) if last - first == len(places) - 1 else self._poses.at(places)

    def at(self, places: list[int]) -> Any:
        return self._poses.at([self._places[place] for place in places])

    def number(self, place: int) -> int:
        return self._poses.number(self._places[place])

    def cut(self, cut: Callable[[Tensor], Tensor]) -> Poses:
        return PoseSubset(self._poses.cut(cut), self._places)


class RerunJob(NamedTuple):
    """A chunk to run again, or whose graph was kept.

    Attributes:
        group: The group, or the part of it, whose poses `chunk` counts.
        chunk: The chunk.
        rows: Where its predictions stand among all.
        weighing: How many of its poses matter.
        live: What came out the first time, with its graph, if that was kept.
    """

    group: Group
    chunk: Chunk
    rows: slice | list[int]
    weighing: int
    live: Tensor | None = None


def replayed_gradients(
    group: Group,
    chunks: Sequence[Chunk],
    predictions: Tensor,
    cotangents: Tensor,
    matters: Tensor,
    *,
    retained: Mapping[int, Tensor] = MappingProxyType({}),
    retain_graph: bool = False,
) -> Gradients:
    """`sum_i cotangents[i] dy_i/dtheta` over the poses that matter, by running them again, last to first.

    Chunks that went through the model together do so again, unless some of their poses do not matter or they are too
    large for a graph. What matters is then packed into chunks of its own, if the predictions depend on nothing but
    their own pose: no state is drawn from or written to, and the second run agrees with the first.

    Args:
        group: The group.
        chunks: How its poses went through the model.
        predictions: Shape `(N, *prediction)`: what came out then.
        cotangents: Shape `(N, *prediction)`.
        matters: Shape `(N,)`, boolean, on the CPU.
        retained: Live predictions of chunks that need no second run, by their first pose.
        retain_graph: Whether those will be needed again.

    Raises:
        ReplayError: A second run gave other predictions than the first.
    """
    wanted = matters.tolist()
    chosen = [chunk for chunk in reversed(chunks) if any(wanted[chunk.start : chunk.stop])]
    if not chosen:
        return [None] * len(group.shadows.leaves)
    weighted = cotangents * matters.to(cotangents).view(-1, *[1] * (cotangents.dim() - 1))
    kept = [retained]

    def attempt() -> Gradients:
        size = group.sizes.next(max(chunk.stop - chunk.start for chunk in chosen), with_graph=True)
        live = kept.pop() if kept else {}  # of what was gone down once, nothing is left
        whole = [
            RerunJob(group, chunk, rows := slice(*chunk[:2]), sum(wanted[rows]), live.get(chunk.start))
            for chunk in chosen
        ]
        if group.steady and not group.sizes.experience.mixes and not all(_fits(again, size) for again in whole):
            try:
                return _run(packed(whole, wanted, size), predictions, weighted, retain_graph, packed=True)
            except ReplayError:
                # Predictions depend on what else is in their chunk: run the very chunks of the first time.
                group.sizes.experience.mixes = True
                whole = [again._replace(live=None) for again in whole]
        return _run(whole, predictions, weighted, retain_graph)

    return group.sizes.until_they_fit(attempt, in_any_chunks=group.steady)


def _fits(again: RerunJob, size: int) -> bool:
    poses = again.chunk.stop - again.chunk.start
    return again.live is not None or again.weighing == poses <= size


def packed(whole: Sequence[RerunJob], wanted: Sequence[bool], size: int) -> list[RerunJob]:
    """The graphs that were kept, then the poses that matter in chunks of `size`, last to first."""
    group = whole[0].group
    ready = [again for again in whole if again.live is not None]
    places = [
        place for again in reversed(whole) for place in range(*again.chunk[:2]) if again.live is None and wanted[place]
    ]
    part = dataclasses.replace(group, poses=PoseSubset(group.poses, places))
    stops = range(len(places), 0, -size)
    chunks = [Chunk(max(0, stop - size), stop, whole[0].chunk.before) for stop in stops]
    return [*ready, *(RerunJob(part, chunk, places[slice(*chunk[:2])], chunk.stop - chunk.start) for chunk in chunks)]


def _run(
    jobs: Sequence[RerunJob], predictions: Tensor, cotangents: Tensor, retain_graph: bool, *, packed: bool = False
) -> Gradients:
    group = jobs[0].group
    second: list[Tensor] = []
    done = recomputed = 0
    with (
        group.rerunning(),
        RunningSums(group.shadows, count=1) as sums,
        reporting(group.progress, sum(again.weighing for again in jobs), "poses that matter") as report,
    ):
        for again in _joined(jobs):
            live = again.live
            if live is None:
                if not (group.steady and second):  # else everything stands where it stood
                    group.replay.restore(again.chunk.before)
                live = run_guarded(again.group, again.chunk)
                second.append(live.detach())
                recomputed += again.weighing
            if live.requires_grad:
                kept = retain_graph and again.live is not None
                group.backward(live, cotangents[again.rows], retain_graph=kept)
            del live
            done += again.weighing
            report(done)
        if second:
            rows = [torch.arange(len(predictions))[again.rows] for again in jobs if again.live is None]
            refuse_drift(group, torch.cat(rows), torch.cat(second), predictions, packed)
        group.report.backwards += done
        group.report.recomputed += recomputed
        return sums.take()[0]


def _joined(jobs: Sequence[RerunJob]) -> list[RerunJob]:
    """The jobs, the first graphs that were kept as one: then the engine goes down all of them at once.

    So would it go down the full graph, and add up in the same order. Where leaves are narrow it would add in their own
    precision; there each graph has a backward of its own, and the sums are wide.
    """
    ready = list(takewhile(lambda again: again.live is not None, jobs))
    leaves = jobs[0].group.shadows.leaves
    if not ready[1:] or any(wide(leaf.dtype) != leaf.dtype for leaf in leaves):
        return list(jobs)
    rows = [place for again in ready for place in range(*again.chunk[:2])]
    live = torch.cat([again.live for again in ready if again.live is not None])
    return [RerunJob(*ready[0][:2], rows, sum(again.weighing for again in ready), live), *jobs[len(ready) :]]


def refuse_drift(group: Group, places: Tensor, second: Tensor, predictions: Tensor, packed: bool) -> None:
    first = predictions[places.to(predictions.device)]
    drifts = (second - first).abs().reshape(len(places), -1).amax(1).nan_to_num(nan=0.0)
    # Half the digits: kernels that add in varying order lose a few, a model that draws from elsewhere loses all. Other
    # companions in a chunk change no more than the last digits; what changes more has an influence that counts.
    coarsest = max(torch.finfo(dtype).eps for dtype in (predictions.dtype, *group.replay.autocast_dtypes))
    allowed = coarsest**0.75 if packed else torch.finfo(predictions.dtype).eps ** 0.5
    drifted = (drifts > allowed * predictions.abs().nan_to_num(0, 0, 0).max()).tolist()  # the only synchronisation
    if any(drifted):
        worst = drifted.index(True)
        raise ReplayError(
            f"pose {places[worst]} of {len(group.poses)}: its second run differs from its first by "
            f"{drifts[worst].item():.3g}; the model depends on something that is not restored (Python's or numpy's "
            "random numbers, a generator of its own, a pose changed in place). Name its generators with "
            "generators=[...], or use accumulator='store', which runs every pose once"
        )
