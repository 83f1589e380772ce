"""Find out whether a prediction depends on the other poses of its chunk, as with batch normalization in training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradhooks.engine.batch import Batch
from gradhooks.engine.model_state import Snapshot
from gradhooks.engine.nested import independent_copy
from gradhooks.engine.parametrization_cache import uncached_parametrizations
from gradhooks.engine.pose_inputs import Poses
from gradhooks.engine.side_outputs import output_rows

Change = Callable[[Tensor], Tensor]

_SLIGHTLY = 0.99
"""The factor by which the other pose is changed: small, and it keeps probabilities and masks in their range."""


def depends_on_chunk(batch: Batch) -> bool:
    """Return whether poses must run one by one, since a prediction depends on the other poses of its chunk.

    Asked once for each mode of the model, if the size of chunks is left to the library. The first two poses run without
    a trace: alone and together, or, where random numbers are drawn, together with another second pose of the same
    shapes, so that the same numbers are drawn.
    """
    free_to_choose = batch.options.chunk_size is None and batch.poses.batched and not batch.sharded
    if not free_to_choose or len(batch.poses) < 2 or batch.schedule.left == 0:  # noqa: PLR2004 - a pair
        return False
    known = batch.learned.chunk_dependent
    if batch.mode not in known:
        poses, state = batch.poses.narrow(0, 2), batch.parts.state
        with uncached_parametrizations(), state.preserved() as before:
            try:
                alone = _predict(batch, poses.slice(0, 1), 1)
            except Exception:
                return True
            drew = not state.unchanged_since(before)
            state.restore(before)
            try:
                known[batch.mode] = _differ_together(batch, poses, alone, drew=drew, before=before)
            except Exception:
                known[batch.mode] = True
    return known[batch.mode]


def _differ_together(batch: Batch, poses: Poses, alone: Tensor, *, drew: bool, before: Snapshot) -> bool:
    together = _predict(batch, poses.slice(0, 2), 2)
    if not drew:
        return _differ(alone[0], together[0])
    changed = _with_other_second_pose(poses)
    if changed is None:
        return True
    batch.parts.state.restore(before)
    return _differ(together[0], _predict(batch, changed.slice(0, 2), 2)[0])


def _predict(batch: Batch, inputs: Any, count: int) -> Tensor:
    with torch.enable_grad():  # a model may differentiate in its forward; no graph outlives this function
        copied = independent_copy(inputs)  # a model may change them
        output = batch.options.call(batch.model, copied)
    return output_rows(output, 0, count, batched=True, may_have_side=True)[0].detach()


def _differ(first: Tensor, second: Tensor) -> bool:
    allowed = torch.finfo(first.dtype).eps ** 0.75 * first.abs().max()
    return not bool((first - second).abs().max() <= allowed)


def _with_other_second_pose(poses: Poses) -> Poses | None:
    """Return the two poses with the second one changed; None if nothing in it can be changed."""
    for change in (_scaled, _reversed):
        changed: list[bool] = []

        def changing(tensor: Tensor, change: Change = change, changed: list[bool] = changed) -> Tensor:
            other = change(tensor.detach())
            changed.append(not torch.equal(other, tensor))
            return other

        others = poses.change(1, changing)
        if any(changed):
            return others
    return None


def _scaled(tensor: Tensor) -> Tensor:
    return tensor * _SLIGHTLY if tensor.is_floating_point() else tensor


def _reversed(tensor: Tensor) -> Tensor:
    return tensor.flip(-1) if tensor.dim() else tensor
