"""Make the `Batch` of a call from what the user passed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradhooks.combination import BoundCombination
from gradhooks.combination_arguments import refuse_unknown_arguments
from gradhooks.distributed.agreement import Agreement
from gradhooks.distributed.collectives import Collectives
from gradhooks.distributed.pose_parallel import PosePartition
from gradhooks.distributed.sharded_model import ShardedModel
from gradhooks.distributed.subject import Subject
from gradhooks.distributed.validation import refuse_pose_parallel
from gradhooks.engine.autocast import AutocastState
from gradhooks.engine.batch import Batch
from gradhooks.engine.chunk_dependence import depends_on_chunk
from gradhooks.engine.lazy_parameters import initialize_lazy_parameters
from gradhooks.engine.learned import Learned, Mode
from gradhooks.engine.memory_need import MemoryNeed, mode_of
from gradhooks.engine.model_parts import ModelParts, ModelPartsCache
from gradhooks.engine.pose_description import describe_poses, refuse_nested_groups
from gradhooks.engine.pose_forms import as_poses
from gradhooks.engine.pose_inputs import Poses, inputs_that_require_grad
from gradhooks.engine.pose_runner import PoseRunner
from gradhooks.engine.report import Report
from gradhooks.engine.schedule import Schedule
from gradhooks.engine.stack_promise import refuse_broken_promise
from gradhooks.errors import PosesError
from gradhooks.group_index import GroupIndex
from gradhooks.group_loop import accepts_empty_groups, name_of
from gradhooks.group_validation import group_index, read_count, read_index
from gradhooks.groups import Groups, moved_by_data_parallel
from gradhooks.options import Options, call_model

_ALONE = Collectives(None)


class _Call(NamedTuple):
    """What `read_batch` gets, documented there."""

    model: nn.Module
    options: Options
    combination: Any
    arguments: Mapping[str, Any]
    sharded: ShardedModel
    learned: Learned
    cache: ModelPartsCache


class _Read(NamedTuple):
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


def read_batch(
    model: nn.Module,
    options: Options,
    combination: Any,
    poses: Any,
    *,
    groups: Any,
    arguments: Mapping[str, Any],
    parts: ModelParts,
    sharded: ShardedModel,
    learned: Learned,
    cache: ModelPartsCache,
    agreement: Agreement,
) -> Batch:
    """Return the batch of a call.

    Args:
        model: The bare model.
        options: The options.
        combination: A `Combination`, a callable, or None.
        poses: What the user passed: poses, or `Groups`.
        groups: The group number of each pose, or None.
        arguments: The keyword arguments of the call, which go to the combination.
        parts: The parts of the model; lazy parameters may have no shapes yet.
        sharded: How the parameters are sharded, if they are.
        learned: What earlier batches have shown.
        cache: Keeps the parts of the model.
        agreement: Compares the ranks of the process group.

    Raises:
        PosesError: There are no poses, they have no usable form, or the group numbers do not fit them.
        CombinationError: The combination cannot be used with a process group, or does not take an argument.
        ConcurrentUseError: Another thread runs poses through the model.
        DistributedError: Another rank failed, or differs from this one.
    """
    call = _Call(model, options, combination, arguments, sharded, learned, cache)
    autocast = AutocastState(parts.device_types)
    if options.process_group is None:
        read = _read(call, poses, groups, parts, may_be_empty=False)
        return _batch(call, read, autocast, PosePartition(_ALONE, [len(read.poses)]), [read.group_count])
    collectives = Collectives(options.process_group, agreement.call)
    subject = Subject(model, combination, _settings(options, autocast))
    with collectives.all_or_none("reading of the poses") as message:
        read = _read(call, poses, groups, parts, may_be_empty=True)
        refuse_pose_parallel(inputs_that_require_grad(read.poses), combination)
        message.sent = [*agreement.summary(subject), len(read.poses), read.group_count]
    rows = agreement.confirm(collectives, message.received, subject)
    counts, group_counts = ([int(row[column]) for row in rows] for column in (0, 1))
    if not any(counts):
        raise PosesError("there are no poses on any rank: a group needs at least one pose")
    return _batch(call, read, autocast, PosePartition(collectives, counts), group_counts)


def _read(call: _Call, poses: Any, groups: Any, parts: ModelParts, *, may_be_empty: bool) -> _Read:
    """Read poses and groups, and see to it that the model can take the poses."""
    refuse_unknown_arguments(call.combination, call.arguments)
    poses, index, count = _separate(poses, groups, parts.device)
    prepared = _prepare(poses, call.options, may_be_empty=may_be_empty)
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
    return _Read(prepared, given, group_count, parts)


def _batch(
    call: _Call, read: _Read, autocast: AutocastState, partition: PosePartition, group_counts: Sequence[int]
) -> Batch:
    """Return the batch, with what earlier batches and the first poses show of the model."""
    model, options, learned, parts, poses = call.model, call.options, call.learned, read.parts, read.poses
    groups = _gather_groups(read.groups, group_counts, partition, call.combination)
    mode = mode_of(getattr(model, "training", False), autocast.dtypes)
    is_whole = not call.sharded
    schedule = _schedule(call, mode, parts, batched=poses.batched and is_whole)
    batch = Batch(
        model=model,
        options=options,
        combination=BoundCombination(call.combination, partition.total, call.arguments, groups),
        poses=poses,
        partition=partition,
        parts=parts,
        sharded=call.sharded,
        autocast=autocast,
        mode=mode,
        schedule=schedule,
        runner=PoseRunner(model, options.call, len(poses), schedule.need),
        open_graphs=call.cache.open_graphs,
        learned=learned,
        report=Report(len(poses), 1 if groups is None else groups.count, describe_poses(poses)),
    )
    if mode in learned.needs_grad_mode:
        batch.runner.require_grad_mode()
    schedule.one_by_one = depends_on_chunk(batch)
    batch.runner.measures = schedule.left > 0 and is_whole  # shards have no storage to be counted
    return batch


def _separate(poses: Any, groups: Any, device: torch.device) -> tuple[Any, Any, int | None]:
    if not isinstance(poses, Groups):
        return poses, groups, None
    if groups is not None:
        raise PosesError("Groups already contains the group numbers of its poses; leave groups= out")
    poses = moved_by_data_parallel(poses, device)
    return poses.poses, poses.index, poses.count


def _settings(options: Options, autocast: AutocastState) -> dict[str, object]:
    """Return the options and modes in which the ranks of a process group must agree."""
    return {
        "grad mode": "on" if torch.is_grad_enabled() else "off",
        "autocast": autocast.dtypes or "off",
        "nonfinite=": options.nonfinite,
        "tolerance=": options.tolerance,
    }


def _prepare(poses: Any, options: Options, *, may_be_empty: bool) -> Poses:
    prepared = as_poses(poses, options.collate, may_be_empty=may_be_empty)
    if (options.chunk_size or 1) > 1 and not prepared.batched:
        raise PosesError(
            "chunks of more than one pose need collate= to make a batch of a list, or poses stacked in a tensor"
        )
    if options.call is call_model and len(prepared) and not prepared.batched:
        refuse_nested_groups(prepared.slice(0, 1))
    return prepared


def _schedule(call: _Call, mode: Mode, parts: ModelParts, *, batched: bool) -> Schedule:
    with_graph = parts.trainable and torch.is_grad_enabled()
    return Schedule(
        call.options.memory,
        call.options.chunk_size,
        batched=batched,
        need=MemoryNeed(call.learned, mode, parts.device, with_graph=with_graph),
        gradient_bytes=parts.gradient_bytes,
        open_graphs=call.cache.open_graphs,
        learned=call.learned,
        device=parts.device,
    )


def _gather_groups(
    index: Tensor | None, counts: Sequence[int], partition: PosePartition, combination: Any
) -> GroupIndex | None:
    """Return the groups of the poses of all ranks, given the number of groups on each, -1 without groups."""
    if max(counts) < 0:
        return None
    without = [rank for rank, count in enumerate(counts) if count < 0 and partition.counts[rank]]
    if without:
        raise PosesError(
            f"groups= is missing on rank {without[0]}; pass it on all ranks of the process_group or on none"
        )
    index = torch.empty(0, dtype=torch.int64) if index is None else index
    if not partition.collectives.is_single:
        index = partition.collectives.gather_rows(index, partition.counts)
    return group_index(
        index,
        max(counts) or None,
        empty_allowed=accepts_empty_groups(combination),
        combination_name=name_of(combination),
    )
