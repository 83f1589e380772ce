"""Groups that train nothing: no hook is set, nothing is kept."""

import torch
from torch import Tensor

from gradhooks.distributed.pose_parallel import OUTLINE
from gradhooks.engine.context import Group, storages_of
from gradhooks.engine.pose_inputs import check_rows, prediction_rows
from gradhooks.engine.progress import reporting


def predict(group: Group) -> Tensor:
    """The predictions of all poses on all ranks, shape `(N, *prediction)`, detached.

    The model runs in the user's grad mode: a frozen one may still differentiate by its inputs.
    """
    share = group.share
    with group.sharding.gathered(), share.ranks.together("its forward", OUTLINE) as notes:
        own = group.sizes.until_they_fit(lambda: _attempt(group)) if group.sizes.automatic else _own(group)
        notes.told = share.outline(own)
    device = next((tensor.device for tensor in group.model.parameters()), torch.device("cpu"))
    return share.predictions_of_all(own, notes.heard, device)


def _attempt(group: Group) -> Tensor:
    if group.sizes.unknown and len(group.poses):
        with group.replay.undone():
            group.sizes.measure(lambda few: _rows(group, 0, few), len(group.poses), storages_of(group.model))
    with group.replay.undone(unless_it_succeeds=True):
        return _own(group)


def _own(group: Group) -> Tensor:
    rows: list[Tensor] = []
    stop = 0
    with reporting(group.progress, len(group.poses), "poses") as report:
        while stop < len(group.poses):
            start, stop = stop, stop + group.sizes.next(len(group.poses) - stop, with_graph=False)
            rows.append(_rows(group, start, stop).detach())
            check_rows(rows[0], rows[-1], start, finite=group.nonfinite == "raise")
            report(stop)
    return torch.cat(rows) if rows else torch.empty(0)


def _rows(group: Group, start: int, stop: int) -> Tensor:
    return prediction_rows(group.call(group.model, group.poses.between(start, stop)), start, stop, group.poses.batched)
