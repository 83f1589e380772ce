"""Stream: fold each pose's gradient into running sums at once, with the log-weights that the combination declares."""

from collections.abc import Sequence

import torch
from loguru import logger
from torch import Tensor

from gradhooks.accumulators.base import (
    Accumulator,
    Engine,
    refuse_gradient_combination,
    refuse_nonlinear_backward,
    set_accumulator,
)
from gradhooks.accumulators.declaration_warning import warn_unexplained
from gradhooks.accumulators.declared_fit import fit_groups
from gradhooks.accumulators.declared_weights import DeclaredWeights, declared_weights
from gradhooks.accumulators.device_folding import DeviceFolding
from gradhooks.accumulators.host_folding import HostFolding
from gradhooks.accumulators.recompute import Recompute
from gradhooks.accumulators.stream_chunks import StreamChunks
from gradhooks.engine.accumulation import Accumulation, Chunk, Coefficients
from gradhooks.engine.gradient_sums import Gradients, add_into, all_finite, weighted_sum
from gradhooks.errors import CombinationError
from gradhooks.numerics import at_least_float32, on_host


class Stream(Accumulator):
    """One backward per pose, in the forward of the batch; R copies of the gradients per group for any number of poses.

    Needs a combination that declares `stream_weights`, and predictions of one number. Other batches are recomputed.
    A chunk of several poses needs one backward for each of its groups, times R where several poses of a group count.
    Where the poses of each group follow one another, chunks end where groups do, unless `chunk_size` is set.

    On the CPU a pose whose log-weight is negligible beside those before it gets no backward. On a device the host would
    have to wait to know; there all poses get one, and batches with `nonfinite="drop"` are recomputed.
    """

    name = "stream"

    def begin(self, engine: Engine, predictions: Tensor) -> Accumulation:
        refuse_gradient_combination(engine, self.name)
        refuse_nonlinear_backward(engine, self.name)
        declared = declared_weights(engine, predictions)
        reason = why_not_streamed(engine, predictions, declared)
        if declared is None or reason:
            return Recompute().begin_because(engine, reason)
        set_accumulator(engine, self.name, "it was requested by name")
        return StreamAccumulation(engine, declared, predictions)


def why_not_streamed(engine: Engine, predictions: Tensor, declared: DeclaredWeights | None) -> str:
    """Return why a batch cannot be streamed; empty if it can."""
    if predictions.numel() != len(predictions):
        return "'stream' needs one number per prediction, and a prediction has several"
    if declared is None:
        return "'stream' needs log-weights, and the combination declares no stream_weights"
    if engine.options.nonfinite == "drop" and predictions.device.type != "cpu":
        return "which predictions are finite is known after the forward, since 'stream' does not wait for the device"
    return ""


def chunks_of(engine: Engine) -> StreamChunks:
    """Return where the chunks of a batch end if it is streamed."""
    return StreamChunks(engine.groups, engine.pose_count, fixed=engine.options.chunk_size is not None)


