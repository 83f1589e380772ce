"""Recompute: run every pose without a graph, and those that matter again once their coefficients are known."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from einops import reduce
from loguru import logger
from torch import Tensor

from gradhooks.accumulators.base import Accumulator, Engine, refuse_gradient_combination, set_accumulator
from gradhooks.accumulators.kept_graphs import KeptGraphs
from gradhooks.accumulators.online_softmax import declaration_of
from gradhooks.engine.accumulation import Accumulation, Chunk, Coefficients
from gradhooks.engine.gradient_sums import Gradients
from gradhooks.engine.memory_budget import memory_in_bytes
from gradhooks.engine.rerun import NO_GRAPHS


class Recompute(Accumulator):
    """Gradient checkpointing per pose: serves every combination and prediction shape, for one more forward.

    The outer backward runs the poses that matter again, last to first, each with its coefficient as cotangent. This is
    the order of autograd, so the sums agree bit for bit with the full graph. With the option `memory`, graphs are kept
    that need no second run: those of the poses with the largest log-weights if the combination declares them, else
    those of the first poses.
    """

    name = "recompute"
    supports_sharded = True

    def begin(self, engine: Engine, predictions: Tensor) -> Accumulation:
        return self.begin_because(engine, predictions, "it was requested by name")

    def begin_because(self, engine: Engine, predictions: Tensor, reason: str) -> Accumulation:
        """Begin a group for a reason that the report shows, such as another accumulator that cannot serve it."""
        refuse_gradient_combination(engine, self.name)
        set_accumulator(engine, self.name, reason)
        budget = memory_in_bytes(engine.options.memory, predictions.device)
        return RecomputeAccumulation(engine, KeptGraphs(budget, engine.storage_addresses()) if budget else None)


class RecomputeAccumulation(Accumulation):
    """Keeps the predictions, and as many graphs as fit in `memory`."""

    def __init__(self, engine: Engine, kept: KeptGraphs | None) -> None:
        self._engine = engine
        self._kept = kept
        self._stop = 0
        self.keeps_graph = kept is not None

    def forward_context(self) -> AbstractContextManager[None]:
        if self._kept is None or self._kept.has_room_for(self._engine.pose_count - self._stop):
            return nullcontext()
        return self._kept.measuring()

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        self._stop = chunk.stop
        if self._kept is not None and predictions.requires_grad and chunk.start > 0:  # the first was not measured
            declaration = declaration_of(self._engine, predictions, chunk.start)
            log_weight = 0.0 if declaration is None else max(declaration.log_weights)
            uniform = declaration is None or declaration.uniform
            fits = self._kept.offer(chunk.start, predictions, log_weight)
            self.keeps_graph = fits or not uniform  # with uniform weights nothing is replaced, so no later graph fits
            self._engine.report.graphs_kept = self._kept.pose_count

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        return [predictions]

    def gradients(self, saved: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        (predictions,) = saved
        engine = self._engine
        selected = significant_poses(coefficients, engine.skip_threshold(predictions.dtype))
        kept_graphs = NO_GRAPHS if self._kept is None else self._kept.live_predictions(release=last)
        gradients = engine.rerun(
            predictions, coefficients.total, selected, kept_graphs=kept_graphs, retain_graph=not last
        )
        engine.report.skipped = engine.pose_count - int(selected.sum())
        logger.debug("{} of {} poses skipped: negligible coefficients", engine.report.skipped, engine.pose_count)
        engine.add_zeros_for_skipped(gradients, ~selected)
        return gradients


def significant_poses(coefficients: Coefficients, threshold: float) -> Tensor:
    """Return which poses get a backward, shape `(N,)`, bool, on the CPU. A pose with a NaN coefficient does.

    Args:
        coefficients: The coefficients.
        threshold: Size relative to the largest coefficient; smaller ones are skipped.
    """
    size = reduce(coefficients.total.detach().abs(), "n ... -> n", "max").to("cpu", torch.float64)
    largest = coefficients.largest
    largest = torch.where(size.isfinite(), size, 0).max() if largest is None else largest.to("cpu", torch.float64)
    return ~(size <= largest * threshold) & (size != 0)
