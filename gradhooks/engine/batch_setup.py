"""Make the `Batch` of a call from what the user passed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradhooks.combination import BoundCombination
from gradhooks.distributed.agreement import Agreement, begin_batch
from gradhooks.distributed.collectives import Collectives
from gradhooks.distributed.pose_parallel import PosePartition
from gradhooks.distributed.sharded_model import ShardedModel
from gradhooks.distributed.subject import Subject
from gradhooks.distributed.validation import refuse_pose_parallel
from gradhooks.engine.autocast import AutocastState
from gradhooks.engine.batch import Batch
from gradhooks.engine.chunk_dependence import depends_on_chunk
from gradhooks.engine.learned import Learned, Mode
from gradhooks.engine.memory_need import MemoryNeed, mode_of
from gradhooks.engine.model_parts import ModelParts, ModelPartsCache
from gradhooks.engine.pose_description import describe_poses
from gradhooks.engine.pose_inputs import inputs_that_require_grad
from gradhooks.engine.pose_reading import Call, ReadPoses, read_poses
from gradhooks.engine.pose_runner import PoseRunner
from gradhooks.engine.report import Report
from gradhooks.engine.schedule import Schedule
from gradhooks.errors import PosesError
from gradhooks.group_index import GroupIndex
from gradhooks.group_loop import accepts_empty_groups, name_of
from gradhooks.group_validation import group_index
from gradhooks.options import Options

_ALONE = Collectives(None)


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
    call = Call(model, options, combination, arguments, sharded, learned, cache)
    autocast = AutocastState(parts.device_types)
    if options.process_group is None and not sharded:
        read = read_poses(call, poses, groups, parts, may_be_empty=False)
        return _batch(call, read, autocast, PosePartition(_ALONE, [len(read.poses)]), [read.group_count])
    collectives = Collectives(options.process_group, agreement.call)
    with begin_batch(agreement, collectives, sharded) as beginning:
        read = read_poses(call, poses, groups, parts, may_be_empty=not collectives.is_single)
        if sharded or not collectives.is_single:
            beginning.subject = _subject(call, read, autocast)
            beginning.audit_is_due = _audit_is_due(options, _mode(model, autocast), read.parts)
        beginning.counts = [len(read.poses), read.group_count]
    counts, group_counts = ([int(row[column]) for row in beginning.of_all_ranks] for column in (0, 1))
    if not any(counts):
        raise PosesError("there are no poses on any rank: a group needs at least one pose")
    partition = PosePartition(collectives, counts)
    return _batch(call, read, autocast, partition, group_counts, ranks_audit=beginning.audit_is_due)


def _batch(
    call: Call,
    read: ReadPoses,
    autocast: AutocastState,
    partition: PosePartition,
    group_counts: Sequence[int],
    *,
    ranks_audit: bool = False,
) -> Batch:
    """Return the batch, with what earlier batches and the first poses show of the model."""
    model, options, learned, parts, poses = call.model, call.options, call.learned, read.parts, read.poses
    groups = _gather_groups(read.groups, group_counts, partition, call.combination)
    mode = _mode(model, autocast)
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
        ranks_audit=ranks_audit,
    )
    if mode in learned.needs_grad_mode:
        batch.runner.require_grad_mode()
    schedule.one_by_one = depends_on_chunk(batch)
    batch.runner.measures = schedule.left > 0 and is_whole  # shards have no storage to be counted
    return batch


def _subject(call: Call, read: ReadPoses, autocast: AutocastState) -> Subject:
    """Return what ranks must have in common that share poses, or shards of parameters."""
    grad_mode, inputs = "on" if torch.is_grad_enabled() else "off", inputs_that_require_grad(read.poses)
    if call.sharded:  # the order in which FSDP2 communicates depends on both
        modes = {"grad mode": grad_mode, "whether poses require grad": bool(inputs)}
        return Subject(call.model, None, modes, (), read.parts)
    refuse_pose_parallel(inputs, call.combination)
    settings = {
        "grad mode": grad_mode,
        "autocast": autocast.dtypes or "off",
        "nonfinite=": call.options.nonfinite,
        "tolerance=": call.options.tolerance,
    }
    return Subject(call.model, call.combination, settings, read.parts.state.training_flags, read.parts)


def _mode(model: nn.Module, autocast: AutocastState) -> Mode:
    return mode_of(getattr(model, "training", False), autocast.dtypes)


def _audit_is_due(options: Options, mode: Mode, parts: ModelParts) -> bool:
    return options.audit and torch.is_grad_enabled() and (mode, parts.state.training_flags) not in parts.findings


def _schedule(call: Call, mode: Mode, parts: ModelParts, *, batched: bool) -> Schedule:
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
