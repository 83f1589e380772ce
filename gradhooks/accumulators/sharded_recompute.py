"""Recompute for models whose parameters are spread over ranks: by backwards on the real leaves."""

from collections.abc import Sequence

import torch
from einops import reduce
from torch import Tensor

from gradhooks.accumulators.base import Accumulation, Coefficients
from gradhooks.accumulators.recompute import significant_poses
from gradhooks.engine.context import Chunk, Group
from gradhooks.engine.gradient_sums import Gradients, RunningSums
from gradhooks.engine.rerun import refuse_drift


class ShardedAccumulation(Accumulation):
    """Re-runs poses inside the outer backward, as many on every rank, and lets the last one synchronise.

    What arrives in the parameters stays there: the gradients that it returns are those of pose inputs alone.
    """

    keeps_graph = False

    def __init__(self, group: Group) -> None:
        group.report.accumulator = "recompute"
        group.report.reason = "the parameters are spread over ranks"
        self._group = group
        self._chunks: list[Chunk] = []

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        del predictions
        self._chunks.append(chunk)

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        return [predictions]

    def gradients(self, kept: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        del last  # nothing is kept that could be overwritten
        (predictions,) = kept
        group, sharding = self._group, self._group.sharding
        turns = self._turns(coefficients, group.skip_threshold(predictions.dtype))
        with (
            group.rerunning(),
            sharding.gathered(),
            sharding.all_or_nothing(),
            RunningSums(group.shadows, count=1) as sums,
        ):
            second: list[Tensor] = []
            with sharding.together("its backward"), sharding.unsynchronised():
                for turn, (chunk, cotangent) in enumerate(turns, 1):
                    group.replay.restore(chunk.before)
                    live = group.run(chunk.start, chunk.stop)
                    second.append(live.detach())
                    if turn < len(turns):
                        group.backward(live, cotangent)
                places = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk, _ in turns])
                refuse_drift(group, places, torch.cat(second), predictions, packed=False)
            group.backward(live, cotangent)
            return sums.take()[0]

    def _turns(self, coefficients: Coefficients, skip_threshold: float) -> list[tuple[Chunk, Tensor]]:
        """The chunks to run, last to first, and their cotangents: as many on this rank as on that with the most."""
        size = reduce(coefficients.total.detach().abs(), "n ... -> n", "max")
        matters = significant_poses(coefficients, skip_threshold)
        wanted = [chunk for chunk in self._chunks if matters[chunk.start : chunk.stop].any()]
        with self._group.sharding.together("its backward", 1) as notes:
            notes.told = [max(1, len(wanted))]
        count = int(notes.heard[0][0])
        # Those that come for the sake of others bring what they have: the heaviest of the rest, then nothing at all.
        others = [chunk for chunk in self._chunks if chunk not in wanted]
        others.sort(key=lambda chunk: size[chunk.start : chunk.stop].max().item(), reverse=True)
        chosen = sorted([*wanted, *others[: count - len(wanted)]], key=lambda chunk: chunk.start, reverse=True)
        turns = [(chunk, coefficients.total[chunk.start : chunk.stop]) for chunk in chosen]
        chunk, cotangent = turns[-1]
        idle = [(chunk, torch.zeros_like(cotangent))] * (count - len(turns))
        report = self._group.report
        report.backwards += count
        report.recomputed += sum(chunk.stop - chunk.start for chunk in chosen)
        report.skipped = len(self._group.poses) - sum(chunk.stop - chunk.start for chunk in chosen)
        return [*idle, *turns]
