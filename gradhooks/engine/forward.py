"""The way of a group through the model, chunk by chunk, past the accumulator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradhooks.accumulators.base import Accumulation, Accumulator
from gradhooks.accumulators.sharded_recompute import ShardedAccumulation
from gradhooks.distributed.pose_parallel import OUTLINE
from gradhooks.engine.context import Chunk, Group, NeedsGradModeError
from gradhooks.engine.leaf_validation import run_guarded
from gradhooks.engine.model_state import Snapshot
from gradhooks.engine.pose_inputs import check_rows
from gradhooks.engine.progress import reporting
from gradhooks.errors import PredictionError


def send_through(group: Group, accumulator: Accumulator) -> tuple[Accumulation, Tensor]:
    """Run every pose of this process once.

    If anything goes wrong, random sources and buffers are as before.

    Args:
        group: The group.
        accumulator: Opens a accumulation, which decides chunk by chunk whether a graph is needed.

    Returns:
        The accumulation, and the predictions of all poses on all ranks, shape `(N, *prediction)`, detached.

    Raises:
        DistributedError: Another rank has failed.
        PredictionError: Nothing that the model predicts requires grad, or the shapes differ.
        UnregisteredTensorError: A prediction depends on a leaf that cannot be intercepted.
    """
    share = group.share
    with group.shadows, group.sharding.gathered(), group.replay.undone(unless_it_succeeds=True) as before:

        def attempt() -> tuple[Accumulation, Tensor, bool]:
            try:
                return _send_own(group, accumulator, before)
            except BaseException:
                group.forget(before)  # another attempt may follow
                raise

        with group.sharding.together("its forward"), share.ranks.together("its forward", OUTLINE) as notes:
            try:
                accumulation, own, differentiable = group.sizes.until_they_fit(attempt)
            except NeedsGradModeError:
                group.needs_grad_mode = True
                accumulation, own, differentiable = group.sizes.until_they_fit(attempt)
            notes.told = share.outline(own, differentiable=differentiable)
        if not any(differentiable for differentiable, *_ in notes.heard):
            raise PredictionError(
                f"no prediction of the {share.total} poses requires grad, though the model has parameters that do; "
                "does it detach its output, or compute it under torch.no_grad()? (To predict only, call it under "
                "no_grad.)"
            )
        return accumulation, share.predictions_of_all(own, notes.heard, group.shadows.leaves[0].device)


def _send_own(group: Group, accumulator: Accumulator, before: Snapshot) -> tuple[Accumulation, Tensor, bool]:
    count, sizes = len(group.poses), group.sizes
    if count == 0:
        return NoPoses(len(group.shadows.leaves)), torch.empty(0), False
    with reporting(group.progress, count, "poses") as report:
        if sizes.unknown:
            with group.replay.undone():
                sizes.measure(lambda few: group.run(0, few), count, group.known_storages())
        chunk = Chunk(0, sizes.next(count, with_graph=True), before)
        live = run_guarded(group, chunk)
        accumulation = ShardedAccumulation(group) if group.sharding else accumulator.open(group, live)
        check_rows(live, live, chunk.start, finite=group.nonfinite == "raise")
        differentiable = live.requires_grad
        rows = [live.detach()]
        accumulation.add(chunk, live)
        sizes.proved(chunk.stop)
        report(chunk.stop)
        while chunk.stop < count:
            del live  # the next pose needs the room of its graph
            with_graph = accumulation.keeps_graph or not differentiable
            size = sizes.next(count - chunk.stop, with_graph=with_graph)
            chunk = Chunk(chunk.stop, chunk.stop + size, group.replay.take())
            with accumulation.watching():
                live = run_guarded(group, chunk) if with_graph else group.run_graphless(chunk.start, chunk.stop)
            differentiable |= live.requires_grad
            rows.append(live.detach())
            check_rows(rows[0], rows[-1], chunk.start, finite=group.nonfinite == "raise")
            accumulation.add(chunk, live)
            report(chunk.stop)
        group.steady = group.replay.is_at(before)
        return accumulation, torch.cat(rows), differentiable


class NoPoses(Accumulation):
    """Of a rank whose share of the group is empty."""

    keeps_graph = False

    def __init__(self, leaves: int) -> None:
        self._leaves = leaves

    def add(self, *_: object) -> None:
        """There is nothing to take note of."""

    def close(self, *_: object) -> Sequence[Tensor]:
        return []

    def gradients(self, *_: object, **__: object) -> list[Tensor | None]:
        return [None] * self._leaves
