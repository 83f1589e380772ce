"""PlannedEngine: what an accumulator asks an engine for when it begins a batch."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from gradhooks.combination import BoundCombination, StreamWeights
from gradhooks.engine.findings import TRUSTED, Findings
from gradhooks.engine.parameter_hooks import Receiver
from gradhooks.engine.report import Report
from gradhooks.options import Options


@dataclass(frozen=True)
class PlannedEngine:
    """Implements the part of the protocol `Engine` that `Accumulator.begin` uses, without poses."""

    options: Options
    combination: BoundCombination
    report: Report
    pose_count: int
    groups: list[int] | None
    group_count: int
    gradient_bytes: int
    memory_left: int
    chunk_overhead: float
    leaves: tuple[Tensor, ...] = ()
    findings: Findings = TRUSTED

    def declare(self, predictions: Tensor, start: int) -> StreamWeights | None:
        """Return what the combination declares."""
        return self.combination.declare(predictions, start)

    def intercept(self, receive: Receiver, indices: Iterable[int]) -> ExitStack:
        """Return a handle that does nothing, since no gradient arrives."""
        del receive, indices
        return ExitStack()

    def skip_threshold(self, dtype: torch.dtype) -> float:
        """Return the size of a coefficient below which a pose is skipped: no pose is, in a plan."""
        del dtype
        return 0.0

    def fp16_scale(self, predictions: Tensor) -> float:
        """Return the scale of cotangents."""
        del predictions
        return 1.0
