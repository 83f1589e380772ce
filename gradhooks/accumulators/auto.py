"""Choose the cheapest exact accumulator for each group."""

import math
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from loguru import logger
from torch import Tensor

from gradhooks.accumulators.base import Accumulation, Accumulator, Coefficients
from gradhooks.accumulators.declaration import declared
from gradhooks.accumulators.recompute import Recompute
from gradhooks.accumulators.store import Store
from gradhooks.accumulators.stream import Stream
from gradhooks.engine.context import Chunk, Group
from gradhooks.engine.gradient_sums import Gradients
from gradhooks.engine.stopwatch import Stopwatch

# What a graphless forward costs of a step until it was measured: 0.15 for SchNet, 0.29 for a transformer and a CNN.
FORWARD_SHARE = 0.25
# As many groups are timed. Then the clock has no say any more, and the same poses mean the same choice.
TIMED = 5
# Costs this close are alike: do not change for less.
INERTIA = 1.1
# How much of what is remembered gives way to the newest group.
FORGETTING = 0.3


class Timing(NamedTuple):
    """What a recomputed group took: the first run without graphs, the second with them, and of how many poses."""

    first: Stopwatch
    first_poses: int
    second: Stopwatch
    second_poses: int

    @property
    def share(self) -> float | None:
        """A graphless forward relative to a step; None while the device is not done."""
        first, second = self.first.seconds, self.second.seconds
        return None if first is None or not second else first / self.first_poses / (second / self.second_poses)


class Auto(Accumulator):
    """Streams where that can be done and earlier groups show that it is cheaper, recomputes elsewhere.

    Of the poses of a group let b be the share whose weight mattered when it came, k the share that mattered in the end,
    and r the share that the loss reads beside the combination. With a graphless forward costing f of a step, streaming
    costs f + b (1 - f) + r steps a pose and recomputing f + max(k, r). A declaration that weighs all poses alike has
    b = k = 1, and no group need be seen. Else the first group is recomputed: that is never far off, while streaming is
    where every pose sets a new record. It is also where both parts of f can be timed, group for group; the median
    counts, for a first group may be busy with other things (a compiler, an allocator).
    """

    name = "auto"
    recomputes = True

    def __init__(self) -> None:
        self._came = self._stayed = 1.0
        self._direct = 0.0
        self._groups = 0
        self._streams = False
        self._shares: list[float] = []
        self._timings: list[Timing] = []

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_timings": []}  # a device's events are nothing to copy

    @property
    def forward_share(self) -> float:
        """What a graphless forward costs of a step, as far as that is known."""
        return statistics.median_low([FORWARD_SHARE, *self._shares])

    def open(self, group: Group, predictions: Tensor) -> Accumulation:
        if group.combination.combine_gradients is not None:
            group.report.reason = "the combination works on the poses' gradients"
            return self._chosen(Store(), group, predictions)
        declaration = declared(group, predictions)
        if declaration is None:
            return self._chosen(Stream(), group, predictions)  # hands over to recompute, and says why
        group.finished.append(self._learn)
        self._read_clocks()
        self._decide(group, declaration.uniform)
        group.report.reason = self._reason(declaration.uniform)
        if self._streams:
            return self._chosen(Stream(), group, predictions)
        accumulation = self._chosen(Recompute(), group, predictions)
        timed = len(self._shares) + len(self._timings) < TIMED
        return TimedAccumulation(accumulation, group, self._timings) if timed else accumulation

    @staticmethod
    def _chosen(accumulator: Accumulator, group: Group, predictions: Tensor) -> Accumulation:
        group.report.accumulator = accumulator.name
        accumulation = accumulator.open(group, predictions)
        logger.debug("{} poses by {}: {}", group.report.poses, group.report.accumulator, group.report.reason)
        return accumulation

    def _read_clocks(self) -> None:
        pending = [(timing, timing.share) for timing in self._timings]
        self._shares += [share for _, share in pending if share is not None]
        self._timings[:] = [timing for timing, share in pending if share is None]

    def _decide(self, group: Group, uniform: bool) -> None:
        if self._groups == 0:
            self._streams = uniform
            return
        forward = self.forward_share
        # A stream goes forward in the chunks that have a graph, which may be smaller than those that were timed.
        alike = group.sizes.with_graph == group.sizes.graphless
        in_stream = forward if alike else max(forward, FORWARD_SHARE)
        streamed = in_stream + self._came * (1 - in_stream) + self._direct
        recomputed = forward + max(self._stayed, self._direct)
        margin = 1 / INERTIA if self._streams else INERTIA
        self._streams = streamed * margin <= recomputed

    def _reason(self, uniform: bool) -> str:
        if self._groups == 0:
            return "every pose weighs the same" if uniform else "nothing is known yet of how many poses matter"
        known = "was timed at" if self._shares else "is taken to be"
        return (
            f"in earlier groups {self._came:.0%} of the poses mattered when they came, {self._stayed:.0%} in the end, "
            f"and {self._direct:.0%} were read by the loss beside the combination; a forward without a graph {known} "
            f"{self.forward_share:.0%} of a step"
        )

    def _learn(self, group: Group, predictions: Tensor, coefficients: Coefficients) -> None:
        declaration = declared(group, predictions)
        if declaration is None:
            return
        weights = torch.tensor(declaration.log_weights, dtype=torch.float64).nan_to_num(nan=math.inf)
        least = math.log(group.skip_threshold(predictions.dtype) or torch.finfo(torch.float64).tiny)
        came = (weights >= weights.cummax(0).values + least).double().mean().item()
        stayed = (weights >= weights.max() + least).double().mean().item()
        direct = 0.0 if coefficients.direct is None else (coefficients.direct != 0).double().mean().item()
        newest = 1.0 if self._groups == 0 else FORGETTING
        self._came += newest * (came - self._came)
        self._stayed += newest * (stayed - self._stayed)
        self._direct += newest * (direct - self._direct)
        self._groups += 1


class TimedAccumulation(Accumulation):
    """Leaves all work to another accumulation and holds the watches: four marks a group, none for each pose."""

    def __init__(self, accumulation: Accumulation, group: Group, timings: list[Timing]) -> None:
        self._ledger = accumulation
        self._group = group
        self._timings = timings
        device = group.shadows.leaves[0].device
        self._first, self._second = Stopwatch(device), Stopwatch(device)
        self._begun = 0  # poses that came before the watch was started

    @property
    def keeps_graph(self) -> bool:  # type: ignore[override]
        return self._ledger.keeps_graph

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        self._ledger.add(chunk, predictions)
        if chunk.start == 0:
            self._begun = chunk.stop
            self._first.start()

    def watching(self) -> AbstractContextManager[None]:
        return self._ledger.watching()

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        self._first.stop()
        return self._ledger.close(predictions)

    def gradients(self, kept: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        before = self._group.report.recomputed
        self._second.start()
        gradients = self._ledger.gradients(kept, coefficients, last=last)
        self._second.stop()
        first, second = self._group.report.poses - self._begun, self._group.report.recomputed - before
        if first and second and len(self._timings) < TIMED:
            self._timings.append(Timing(self._first, first, self._second, second))
        return gradients
