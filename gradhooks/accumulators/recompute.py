"""Run every pose twice: without a graph, and where it matters once more when its coefficient is known."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradhooks.accumulators.base import Accumulator, Coefficients, Ledger, refuse_gradient_combination
from gradhooks.accumulators.sums import Gradients, RunningSums
from gradhooks.errors import ReplayError
from gradhooks.group import Chunk, Group
from gradhooks.progress import reporting
from gradhooks.shadow import reached_leaves


class Recompute(Accumulator):
    """Gradient checkpointing at the level of a pose: any combination, any number of outputs, one extra forward.

    The outer backward re-runs the poses that matter, last to first, each with its coefficient as cotangent. In this
    order, which is autograd's own, the sums agree bit for bit with the full graph.
    """

    name = "recompute"

    def open(self, group: Group, predictions: Tensor) -> Ledger:
        del predictions
        refuse_gradient_combination(group, self.name)
        return RecomputeLedger(group)


class RecomputeLedger(Ledger):
    """Keeps nothing but what a second run needs."""

    keeps_graph = False

    def __init__(self, group: Group) -> None:
        self._group = group
        self._chunks: list[Chunk] = []

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        del predictions
        self._chunks.append(chunk)

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        return [predictions]

    def gradients(self, kept: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        del last
        (predictions,) = kept
        group = self._group
        matters = mattering(coefficients.total, group.negligible(predictions.dtype))
        gradients = replayed_gradients(group, self._chunks, predictions, coefficients.total, matters)
        group.report.skipped = len(group.poses) - int(matters.sum())
        unreached = [place for place, gradient in enumerate(gradients) if gradient is None]
        skipped = [chunk for chunk in self._chunks if not matters[chunk.start : chunk.stop].any()]
        if unreached and skipped:
            _zero_where_reached(group, skipped, gradients, unreached)
        return gradients


def mattering(coefficients: Tensor, negligible: float) -> Tensor:
    """Which poses have a coefficient worth a backward, shape `(N,)`, on the CPU. NaN is."""
    size = coefficients.detach().abs().flatten(1).amax(1).to("cpu", torch.float64)
    largest = size[size.isfinite()].max() if size.isfinite().any() else size.new_zeros(())
    return ~(size <= largest * negligible) & (size != 0)


def replayed_gradients(
    group: Group, chunks: Sequence[Chunk], predictions: Tensor, cotangents: Tensor, matters: Tensor
) -> Gradients:
    """`sum_i cotangents[i] dy_i/dtheta` over the poses that matter, by running them again.

    Args:
        group: The group.
        chunks: How its poses went through the model.
        predictions: Shape `(N, *prediction)`: what came out then.
        cotangents: Shape `(N, *prediction)`.
        matters: Shape `(N,)`, boolean.

    Raises:
        ReplayError: A second run gave other predictions than the first.
    """
    chosen = [chunk for chunk in chunks if matters[chunk.start : chunk.stop].any()]
    if not chosen:
        return [None] * len(group.shadows.leaves)
    drifts = []
    with (
        group.rerunning(),
        RunningSums(group.shadows, count=1) as sums,
        reporting(group.progress, int(matters.sum()), "poses that matter") as report,
    ):
        done = 0
        for chunk in reversed(chosen):
            group.replay.restore(chunk.before)
            again = group.run(chunk.start, chunk.stop)
            drifts.append(_drift(again, predictions[chunk.start : chunk.stop]))
            wanted = matters[chunk.start : chunk.stop]
            cotangent = cotangents[chunk.start : chunk.stop]
            if not wanted.all():
                cotangent = cotangent * wanted.to(cotangent).view(-1, *[1] * (cotangent.dim() - 1))
            if again.requires_grad:
                group.backward(again, cotangent)
            del again
            group.report.backwards += int(wanted.sum())
            group.report.recomputed += int(wanted.sum())
            done += int(wanted.sum())
            report(done)
        _refuse_drift(group, list(reversed(chosen)), drifts, predictions)
        return sums.take()[0]


def _drift(again: Tensor, before: Tensor) -> Tensor:
    return (again.detach() - before).abs().max().nan_to_num(nan=0.0)


def _refuse_drift(group: Group, chunks: Sequence[Chunk], drifts: Sequence[Tensor], predictions: Tensor) -> None:
    # Half the digits: kernels that add in varying order lose a few, a model that draws from elsewhere loses all.
    allowed = torch.finfo(predictions.dtype).eps ** 0.5 * predictions.abs().nan_to_num(0, 0, 0).max()
    drifted = (torch.stack(list(drifts)) > allowed).tolist()  # one synchronisation for the whole group
    for chunk, found, drift in zip(chunks, drifted, drifts, strict=True):
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
            for leaf in reached_leaves(group.run(chunk.start, chunk.stop)):
                if id(leaf) in places:
                    gradients[places.pop(id(leaf))] = torch.zeros_like(leaf)
            if not places:
                return
