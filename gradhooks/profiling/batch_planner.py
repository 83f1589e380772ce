"""BatchPlanner: ask the library's own schedule and accumulators how they would run a batch."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from gradhooks.combination import BoundCombination
from gradhooks.distributed.agreement import Agreement
from gradhooks.engine.accumulation import Accumulation
from gradhooks.engine.batch import Batch
from gradhooks.engine.batch_setup import read_batch
from gradhooks.engine.learned import Learned
from gradhooks.engine.model_parts import ModelPartsCache
from gradhooks.engine.nested import tensors_in
from gradhooks.engine.open_graphs import OpenGraphs
from gradhooks.engine.report import Report
from gradhooks.engine.schedule import Schedule
from gradhooks.group_index import GroupIndex
from gradhooks.options import Options
from gradhooks.profiling.batch_plan import BatchPlan
from gradhooks.profiling.planned_engine import PlannedEngine
from gradhooks.profiling.training_batch import TrainingBatch
from gradhooks.wrapper import MultiPose

if TYPE_CHECKING:
    from gradhooks.accumulators.base import Engine


class BatchPlanner:
    """Plans a batch for one model after measuring one pose. The caller restores the state of the model.

    Args:
        batch: The model and some poses.
        scorer: Holds the options and the accumulator.
        count: The number of poses of the planned batch; the groups of the poses in `batch` are repeated for it.

    Attributes:
        pose_count: The number of poses.
        largest: The index of the pose that was measured.
        device: The device of the model.
    """

    def __init__(self, batch: TrainingBatch, scorer: MultiPose[Any], count: int) -> None:
        self.pose_count = count
        self._scorer = scorer
        self._learned = Learned()
        self._batch = _read(batch, scorer, self._learned)
        self.device = self._batch.parts.device
        poses = self._batch.poses
        sizes = [sum(tensor.nbytes for _, tensor in tensors_in(poses.slice(i, i + 1))) for i in range(len(poses))]
        self.largest = sizes.index(max(sizes))
        run = self._batch.runner.run_plainly(poses, self.largest, self.largest + 1, 0, measure=True)
        self._prediction = run.predictions.detach()
        groups = self._batch.combination.groups
        self._groups = None if groups is None else _repeated(groups, count)

    @property
    def group_count(self) -> int:
        """The number of groups."""
        return 1 if self._groups is None else self._groups.count

    @property
    def pose_bytes(self) -> int:
        """What the library expects the step of a pose to need."""
        return self._batch.schedule.need.step_bytes

    @property
    def plain_budget(self) -> int:
        """The `memory` with which all poses run plainly, at once."""
        return (self.pose_count - 1) * self.pose_bytes

    def plan(self, memory: str | float) -> BatchPlan:
        """Return how the batch runs with this value of the option `memory`."""
        schedule = self._schedule(memory)
        first_plain = schedule.first_plain(self.pose_count) if self._runs_plainly else self.pose_count
        plain = self.pose_count - first_plain
        report, copies = Report(accumulator="none", reason="the graphs of all poses fit in the allowed memory"), 0
        plain_chunks = _chunk_sizes(lambda start: schedule.plain_chunk_size(plain - start), plain)
        chunks: list[int] = []
        if first_plain:
            size = schedule.chunk_size(first_plain)
            report, copies, accumulation = self._choose(schedule, first_plain, size)
            chunks = _chunk_sizes(
                lambda start: schedule.chunk_size(
                    first_plain - start, longest=accumulation.longest_chunk(start) if start else None
                ),
                first_plain,
            )
        return BatchPlan(
            allowed=schedule.limit,
            plain=plain,
            intercepted=first_plain,
            plain_chunk_size=max(plain_chunks, default=0),
            chunks=len(plain_chunks) + len(chunks),
            chunk_size=max(chunks, default=0),
            accumulator=report.accumulator,
            reason=report.reason,
            gradient_copies=copies,
        )

    @property
    def _runs_plainly(self) -> bool:
        return self._scorer.accumulator.uses_plain_chunks and self._batch.combination.combine_gradients is None

    def _schedule(self, memory: str | float) -> Schedule:
        schedule = Schedule(
            memory,
            self._scorer.chunk_size,
            batched=self._batch.poses.batched,
            need=self._batch.schedule.need,
            gradient_bytes=self._batch.parts.gradient_bytes,
            open_graphs=OpenGraphs(),
            learned=replace(self._learned, memory_limit=None),
            device=self.device,
        )
        schedule.one_by_one = self._batch.schedule.one_by_one
        return schedule

    def _choose(self, schedule: Schedule, count: int, chunk_size: int) -> tuple[Report, int, Accumulation]:
        """Return how `count` poses are intercepted: a report, copies of the gradients, and the accumulation."""
        groups = None if self._groups is None else self._groups.index[:count].tolist()
        engine = PlannedEngine(
            options=self._batch.options,
            combination=BoundCombination(self._scorer.combination, self.pose_count, {}, self._groups),
            report=Report(groups=self.group_count),
            pose_count=count,
            groups=groups,
            group_count=self.group_count,
            gradient_bytes=self._batch.parts.gradient_bytes,
            memory_left=schedule.left,
            chunk_overhead=schedule.need.chunk_overhead,
        )
        predictions = self._prediction.expand(chunk_size, *self._prediction.shape[1:])
        accumulation = copy.deepcopy(self._scorer.accumulator).begin(cast("Engine", engine), predictions)
        if engine.report.accumulator != "stream":
            return engine.report, 0, accumulation
        declared = engine.declare(self._prediction.flatten(), 0)
        features = None if declared is None else declared.features
        group_count = 1 if groups is None else len(set(groups))
        return engine.report, group_count * (1 if features is None else 1 + features.numel()), accumulation


def _read(batch: TrainingBatch, scorer: MultiPose[Any], learned: Learned) -> Batch:
    """Return the batch as the engine reads it, which shows whether a prediction depends on the others of its chunk."""
    options = scorer.options.changed(memory=Options.memory, process_group=None)
    cache = ModelPartsCache()
    parts = cache.get(batch.model, options.generators)
    return read_batch(
        batch.model,
        options,
        scorer.combination,
        batch.poses,
        groups=batch.groups,
        arguments={},
        parts=parts,
        sharded=parts.sharded,
        learned=learned,
        cache=cache,
        agreement=Agreement(),
    )


def _repeated(groups: GroupIndex, count: int) -> GroupIndex:
    """Return the groups of `count` poses: those given, as often as needed, each time as new groups."""
    times = -(-count // len(groups.index))
    index = torch.cat([groups.index + number * groups.count for number in range(times)])[:count]
    return GroupIndex(index, int(index.max()) + 1)


def _chunk_sizes(size_at: Callable[[int], int], count: int) -> list[int]:
    start, sizes = 0, []
    while start < count:
        sizes.append(size_at(start))
        start += sizes[-1]
    return sizes
