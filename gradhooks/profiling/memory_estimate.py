"""plan: what each accumulator will need, from one probe pose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradhooks.combination import BoundCombination
from gradhooks.engine.memory_budget import free_bytes
from gradhooks.profiling.peak_memory import PeakMemory
from gradhooks.engine.nested import tensors_in
from gradhooks.profiling.table import table
from gradhooks.profiling.undisturbed import undisturbed
from gradhooks.wrapper import MultiPose


@dataclass(frozen=True)
class Plan:
    """Predicted peaks of a training step, beyond model and poses; prints as a table.

    Attributes:
        poses: N.
        gradient_bytes: One copy of the gradients.
        graph_bytes: The peak of the probe pose's forward with a graph.
        step_bytes: The peak of a plain step of the probe pose with gradients already there, those included.
        peaks: Bytes by accumulator, and of the full graph.
        free_bytes: What the model's device has left.
        choice: What `auto` will do first.
        reason: Why.
    """

    poses: int
    gradient_bytes: int
    graph_bytes: int
    step_bytes: int
    peaks: dict[str, int]
    free_bytes: int
    choice: str
    reason: str

    def fits(self, way: str) -> bool:
        """Whether the peak of an accumulator, or of `"full graph"`, is within what is free."""
        return self.peaks[way] <= self.free_bytes

    def __str__(self) -> str:
        rows = [[way, f"{peak / 2**20:.2f} MiB", "yes" if self.fits(way) else "no"] for way, peak in self.peaks.items()]
        return (
            table([f"{self.poses} poses", "predicted peak", "fits"], rows)
            + f"\nfree: {self.free_bytes / 2**20:.0f} MiB; auto begins with {self.choice}: {self.reason}"
        )


def estimate_memory(
    model: nn.Module,
    poses: Sequence[Any],
    combination: str | Callable[[Tensor], Tensor] = "mean",
    *,
    count: int | None = None,
    **options: Any,
) -> Plan:
    """Predict the peak of every accumulator for a group, by running its largest pose once.

    Args:
        model: The bare model; it is left as it was.
        poses: A list of poses.
        combination: As for `MultiPose`.
        count: N, if the group will have another number of such poses.
        **options: Further options of `MultiPose`.
    """
    count = len(poses) if count is None else count
    probe = max(poses, key=lambda pose: sum(tensor.nbytes for _, tensor in tensors_in(pose)))
    scorer = MultiPose(model, combination, accumulator="auto", **options)
    with undisturbed(model):
        device = next(model.parameters()).device
        with torch.no_grad():
            prediction = scorer([probe]).per_pose
        sums = _running_sums(BoundCombination(scorer.combination, count), prediction)
        gradients, graph, first, later = _probed(scorer, probe, device)
        model.zero_grad()
        scorer([probe])
    peaks = {"full graph": (count - 1) * graph + first, "recompute": later}
    if sums is not None:
        peaks["stream"] = later + (sums - 1) * gradients
    peaks["store"] = max((count - 1) * gradients + first, (count + 1) * gradients)
    return Plan(
        count, gradients, graph, later, peaks, free_bytes(device), scorer.report.accumulator, scorer.report.reason
    )


def _probed(scorer: MultiPose, probe: Any, device: torch.device) -> tuple[int, int, int, int]:
    """Bytes of the gradients, of one graph, of the peak of a first step, and of a later one with gradients there."""
    model = scorer.model
    model.zero_grad()
    with PeakMemory(device) as forward:
        prediction = scorer.call(model, probe)
    with PeakMemory(device) as first:
        scorer.call(model, probe).sum().backward()
    gradients = sum(leaf.grad.nbytes for leaf in model.parameters() if leaf.grad is not None)
    with PeakMemory(device) as later:
        scorer.call(model, probe).sum().backward()
    del prediction
    return gradients, forward.peak, first.peak, gradients + later.peak


def _running_sums(combination: BoundCombination, prediction: Tensor) -> int | None:
    if prediction.numel() != 1:
        return None
    declaration = combination.declare(prediction.flatten(), 0)
    if declaration is None:
        return None
    features = declaration.features
    return 1 if features is None else 1 + features.reshape(1, -1).shape[1]
