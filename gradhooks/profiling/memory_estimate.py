"""Estimate the peak memory of every accumulator from one run of the largest pose."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from gradhooks.combination import BoundCombination
from gradhooks.engine.memory_budget import free_bytes, memory_in_bytes
from gradhooks.engine.nested import tensors_in
from gradhooks.options import OptionTypes
from gradhooks.profiling.peak_memory import PeakMemory
from gradhooks.profiling.preserved_state import preserved_state
from gradhooks.profiling.result_table import ResultTable, TableContent
from gradhooks.profiling.training_steps import CombinationLike
from gradhooks.units import format_bytes
from gradhooks.wrapper import MultiPose


@dataclass(frozen=True)
class MemoryEstimate(ResultTable):
    """The result of `estimate_memory`; prints as a table. All peaks are in addition to model and poses.

    Attributes:
        poses: Number of poses in the group.
        gradient_bytes: One copy of the gradients.
        graph_bytes: Peak of the largest pose's forward with its graph.
        step_bytes: Peak of a plain training step of the largest pose, with the gradients of an earlier step.
        peak_bytes: Peak of a step of the group, by accumulator, and under `"full graph"`.
        free_bytes: Free memory of the model's device.
        auto_accumulator: The accumulator that `auto` uses for the first group.
        auto_reason: Why it uses that one.
    """

    poses: int
    gradient_bytes: int
    graph_bytes: int
    step_bytes: int
    peak_bytes: dict[str, int]
    free_bytes: int
    auto_accumulator: str
    auto_reason: str

    def fits(self, name: str) -> bool:
        """Return whether the peak of an accumulator, or of `"full graph"`, is within the free memory."""
        return self.peak_bytes[name] <= self.free_bytes

    def table_content(self) -> TableContent:
        """Return one row per accumulator, and notes on the free memory and on `auto`."""
        rows = [
            [name, format_bytes(peak), "yes" if self.fits(name) else "no"] for name, peak in self.peak_bytes.items()
        ]
        notes = [f"free: {format_bytes(self.free_bytes)}; auto begins with {self.auto_accumulator}: {self.auto_reason}"]
        return TableContent([f"{self.poses} poses", "predicted peak", "fits"], rows, notes)


def estimate_memory(
    model: nn.Module,
    poses: Sequence[Any],
    combination: CombinationLike = "mean",
    *,
    count: int | None = None,
    **options: Unpack[OptionTypes],
) -> MemoryEstimate:
    """Predict the peak memory of every accumulator for a group, in chunks of one pose, by running its largest pose.

    With the option `memory` the figure of "recompute" is an upper bound.

    Args:
        model: The bare model; its state is restored.
        poses: A list of poses.
        combination: As for `MultiPose`.
        count: Number of poses in the group, if other than `len(poses)`.
        **options: Further options of `MultiPose`.
    """
    count = len(poses) if count is None else count
    largest = max(poses, key=lambda pose: sum(tensor.nbytes for _, tensor in tensors_in(pose)))
    scorer = MultiPose(model, combination, accumulator="auto", **options)
    with preserved_state(model):
        device = next(model.parameters()).device
        with torch.no_grad():
            prediction = scorer([largest]).per_pose
        copies = _gradient_copies(BoundCombination(scorer.combination, count), prediction)
        measured = _measure(scorer, largest, device)
        model.zero_grad()
        scorer([largest])
    gradients = measured.gradients
    full_graph = (count - 1) * measured.graph + measured.first_step
    kept_graphs = memory_in_bytes(scorer.memory, device)
    peaks = {"full graph": full_graph, "recompute": min(measured.later_step + kept_graphs, full_graph)}
    if copies is not None:
        peaks["stream"] = measured.later_step + (copies - 1) * gradients
    peaks["store"] = max((count - 1) * gradients + measured.first_step, (count + 1) * gradients)
    return MemoryEstimate(
        poses=count,
        gradient_bytes=gradients,
        graph_bytes=measured.graph,
        step_bytes=measured.later_step,
        peak_bytes=peaks,
        free_bytes=free_bytes(device),
        auto_accumulator=scorer.report.accumulator,
        auto_reason=scorer.report.reason,
    )


class _PoseMemory(NamedTuple):
    """Bytes that one pose needs: gradients, graph, and a step without and with earlier gradients."""

    gradients: int
    graph: int
    first_step: int
    later_step: int


def _measure(scorer: MultiPose[Any], pose: Any, device: torch.device) -> _PoseMemory:
    model = scorer.model
    model.zero_grad()
    with PeakMemory(device) as forward:
        prediction = scorer.call(model, pose)
    with PeakMemory(device) as first_step:
        scorer.call(model, pose).sum().backward()
    gradients = sum(leaf.grad.nbytes for leaf in model.parameters() if leaf.grad is not None)
    with PeakMemory(device) as later_step:
        scorer.call(model, pose).sum().backward()
    del prediction
    return _PoseMemory(gradients, forward.peak, first_step.peak, gradients + later_step.peak)


def _gradient_copies(combination: BoundCombination, prediction: Tensor) -> int | None:
    """Return how many copies of the gradients a stream keeps; None if the combination cannot be streamed."""
    if prediction.numel() != 1:
        return None
    declaration = combination.declare(prediction.flatten(), 0)
    if declaration is None:
        return None
    features = declaration.features
    return 1 if features is None else 1 + features.reshape(1, -1).shape[1]
