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
from gradhooks.accumulators.online_softmax import Declaration, OnlineSoftmax, declaration_of
from gradhooks.accumulators.recompute import Recompute
from gradhooks.engine.accumulation import Accumulation, Chunk, Coefficients
from gradhooks.engine.gradient_sums import Gradients, add_into, all_finite, weighted_sum
from gradhooks.engine.parameter_hooks import RunningSums
from gradhooks.errors import CombinationError
from gradhooks.numerics import at_least_float32


class Stream(Accumulator):
    """One backward per pose, in the forward of the batch; R copies of the gradients per group for any number of poses.

    Needs a combination that declares `stream_weights`, and predictions of one number. Other batches are recomputed.
    A chunk of several poses needs one backward for each of its groups, times R where several poses of a group count.
    """

    name = "stream"

    def begin(self, engine: Engine, predictions: Tensor) -> Accumulation:
        refuse_gradient_combination(engine, self.name)
        refuse_nonlinear_backward(engine, self.name)
        declaration = declaration_of(engine, predictions)
        if declaration is not None:
            set_accumulator(engine, self.name, "it was requested by name")
            return StreamAccumulation(engine, declaration, predictions)
        return Recompute().begin_because(engine, why_not_streamed(predictions))


def why_not_streamed(predictions: Tensor) -> str:
    """Return why a batch without a declaration is recomputed."""
    if predictions.numel() != len(predictions):
        return "'stream' needs one number per prediction, and a prediction has several"
    return "'stream' needs log-weights, and the combination declares no stream_weights"


