"""Run every pose twice: without a graph, and where it matters once more when its coefficient is known."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType

import torch
from einops import einsum, reduce
from torch import Tensor

from gradhooks.accumulators.base import Accumulator, Coefficients, Ledger, refuse_gradient_combination
from gradhooks.accumulators.declaration import declared
from gradhooks.accumulators.retained import RetainedGraphs, budget_in_bytes
from gradhooks.accumulators.sums import Gradients, RunningSums
from gradhooks.errors import ReplayError
from gradhooks.group import Chunk, Group
from gradhooks.guard import run_guarded
from gradhooks.progress import reporting


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

    def open(self, group: Group, predictions: Tensor) -> Ledger:
        refuse_gradient_combination(group, self.name)
        budget = budget_in_bytes(self.retain, predictions.device)
        return RecomputeLedger(group, RetainedGraphs(budget, group.known_storages()) if budget else None)

    def take_over(self, group: Group, predictions: Tensor, reason: str) -> Ledger:
        """Open a group in the place of an accumulator that cannot serve it; the report will say why."""
        group.report.accumulator, group.report.reason = self.name, reason
        return self.open(group, predictions)


class RecomputeLedger(Ledger):
    """Keeps what a second run needs, and as many graphs as it may."""

    def __init__(self, group: Group, retained: RetainedGraphs | None) -> None:
        self._group = group
        self._chunks: list[Chunk] = []
        self._retained = retained
        self.keeps_graph = retained is not None

    def watching(self) -> AbstractContextManager[None]:
        return nullcontext() if self._retained is None else self._retained.measuring()

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        self._chunks.append(chunk)
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
        matters = mattering(coefficients, group.negligible(predictions.dtype))
        retained = {} if self._retained is None else self._retained.live(forget=last)
        gradients = replayed_gradients(
            group, self._chunks, predictions, coefficients.total, matters, retained=retained, retain_graph=not last
        )
        group.report.skipped = len(group.poses) - int(matters.sum())
        unreached = [place for place, gradient in enumerate(gradients) if gradient is None]
        skipped = [chunk for chunk in self._chunks if not matters[chunk.start : chunk.stop].any()]
        if unreached and skipped:
            _zero_where_reached(group, skipped, gradients, unreached)
        return gradients


def mattering(coefficients: Coefficients, negligible: float) -> Tensor:
    """Which poses have a coefficient worth a backward, shape `(N,)`, on the CPU. NaN is."""
    size = reduce(coefficients.total.detach().abs(), "n ... -> n", "max").to("cpu", torch.float64)
    largest = (
        torch.where(size.isfinite(), size, 0).max() if coefficients.largest is None else coefficients.largest.cpu()
    )
    return ~(size <= largest * negligible) & (size != 0)


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
    """`sum_i cotangents[i] dy_i/dtheta` over the poses that matter, by running them again.

    Args:
        group: The group.
        chunks: How its poses went through the model.
        predictions: Shape `(N, *prediction)`: what came out then.
        cotangents: Shape `(N, *prediction)`.
        matters: Shape `(N,)`, boolean.
        retained: Live predictions of chunks that need no second run, by their first pose.
        retain_graph: Whether those will be needed again.

    Raises:
        ReplayError: A second run gave other predictions than the first.
    """
    chosen = [chunk for chunk in reversed(chunks) if matters[chunk.start : chunk.stop].any()]
    if not chosen:
        return [None] * len(group.shadows.leaves)
    drifts: list[tuple[Chunk, Tensor]] = []
    with (
        group.rerunning(),
        RunningSums(group.shadows, count=1) as sums,
        reporting(group.progress, int(matters.sum()), "poses that matter") as report,
    ):
        done = 0
        for chunk in chosen:
            wanted = matters[chunk.start : chunk.stop]
            live = retained.get(chunk.start)
            if live is None:
                group.replay.restore(chunk.before)
                live = run_guarded(group, chunk)
                drifts.append((chunk, drift(live, predictions[chunk.start : chunk.stop])))
                group.report.recomputed += int(wanted.sum())
            if live.requires_grad:
                cotangent = einsum(cotangents[chunk.start : chunk.stop], wanted.to(cotangents), "n ..., n -> n ...")
                group.backward(live, cotangent, retain_graph=retain_graph and chunk.start in retained)
            del live
            done += int(wanted.sum())
            group.report.backwards += int(wanted.sum())
            report(done)
        refuse_drift(group, drifts, predictions)
        return sums.take()[0]


def drift(again: Tensor, before: Tensor) -> Tensor:
    return (again.detach() - before).abs().max().nan_to_num(nan=0.0)


def refuse_drift(group: Group, drifts: Sequence[tuple[Chunk, Tensor]], predictions: Tensor) -> None:
    if not drifts:
        return
    # Half the digits: kernels that add in varying order lose a few, a model that draws from elsewhere loses all.
    allowed = torch.finfo(predictions.dtype).eps ** 0.5 * predictions.abs().nan_to_num(0, 0, 0).max()
    drifted = (
        torch.stack([drift for _, drift in drifts]) > allowed
    ).tolist()  # one synchronisation for the whole group
    for (chunk, drift), found in zip(drifts, drifted, strict=True):
        if found:
            raise ReplayError(
                f"pose {chunk.start} of {len(group.poses)}: its second run differs from its first by "
                f"{drift.item():.3g}; the model depends on something that is not restored (Python's or numpy's random "
                "numbers, a generator of its own, a pose changed in place). Name its generators with "
                "replay_generators=[...], or use accumulator='store', which runs every pose once"
            )


def _zero_where_reached(group: Group, skipped: Sequence[Chunk], gradients: Gradients, unreached: list[int]) -> None:
    """Tell `.grad is None` from a vanishing gradient: a leaf that only skipped poses reach gets zeros."""
    places = {id(group.shadows.leaves[place]): place for place in unreached}
    with group.rerunning():
        for chunk in skipped:
            group.replay.restore(chunk.before)
            predictions = group.run(chunk.start, chunk.stop)
            for leaf in group.reached(predictions, inside_checkpoints=True):
                if id(leaf) in places:
                    gradients[places.pop(id(leaf))] = torch.zeros_like(leaf)
            if not places:
                return
