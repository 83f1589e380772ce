"""Estimate what a step of a batch needs at several values of the option `memory`, from steps of a few poses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from gradhooks.accumulators.base import Accumulator
from gradhooks.engine.memory_budget import free_bytes
from gradhooks.options import OptionTypes
from gradhooks.profiling.batch_plan import BatchPlan
from gradhooks.profiling.batch_planner import BatchPlanner
from gradhooks.profiling.pose_measurement import measure_pose_memory
from gradhooks.profiling.preserved_state import preserved_state
from gradhooks.profiling.result_table import ResultTable, TableContent
from gradhooks.profiling.training_batch import CombinationLike, TrainingBatch
from gradhooks.units import format_bytes
from gradhooks.wrapper import MultiPose

BUDGETS = (0.0, 4.0**-4, 4.0**-3, 4.0**-2, 4.0**-1, 1.0)
"""The budgets of the curve, relative to what is needed so that all poses run plainly."""


@dataclass(frozen=True)
class MemoryEstimateRow:
    """A step of the batch with one value of the option `memory`.

    Attributes:
        memory: The value.
        plan: How the poses run.
        peak_bytes: The peak of the step, in addition to the model and the poses.
    """

    memory: str | float
    plan: BatchPlan
    peak_bytes: int


@dataclass(frozen=True)
class MemoryEstimate(ResultTable):
    """The result of `estimate_memory`; prints as a table. All peaks are in addition to model and poses.

    Attributes:
        rows: One for each budget, from the least to the largest.
        memory: The option `memory`.
        poses: Poses of the batch.
        groups: Groups of the batch.
        gradient_bytes: One copy of the gradients.
        pose_bytes: What the library expects a pose to need.
        full_graph_bytes: Peak of a step of the full graph, whose poses run one by one.
        free_bytes: Free memory of the model's device.
    """

    rows: tuple[MemoryEstimateRow, ...]
    memory: str | float
    poses: int
    groups: int
    gradient_bytes: int
    pose_bytes: int
    full_graph_bytes: int
    free_bytes: int

    @property
    def chosen(self) -> MemoryEstimateRow:
        """The row of the option `memory`: what the library does."""
        return next(row for row in self.rows if row.memory == self.memory)

    @property
    def fits(self) -> bool:
        """Whether the peak of the chosen row is within the free memory."""
        return self.chosen.peak_bytes <= self.free_bytes

    def table_content(self) -> TableContent:
        """Return one row for each budget, the chosen one marked, and notes on the full graph and the free memory."""
        headers = ["memory", "allowed", "plain", "chunks", "run twice", "expected peak", "accumulator"]
        rows = [
            [
                f"-> {row.memory}" if row is self.chosen else str(row.memory),
                format_bytes(row.plan.allowed),
                str(row.plan.plain),
                str(row.plan.chunks),
                f"{row.plan.rerun_share:.0%}",
                format_bytes(row.peak_bytes),
                row.plan.accumulator,
            ]
            for row in self.rows
        ]
        size = f"{self.poses} poses" + (f" in {self.groups} groups" if self.groups > 1 else "")
        notes = [
            f"{size}; full graph: {format_bytes(self.full_graph_bytes)}; free: {format_bytes(self.free_bytes)}",
            f"{self.chosen.plan.accumulator}: {self.chosen.plan.reason}",
        ]
        return TableContent(headers, rows, notes)


def estimate_memory(
    model: nn.Module,
    poses: Any,
    combination: CombinationLike = "mean",
    *,
    combination_options: Mapping[str, Any] | None = None,
    groups: Any = None,
    count: int | None = None,
    accumulator: str | Accumulator = "auto",
    budgets: Sequence[str | float] | None = None,
    **options: Unpack[OptionTypes],
) -> MemoryEstimate:
    """Predict how the poses of a batch run, and the peak of a step, for several values of `memory`.

    The largest of the given poses is run a few times, and the model's state is restored. The sizes are those that the
    library would choose from this measurement; the poses that run twice are at most those in the table, since some may
    be skipped.

    Args:
        model: The bare model; its state is restored.
        poses: A list of poses, a stacked tensor, a mapping of stacked tensors, or `Groups`.
        combination: As for `MultiPose`.
        combination_options: As for `MultiPose`.
        groups: The group of each pose, shape `(M,)`; by default the poses are one group.
        count: The number of poses, if other than that of `poses`. Their groups are then repeated.
        accumulator: As for `MultiPose`.
        budgets: Values of the option `memory`; by default six, from 0 to what the full graph needs.
        **options: Further options of `MultiPose`.
    """
    scorer = MultiPose(model, combination, combination_options=combination_options, accumulator=accumulator, **options)
    batch = TrainingBatch(model, poses, scorer.combination, groups, scorer.call, scorer.collate)
    with preserved_state(model), torch.enable_grad():
        planner = BatchPlanner(batch, scorer, len(batch.inputs) if count is None else count)
        measured = measure_pose_memory(batch, planner.largest, planner.device)
    if budgets is None:
        budgets = [int(share * planner.plain_budget) for share in BUDGETS]
    plans = {memory: planner.plan(memory) for memory in dict.fromkeys([*budgets, scorer.memory])}
    rows = [MemoryEstimateRow(memory, plan, measured.peak(plan)) for memory, plan in plans.items()]
    return MemoryEstimate(
        rows=tuple(sorted(rows, key=lambda row: row.plan.allowed)),
        memory=scorer.memory,
        poses=planner.pose_count,
        groups=planner.group_count,
        gradient_bytes=measured.gradients,
        pose_bytes=planner.pose_bytes,
        full_graph_bytes=measured.separate.of(planner.pose_count),
        free_bytes=free_bytes(planner.device),
    )