class StreamAccumulation(Accumulation):
    """`R = 1 + K` running sums of gradients per group, with the factors of an online softmax.

    Sum `k` of group `g` has the number `g R + k`. Once the coefficients are known, numbers `a` are fitted for each
    group: `c_i = sum_k a[g, k] factors[i, k]`. What the fit leaves of a coefficient, and what the loss adds to it
    directly, is computed by running the pose again, all groups together.

    Args:
        engine: The batch.
        declared: What the combination declares for the first chunk.
        predictions: The predictions of the first chunk.
    """

    keeps_graph = True

    def __init__(self, engine: Engine, declared: DeclaredWeights, predictions: Tensor) -> None:
        self._engine = engine
        self._chunks = chunks_of(engine)
        self._first: DeclaredWeights | None = declared
        self._feature_count = declared.feature_count
        self._threshold = engine.skip_threshold(predictions.dtype)
        self._fp16_scale = engine.fp16_scale(predictions)
        self._folding: HostFolding | DeviceFolding
        if declared.is_on_host or declared.uniform:
            uniform = declared.uniform and engine.options.nonfinite != "drop"
            self._folding = HostFolding(engine, declared.feature_count, self._threshold, uniform=uniform)
        else:
            self._folding = DeviceFolding(engine, declared.feature_count, predictions.device)

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        of_rows = list(self._chunks.groups[chunk.start : chunk.stop])
        self._folding.add(predictions, of_rows, self._declaration(chunk, predictions), self._fp16_scale)

    def longest_chunk(self, start: int) -> int | None:
        return self._chunks.longest(start)

    def _declaration(self, chunk: Chunk, predictions: Tensor) -> DeclaredWeights:
        first, self._first = self._first, None
        if self._folding.uniform:
            return DeclaredWeights(len(predictions))
        declared = declared_weights(self._engine, predictions, chunk.start) if first is None else first
        features = None if declared is None else declared.feature_count
        if declared is None or features != self._feature_count:
            raise CombinationError(
                f"combination {self._engine.combination.name}: stream_weights declared {self._feature_count} features "
                f"for pose 0 and {'nothing' if features is None else features} for pose {chunk.start}. Declare the "
                "same number of features for every pose, or return None for all"
            )
        return declared

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        sums = self._folding.take()
        self._present = [[total is not None for total in totals] for totals in sums]
        return [predictions, *(total for totals in sums for total in totals if total is not None)]

    def gradients(self, saved: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        predictions, *present = saved
        pending = iter(present)
        sums = [[next(pending) if there else None for there in row] for row in self._present]
        parts = (coefficients.through_combination, coefficients.direct)
        through, *rest = on_host(*(part.flatten() for part in parts if part is not None), *self._folding.state())
        direct = rest.pop(0) if coefficients.direct is not None else None
        self._folding.read(rest)
        if self._fp16_scale == 1 or all_finite(sums):
            scales, unexplained = self._fit(through, predictions.dtype)
        else:
            # Scaled up, a float16 gradient overflowed: run the poses again with their coefficients, without a scale.
            sums, scales, unexplained = [[None] * len(sums[0])], [0.0], through
        if direct is not None:
            unexplained = unexplained + direct
        selected = unexplained != 0
        engine = self._engine
        engine.report.skipped = int((~torch.tensor(self._folding.had_backward, dtype=torch.bool) & ~selected).sum())
        logger.debug("{} of {} poses skipped: negligible log-weights", engine.report.skipped, engine.pose_count)
        # Before the sums are overwritten, so that a second run that fails leaves them unchanged.
        cotangents = unexplained.to(predictions.device, predictions.dtype, non_blocking=True).view_as(predictions)
        totals = engine.rerun(predictions, cotangents, selected)
        add_into(totals, weighted_sum(sums, [scale / self._fp16_scale for scale in scales], overwrite=last))
        for index in self._folding.reached_by_skipped:
            if totals[index] is None:
                totals[index] = torch.zeros_like(engine.leaves[index])
        return totals

    def _fit(self, coefficients: Tensor, dtype: torch.dtype) -> tuple[list[float], Tensor]:
        """Return the numbers `a`, and what they leave of each coefficient: exactly 0 where that is rounding."""
        engine = self._engine
        count = len(coefficients)
        groups = torch.tensor(self._chunks.groups)
        fit = fit_groups(self._folding.factors(), coefficients, groups, engine.group_count)
        summed = fit.fitted & ~torch.tensor(self._folding.postponed, dtype=torch.bool)
        left = torch.where(summed & (fit.left.abs() <= self._rounding(fit.terms, dtype)), 0.0, fit.left)
        warn_unexplained(engine.combination, int(((left != 0) & summed).sum()), count)
        return fit.numbers.flatten().tolist(), left

    def _rounding(self, terms: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what rounding may leave of each coefficient: last bits of its terms, and of its factor's exponent."""
        exponent = 4 * torch.finfo(torch.float64).eps * (64 + self._folding.largest_exponent)
        last_bits = 8 * torch.finfo(at_least_float32(dtype)).eps
        largest = torch.where(terms.isfinite(), terms, 0.0).max()  # of the whole batch, as for skipping
        return last_bits * terms + max(self._threshold, exponent) * largest
