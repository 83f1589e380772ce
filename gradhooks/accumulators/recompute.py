"""Recompute: run every pose without a graph, and those that matter again once their coefficients are known."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from loguru import logger
from torch import Tensor

from gradhooks.accumulators.base import Accumulator, Engine, refuse_gradient_combination, set_accumulator
from gradhooks.engine.accumulation import Accumulation, Chunk, Coefficients
from gradhooks.engine.gradient_sums import Gradients
from gradhooks.errors import ReplayError
from gradhooks.numerics import largest_per_row, on_host


class Recompute(Accumulator):
    """Gradient checkpointing per pose: serves every combination and prediction shape, for one more forward.

    The outer backward runs the poses that matter again, last to first, each with its coefficient as cotangent. This is
    the order of autograd, so the sums agree bit for bit with the full graph.
    """

    name = "recompute"
    supports_sharded = True

    def begin(self, engine: Engine, predictions: Tensor) -> Accumulation:
        del predictions
        return self.begin_because(engine, "it was requested by name")

    def begin_because(self, engine: Engine, reason: str) -> Accumulation:
        """Begin a batch for a reason that the report shows, such as another accumulator that cannot serve it."""
        refuse_gradient_combination(engine, self.name)
        if not engine.findings.repeatable:
            refuse_second_run(self.name)
        if not engine.findings.linear:
            reason = "the backward of the model is not linear, so every pose runs again with its own coefficient"
        set_accumulator(engine, self.name, reason)
        return RecomputeAccumulation(engine)


class RecomputeAccumulation(Accumulation):
    """Keeps what the predictions of the second run are compared with."""

    keeps_graph = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._dtype = torch.float32

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        del chunk, predictions

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        self._dtype = predictions.dtype
        return self._engine.tensors_to_compare(predictions)

    def gradients(self, saved: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        del last  # nothing is saved that could be overwritten
        engine = self._engine
        if engine.findings.linear:
            selected = significant_poses(coefficients, engine.skip_threshold(self._dtype))
        else:  # a coefficient of 0 may give a gradient
            selected = torch.ones(engine.pose_count, dtype=torch.bool)
        gradients = engine.rerun(saved, coefficients.total, selected)
        engine.report.skipped = engine.pose_count - int(selected.sum())
        logger.debug("{} of {} poses skipped: negligible coefficients", engine.report.skipped, engine.pose_count)
        engine.add_zeros_for_skipped(gradients, ~selected)
        return gradients


def refuse_second_run(accumulator: str) -> NoReturn:
    """Raise the error for a model that must not run twice.

    Raises:
        ReplayError: Always.
    """
    raise ReplayError(
        "a second run of a pose gives another prediction or gradient than the first, and the accumulator "
        f"{accumulator!r} runs poses twice: the model depends on something that is not restored (a random generator "
        "inside an object of another library, a value that it keeps in such an object). Name its generators with "
        "generators=[...], use accumulator='store', which runs every pose once, or allow enough memory= for poses to "
        "run plainly"
    )


def significant_poses(coefficients: Coefficients, threshold: float) -> Tensor:
    """Return which poses get a backward, shape `(N,)`, bool, on the CPU. A pose with a NaN coefficient does.

    Args:
        coefficients: The coefficients.
        threshold: Size relative to the largest coefficient; smaller ones are skipped.
    """
    size = largest_per_row(coefficients.total.detach())
    size, *known = on_host(size) if coefficients.largest is None else on_host(size, coefficients.largest)
    largest = known[0] if known else torch.where(size.isfinite(), size, 0).max()
    return ~(size <= largest * threshold) & (size != 0)