class StreamAccumulation(Accumulation):
    """`R = 1 + K` running sums of gradients per group, with the factors of `OnlineSoftmax`.

    Sum `k` of group `g` has the number `g R + k`. Once the coefficients are known, numbers `a` are fitted for each
    group: `c_i = sum_k a[g, k] factors[i, k]`. What the fit leaves of a coefficient, and what the loss adds to it
    directly, is computed by running the pose again, all groups together.

    Args:
        engine: The batch.
        declaration: What the combination declares for the first chunk.
        predictions: The predictions of the first chunk.
    """

    keeps_graph = True

    def __init__(self, engine: Engine, declaration: Declaration, predictions: Tensor) -> None:
        self._engine = engine
        self._first: Declaration | None = declaration
        self._feature_count = len(declaration.features[0])
        self._sum_count = 1 + self._feature_count
        self._drop = engine.options.nonfinite == "drop"
        self._uniform = declaration.uniform and not self._drop
        self._threshold = engine.skip_threshold(predictions.dtype)
        self._softmax = OnlineSoftmax(self._feature_count, self._threshold, engine.group_count)
        self._sums = RunningSums(engine, self._sum_count * engine.group_count)
        self._had_backward = bytearray()
        self._postponed = bytearray()
        self._fp16_scale = engine.fp16_scale(predictions)
        self._reached_by_skipped: set[int] = set()

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        count = len(predictions)
        groups = [0] * count if self._engine.groups is None else self._engine.groups[chunk.start : chunk.stop]
        dropped = predictions.isfinite().flatten().logical_not().tolist() if self._drop else [False] * count
        # The backward of a shared graph would spread the NaN of a dropped pose: its other poses run again later.
        postponed = count > 1 and any(dropped)
        self._postponed.extend([postponed] * count)
        factors = self._factors(chunk, predictions, groups, [True] * count if postponed else dropped)
        counted = [predictions.requires_grad and any(row) for row in factors]  # a constant has no backward
        self._had_backward.extend(counted)
        if any(counted):
            self._fold(predictions, groups, factors, counted)
        elif predictions.requires_grad and not postponed:
            self._skip(predictions, finite=not any(dropped))

    def _factors(self, chunk: Chunk, predictions: Tensor, groups: list[int], excluded: list[bool]) -> list[list[float]]:
        """Return the factors of a chunk, `1 + K` per pose, after rescaling the sums of the earlier poses."""
        if self._uniform:
            return [[1.0]] * len(predictions)
        declaration = self._declaration(chunk, predictions)
        rescalings, factors = self._softmax.update(
            declaration.masked(excluded) if any(excluded) else declaration, groups
        )
        for group, factor, shifts in rescalings:
            self._sums.rescale(group * self._sum_count, factor, shifts)
        return factors

    def _declaration(self, chunk: Chunk, predictions: Tensor) -> Declaration:
        first, self._first = self._first, None
        declaration = declaration_of(self._engine, predictions, chunk.start) if first is None else first
        features = None if declaration is None else len(declaration.features[0])
        if declaration is None or features != self._feature_count:
            raise CombinationError(
                f"combination {self._engine.combination.name}: stream_weights declared {self._feature_count} features "
                f"for pose 0 and {'nothing' if features is None else features} for pose {chunk.start}. Declare the "
                "same number of features for every pose, or return None for all"
            )
        return declaration

    def _fold(self, predictions: Tensor, groups: list[int], factors: list[list[float]], counted: list[bool]) -> None:
        """Add the gradients of a chunk to the sums of its groups."""
        rows: dict[int, list[int]] = {}
        for row in (row for row, counts in enumerate(counted) if counts):
            rows.setdefault(groups[row], []).append(row)
        jobs: list[tuple[int, list[int], int | None]] = []
        for group, members in rows.items():
            if len(members) == 1 and self._sum_count > 1:  # one backward serves all sums
                jobs.append((group * self._sum_count, members, None))
            else:
                jobs.extend((group * self._sum_count, members, k) for k in range(self._sum_count))
        for number, (first, members, k) in enumerate(jobs):
            retain_graph, poses = number < len(jobs) - 1, 0 if number else sum(counted)
            cotangents = self._cotangents(predictions, factors, members, k or 0)
            if k is None:
                # The cotangent carries the first factor, the folding multiplies by the others.
                ratios = [factor / factors[members[0]][0] for factor in factors[members[0]]]
                with self._sums.fold_into(first, ratios):
                    self._engine.backward(predictions, cotangents, retain_graph=retain_graph, poses=poses)
            else:
                self._sums.add_to(first + k)
                self._engine.backward(predictions, cotangents, retain_graph=retain_graph, poses=poses)

    def _cotangents(self, predictions: Tensor, factors: list[list[float]], members: list[int], k: int) -> Tensor:
        """Return the factors `k` of some rows of a chunk, 0 for the others."""
        if len(factors) == 1:
            return torch.full_like(predictions, factors[0][k] * self._fp16_scale)
        column = [0.0] * len(factors)
        for row in members:
            column[row] = factors[row][k] * self._fp16_scale
        return torch.tensor(column, dtype=torch.float64).view(predictions.shape)

    def _skip(self, predictions: Tensor, *, finite: bool) -> None:
        """Give the leaves that only skipped poses reach a gradient of zeros, and sparse gradients their rows."""
        missing = self._sums.unreached() - self._reached_by_skipped
        reached = missing and missing & self._engine.reached_leaves(predictions)
        if (reached or self._sums.has_sparse) and finite:  # a backward, since it alone shows which gradients are sparse
            self._sums.add_to(0)
            self._engine.backward(predictions, torch.zeros_like(predictions), poses=0)
        elif reached:
            self._reached_by_skipped |= reached

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        sums = self._sums.take()
        self._present = [[total is not None for total in totals] for totals in sums]
        return [predictions, *(total for totals in sums for total in totals if total is not None)]

    def gradients(self, saved: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        predictions, *present = saved
        pending = iter(present)
        sums = [[next(pending) if there else None for there in row] for row in self._present]
        through_combination = _on_host(coefficients.through_combination)
        if self._fp16_scale == 1 or all_finite(sums):
            scales, unexplained = self._fit(through_combination, predictions.dtype)
        else:
            # Scaled up, a float16 gradient overflowed: run the poses again with their coefficients, without a scale.
            sums, scales, unexplained = [[None] * len(sums[0])], [0.0], through_combination
        if coefficients.direct is not None:
            unexplained = unexplained + _on_host(coefficients.direct)
        selected = unexplained != 0
        engine = self._engine
        engine.report.skipped = int((~torch.tensor(self._had_backward, dtype=torch.bool) & ~selected).sum())
        logger.debug("{} of {} poses skipped: negligible log-weights", engine.report.skipped, engine.pose_count)
        # Before the sums are overwritten, so that a second run that fails leaves them unchanged.
        cotangents = unexplained.to(predictions).view_as(predictions)
        totals = engine.rerun(predictions, cotangents, selected)
        add_into(totals, weighted_sum(sums, [scale / self._fp16_scale for scale in scales], overwrite=last))
        for index in self._reached_by_skipped:
            if totals[index] is None:
                totals[index] = torch.zeros_like(engine.leaves[index])
        return totals

    def _fit(self, coefficients: Tensor, dtype: torch.dtype) -> tuple[list[float], Tensor]:
        """Return the numbers `a`, and what they leave of each coefficient: exactly 0 where that is rounding."""
        engine = self._engine
        count = len(coefficients)
        factors = torch.ones(count, 1, dtype=torch.float64) if self._uniform else self._softmax.factors()
        groups = torch.zeros(count, dtype=torch.int64) if engine.groups is None else torch.tensor(engine.groups)
        fit = fit_groups(factors, coefficients, groups, engine.group_count)
        summed = fit.fitted & ~torch.tensor(self._postponed, dtype=torch.bool)
        left = torch.where(summed & (fit.left.abs() <= self._rounding(fit.terms, dtype)), 0.0, fit.left)
        warn_unexplained(engine.combination, int(((left != 0) & summed).sum()), count)
        return fit.numbers.flatten().tolist(), left

    def _rounding(self, terms: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what rounding may leave of each coefficient: last bits of its terms, and of its factor's exponent."""
        exponent = 4 * torch.finfo(torch.float64).eps * (64 + self._softmax.largest_exponent)
        last_bits = 8 * torch.finfo(at_least_float32(dtype)).eps
        largest = torch.where(terms.isfinite(), terms, 0.0).max()  # of the whole batch, as for skipping
        return last_bits * terms + max(self._threshold, exponent) * largest


def _on_host(coefficients: Tensor) -> Tensor:
    return coefficients.detach().flatten().to("cpu", torch.float64)
