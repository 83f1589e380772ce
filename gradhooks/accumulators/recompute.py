"""Run every pose twice: without a graph, and where it matters once more when its coefficient is known."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from einops import reduce
from torch import Tensor

from gradhooks.accumulators.base import Accumulation, Accumulator, Coefficients, refuse_gradient_combination
from gradhooks.accumulators.declaration import declared
from gradhooks.accumulators.kept_graphs import KeptGraphs, budget_in_bytes
from gradhooks.engine.context import Chunk, Group
from gradhooks.engine.gradient_sums import Gradients, RunningSums
from gradhooks.engine.rerun import replayed_gradients
from gradhooks.engine.unused_parameters import zero_where_reached


class Recompute(Accumulator):
    """Gradient checkpointing at the level of a pose: any combination, any number of outputs, one extra forward.

    The outer backward re-runs the poses that matter, last to first, each with its coefficient as cotangent. In this
    order, which is autograd's own, the sums agree bit for bit with the full graph.

    Args:
        retain: Memory for graphs that are kept, so that their poses need no second forward: bytes (`"2GiB"`, an int) or
            a fraction of what is free when a group begins (a float). The poses that weigh most are kept where the
            combination declares weights, the first ones elsewhere.

    Raises:
        ValueError: `retain` is none of these.
    """

    name = "recompute"
    recomputes = True

    def __init__(self, retain: str | float | None = None) -> None:
        budget_in_bytes(retain, torch.device("cpu"))
        self.retain = retain

    def __str__(self) -> str:
        return self.name if self.retain is None else f"{self.name}, retain={self.retain}"

    def open(self, group: Group, predictions: Tensor) -> Accumulation:
        refuse_gradient_combination(group, self.name)
        budget = budget_in_bytes(self.retain, predictions.device)
        return RecomputeAccumulation(group, KeptGraphs(budget, group.known_storages()) if budget else None)

    def take_over(self, group: Group, predictions: Tensor, reason: str) -> Accumulation:
        """Open a group in the place of an accumulator that cannot serve it; the report will say why."""
        group.report.accumulator, group.report.reason = self.name, reason
        return self.open(group, predictions)


class RecomputeAccumulation(Accumulation):
    """Keeps what a second run needs, and as many graphs as it may."""

    def __init__(self, group: Group, retained: KeptGraphs | None) -> None:
        self._group = group
        self._chunks: list[Chunk] = []
        self._retained = retained
        self.keeps_graph = retained is not None

    def watching(self) -> AbstractContextManager[None]:
        if self._retained is None or self._retained.has_room_for(len(self._group.poses) - self._chunks[-1].stop):
            return nullcontext()
        return self._retained.measuring()

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        self._chunks.append(chunk)
        if chunk.start == 0 and self._group.sizes.is_new(chunk.stop) and predictions.requires_grad:
            with RunningSums(self._group.shadows, count=1):  # forgets what arrives
                self._group.backward(predictions, torch.zeros_like(predictions))
        if self._retained is not None and predictions.requires_grad and chunk.start > 0:  # nobody measured the first
            claim = declared(self._group, predictions, chunk.start)
            uniform = claim is None or claim.uniform
            kept = self._retained.offer(chunk.start, predictions, 0.0 if claim is None else max(claim.log_weights))
            self.keeps_graph = kept or not uniform  # where all weigh alike, what does not fit now never will
            self._group.report.retained = len(self._retained)

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        return [predictions]

    def gradients(self, kept: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        (predictions,) = kept
        group = self._group
        matters = significant_poses(coefficients, group.skip_threshold(predictions.dtype))
        retained = {} if self._retained is None else self._retained.live(forget=last)
        gradients = replayed_gradients(
            group, self._chunks, predictions, coefficients.total, matters, retained=retained, retain_graph=not last
        )
        group.report.skipped = len(group.poses) - int(matters.sum())
        zero_where_reached(group, self._chunks, matters, gradients)
        return gradients


def significant_poses(coefficients: Coefficients, skip_threshold: float) -> Tensor:
    """Which poses have a coefficient worth a backward, shape `(N,)`, on the CPU. NaN is."""
    size = reduce(coefficients.total.detach().abs(), "n ... -> n", "max").to("cpu", torch.float64)
    known = coefficients.largest
    largest = torch.where(size.isfinite(), size, 0).max() if known is None else known.to("cpu", torch.float64)
    return ~(size <= largest * skip_threshold) & (size != 0)
