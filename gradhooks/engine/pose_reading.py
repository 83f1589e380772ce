"""Read the poses and groups of a call, and see to it that the model can take the poses."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradhooks.combination_arguments import refuse_unknown_arguments
from gradhooks.distributed.sharded_model import ShardedModel
from gradhooks.engine.lazy_parameters import initialize_lazy_parameters
from gradhooks.engine.learned import Learned
from gradhooks.engine.model_parts import ModelParts, ModelPartsCache
from gradhooks.engine.pose_description import refuse_nested_groups
from gradhooks.engine.pose_forms import as_poses
from gradhooks.engine.pose_inputs import Poses
from gradhooks.engine.stack_promise import refuse_broken_promise
from gradhooks.errors import PosesError
from gradhooks.group_validation import as_integers, read_count, read_index
from gradhooks.groups import Groups, moved_by_data_parallel
from gradhooks.options import Options, call_model


class Call(NamedTuple):
    """What `read_batch` gets, documented there."""

    model: nn.Module
    options: Options
    combination: Any
    arguments: Mapping[str, Any]
    sharded: ShardedModel
    learned: Learned
    cache: ModelPartsCache


class ReadPoses(NamedTuple):
    """The poses of this process.

    Attributes:
        poses: The poses.
        groups: The group of each pose, shape `(n,)`, or None.
        group_count: The number of groups; 0 where the user left it out, -1 without groups.
        parts: The parts of the model, in which nothing is lazy any more.
    """

    poses: Poses
    groups: Tensor | None
    group_count: int
    parts: ModelParts


def read_poses(call: Call, poses: Any, groups: Any, parts: ModelParts, *, may_be_empty: bool) -> ReadPoses:
    """Read poses and groups, and see to it that the model can take the poses."""
    refuse_unknown_arguments(call.combination, call.arguments)
    poses, index, count = _separate(poses, groups, parts.device)
    index = None if index is None else as_integers(index)
    prepared = _prepare(poses, call.options, index, parts, may_be_empty=may_be_empty)
    given, group_count = None, -1
    if index is not None:
        given, group_count = read_index(index, len(prepared)), 0
        if not (count is None or (count == 0 and len(prepared) == 0)):  # a rank without poses may have no groups
            group_count = read_count(count)
    if parts.has_lazy_parameters:
        initialize_lazy_parameters(call.model, prepared, call.options.call, parts.device)
        parts = call.cache.get(call.model, call.options.generators)
    if not call.sharded:
        refuse_broken_promise(call.model, prepared, call.options, parts.state, call.learned)
    return ReadPoses(prepared, given, group_count, parts)


def _separate(poses: Any, groups: Any, device: torch.device) -> tuple[Any, Any, int | None]:
    if not isinstance(poses, Groups):
        return poses, groups, None
    if groups is not None:
        raise PosesError("Groups already contains the group numbers of its poses; leave groups= out")
    poses = moved_by_data_parallel(poses, device)
    return poses.poses, poses.index, poses.count


def _prepare(poses: Any, options: Options, index: Tensor | None, parts: ModelParts, *, may_be_empty: bool) -> Poses:
    count = None if index is None else index.shape[0]
    prepared = as_poses(poses, options.collate, may_be_empty=may_be_empty, count=count, devices=parts.state.devices)
    if (options.chunk_size or 1) > 1 and not prepared.batched:
        raise PosesError(
            "chunks of more than one pose need collate= to make a batch of a list, or poses stacked in a tensor"
        )
    if options.call is call_model and len(prepared) and not prepared.batched:
        refuse_nested_groups(prepared.slice(0, 1))
    return prepared
