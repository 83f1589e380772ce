"""Make the `ForwardContext` of a group from what the user passed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gradhooks.combination import BoundCombination
from gradhooks.distributed.collectives import Collectives
from gradhooks.distributed.pose_parallel import PosePartition
from gradhooks.distributed.sharded_model import ShardedModel
from gradhooks.distributed.validation import refuse_pose_parallel
from gradhooks.engine.autocast import AutocastState
from gradhooks.engine.chunk_sizes import ChunkSizes
from gradhooks.engine.context import ForwardContext
from gradhooks.engine.lazy_parameters import initialize_lazy_parameters
from gradhooks.engine.leaf_validation import LeafValidator
from gradhooks.engine.learned import Learned
from gradhooks.engine.model_state import ModelState
from gradhooks.engine.pose_inputs import Poses, as_poses
from gradhooks.engine.pose_runner import PoseRunner
from gradhooks.engine.report import Report
from gradhooks.engine.shadow_parameters import ShadowParameters
from gradhooks.engine.training_flags import training_flags
from gradhooks.errors import PosesError
from gradhooks.options import Options


def make_context(
    model: nn.Module,
    options: Options,
    combination: Any,
    poses: Any,
    arguments: Mapping[str, Any],
    *,
    sharded: ShardedModel,
    learned: Learned,
) -> ForwardContext:
    """Return the context of a group.

    Args:
        model: The bare model.
        options: The options.
        combination: A `Combination` or a callable.
        poses: What the user passed.
        arguments: The keyword arguments of the call, which go to the combination.
        sharded: How the parameters are sharded, if they are.
        learned: What earlier groups have shown.

    Raises:
        PosesError: The group is empty, or not a group.
        CombinationError: The combination cannot be used with a process group.
        ConcurrentUseError: Another thread runs a group through the model.
        DistributedError: Another rank failed.
    """
    collectives = Collectives(options.process_group)
    with collectives.all_or_none("reading of the poses", 1) as message:
        prepared, shadows = _prepare(model, options, poses, sharded, may_be_empty=not collectives.is_single)
        if not collectives.is_single:
            refuse_pose_parallel(shadows.inputs, combination)
        message.sent = [len(prepared)]
    partition = PosePartition(collectives, [int(count) for (count,) in message.received])
    if partition.total == 0:
        raise PosesError("the group is empty on every rank: a group needs at least one pose")
    state = ModelState(model, options.generators)
    # Where parameters are sharded nothing reveals whether the model marks its inputs, so it always gets aliases.
    runner = PoseRunner(model, options.call, shadows, len(prepared), detach_inputs=bool(sharded))
    return ForwardContext(
        model=model,
        options=options,
        combination=BoundCombination(combination, partition.total, arguments),
        poses=prepared,
        partition=partition,
        sharded=sharded,
        shadows=shadows,
        state=state,
        autocast=AutocastState(device.type for device in state.devices),
        flags=training_flags(model),
        runner=runner,
        validator=LeafValidator(model, runner, shadows, state),
        chunk_sizes=ChunkSizes(options.chunk_size, learned.chunk_size),
        learned=learned,
        report=Report(poses=len(prepared)),
    )


def _prepare(
    model: nn.Module, options: Options, poses: Any, sharded: ShardedModel, *, may_be_empty: bool
) -> tuple[Poses, ShadowParameters]:
    """Return the poses of this process with detached inputs, and the shadows of the parameters and these inputs."""
    prepared = as_poses(poses, options.collate, may_be_empty=may_be_empty)
    if options.chunk_size != 1 and not prepared.batched:
        raise PosesError(
            "chunks of more than one pose need collate= to make a batch of a list, or poses stacked in a tensor"
        )
    initialize_lazy_parameters(model, lambda: options.call(model, prepared.slice(0, 1)))
    shadows = ShadowParameters(None if sharded else model)
    if torch.is_grad_enabled():
        if sharded and any(parameter.requires_grad for parameter in model.parameters()):
            # Without shadows, this leaf makes the predictions part of autograd's graph.
            shadows.shadow_input(torch.zeros((), requires_grad=True))
        prepared = prepared.map_tensors(shadows.shadow_input)
    return prepared, shadows
