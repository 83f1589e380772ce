"""Make the `Batch` of a call from what the user passed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradhooks.combination import BoundCombination
from gradhooks.combination_arguments import refuse_unknown_arguments
from gradhooks.distributed.agreement import Agreement, begin_batch
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
from gradhooks.group_validation import as_integers, group_index, read_index
from gradhooks.groups import Groups
from gradhooks.options import Options, call_model


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
    collectives = Collectives(options.process_group, agreement.call)
    autocast = _autocast(parts)
    mode = mode_of(getattr(model, "training", False), autocast.dtypes)
    with begin_batch(agreement, collectives, sharded) as beginning:
        refuse_unknown_arguments(combination, arguments)
        poses, index, group_count = _separate(poses, groups)
        prepared = _prepare(poses, options, index, parts, may_be_empty=not collectives.is_single)
        index = None if index is None else read_index(index, len(prepared))
        if parts.has_lazy_parameters:
            initialize_lazy_parameters(model, prepared, options.call, parts.device)
            parts = cache.get(model, options.generators)
        if not sharded:
            refuse_broken_promise(model, prepared, options, parts.state, learned)
        if sharded or not collectives.is_single:
            beginning.subject = _subject(model, combination, options, parts, prepared, sharded=bool(sharded))
            beginning.audit_is_due = _audit_is_due(options, mode, parts)
        beginning.counts = [len(prepared), -1 if index is None else group_count or 0]
    partition = PosePartition(collectives, [int(count) for count, *_ in beginning.of_all_ranks])
    if partition.total == 0:
        raise PosesError("there are no poses on any rank: a group needs at least one pose")
    gathered = _gather_groups(index, [int(count) for _, count, *_ in beginning.of_all_ranks], partition, combination)
    schedule = _schedule(options, mode, parts, learned, cache, batched=prepared.batched and not sharded)
    batch = Batch(
        model=model,
        options=options,
        combination=BoundCombination(combination, partition.total, arguments, gathered),
        poses=prepared,
        partition=partition,
        parts=parts,
        sharded=sharded,
        autocast=autocast,
        mode=mode,
        schedule=schedule,
        runner=PoseRunner(model, options.call, len(prepared), schedule.need),
        open_graphs=cache.open_graphs,
        learned=learned,
        report=Report(len(prepared), 1 if gathered is None else gathered.count, describe_poses(prepared)),
        ranks_audit=beginning.audit_is_due,
    )
    return _ready(batch)


def _ready(batch: Batch) -> Batch:
    """Return the batch, with what earlier batches and the first poses show of the model."""
    if batch.mode in batch.learned.needs_grad_mode:
        batch.runner.require_grad_mode()
    batch.schedule.one_by_one = depends_on_chunk(batch)
    batch.runner.measures = batch.schedule.left > 0 and not batch.sharded  # shards have no storage to be counted
    return batch


def _separate(poses: Any, groups: Any) -> tuple[Any, Any, int | None]:
    if not isinstance(poses, Groups):
        return poses, groups, None
    if groups is not None:
        raise PosesError("Groups already contains the group numbers of its poses; leave groups= out")
    return poses.poses, poses.index, poses.count


def _subject(
    model: nn.Module, combination: Any, options: Options, parts: ModelParts, prepared: Poses, *, sharded: bool
) -> Subject:
    """Return what ranks must have in common that share poses, or shards of parameters."""
    grad_mode, inputs = "on" if torch.is_grad_enabled() else "off", inputs_that_require_grad(prepared)
    if sharded:  # the order in which FSDP2 communicates depends on both
        modes = {"grad mode": grad_mode, "whether poses require grad": bool(inputs)}
        return Subject(model, None, modes, (), parts)
    refuse_pose_parallel(inputs, combination)
    settings = {
        "grad mode": grad_mode,
        "autocast": _autocast(parts).dtypes or "off",
        "nonfinite=": options.nonfinite,
        "tolerance=": options.tolerance,
    }
    return Subject(model, combination, settings, parts.state.training_flags, parts)


def _autocast(parts: ModelParts) -> AutocastState:
    return AutocastState(device.type for device in parts.state.devices)


def _audit_is_due(options: Options, mode: Mode, parts: ModelParts) -> bool:
    return options.audit and torch.is_grad_enabled() and (mode, parts.state.training_flags) not in parts.findings


def _prepare(poses: Any, options: Options, index: Any, parts: ModelParts, *, may_be_empty: bool) -> Poses:
    count = None if index is None else len(as_integers(index))
    prepared = as_poses(poses, options.collate, may_be_empty=may_be_empty, count=count, devices=parts.state.devices)
    if (options.chunk_size or 1) > 1 and not prepared.batched:
        raise PosesError(
            "chunks of more than one pose need collate= to make a batch of a list, or poses stacked in a tensor"
        )
    if options.call is call_model and len(prepared) and not prepared.batched:
        refuse_nested_groups(prepared.slice(0, 1))
    return prepared


def _schedule(
    options: Options, mode: Mode, parts: ModelParts, learned: Learned, cache: ModelPartsCache, *, batched: bool
) -> Schedule:
    with_graph = torch.is_grad_enabled() and parts.trainable
    return Schedule(
        options.memory,
        options.chunk_size,
        batched=batched,
        need=MemoryNeed(learned, mode, parts.device, with_graph=with_graph),
        gradient_bytes=parts.gradient_bytes,
        open_graphs=cache.open_graphs,
        learned=learned,
        device=parts.device,
    )


def _gather_groups(
    index: Tensor | None, counts: Sequence[int], partition: PosePartition, combination: Any
) -> GroupIndex | None:
    """Return the groups of the poses of all ranks, given the number of groups on each, -1 without groups."""
    if all(count < 0 for count in counts):
        return None
    without = [rank for rank, count in enumerate(counts) if count < 0 and partition.counts[rank]]
    if without:
        raise PosesError(
            f"groups= is missing on rank {without[0]}; pass it on all ranks of the process_group or on none"
        )
    index = torch.empty(0, dtype=torch.int64) if index is None else index
    if not partition.collectives.is_single:
        index = partition.collectives.gather_rows(index, partition.counts)
    bound = BoundCombination(combination, partition.total)
    return group_index(
        index, max(counts) or None, empty_allowed=bound.accepts_empty_groups, combination_name=bound.name
    )
