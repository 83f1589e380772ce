"""Stream: fold each pose's gradient into running sums at once, with the log-weights that the combination declares."""

import warnings
from collections.abc import Sequence

import torch
from loguru import logger
from torch import Tensor

from gradhooks.accumulators.base import Accumulator, Engine, refuse_gradient_combination, set_accumulator
from gradhooks.accumulators.online_softmax import Declaration, OnlineSoftmax, declaration_of
from gradhooks.accumulators.recompute import Recompute
from gradhooks.engine.accumulation import Accumulation, Chunk, Coefficients
from gradhooks.engine.gradient_sums import Gradients, add_into, all_finite, weighted_sum
from gradhooks.engine.parameter_hooks import RunningSums
from gradhooks.errors import CombinationError, GradhooksWarning
from gradhooks.numerics import at_least_float32


class Stream(Accumulator):
    """One backward per pose, in the forward of the group; R copies of the gradients for any number of poses.

    Needs a combination that declares `stream_weights`, and predictions of one number. Other groups are recomputed.
    """

    name = "stream"
    
    def begin(self, engine: Engine, predictions: Tensor) -> Accumulation:
        refuse_gradient_combination(engine, self.name)
        declaration = declaration_of(engine, predictions)
        if declaration is not None:
            set_accumulator(engine, self.name, "it was requested by name")
            return StreamAccumulation(engine, declaration, predictions)
        return Recompute().begin_because(engine, predictions, why_not_streamed(predictions))


def why_not_streamed(predictions: Tensor) -> str:
    """Return why a group without a declaration is recomputed."""
    if predictions.numel() != len(predictions):
        return "'stream' needs one number per prediction, and a prediction has several"
    return "'stream' needs log-weights, and the combination declares no stream_weights"


class StreamAccumulation(Accumulation):
    """`R = 1 + K` running sums of gradients, with the factors of `OnlineSoftmax`.

    Once the coefficients are known, numbers `a` are fitted: `c_i = sum_k a_k factors[i, k]`. What the fit leaves of a
    coefficient, and what the loss adds to it directly, is computed by running the pose again.

    Args:
        engine: The group.
        declaration: What the combination declares for the first chunk.
        predictions: The predictions of the first chunk.
    """

    keeps_graph = True

    def __init__(self, engine: Engine, declaration: Declaration, predictions: Tensor) -> None:
        self._engine = engine
        self._first: Declaration | None = declaration
        self._feature_count = len(declaration.features[0])
        self._uniform = declaration.uniform
        self._threshold = engine.skip_threshold(predictions.dtype)
        self._softmax = OnlineSoftmax(self._feature_count, self._threshold)
        self._sums = RunningSums(engine, count=1 + self._feature_count)
        self._had_backward: list[bool] = []
        self._fp16_scale = engine.fp16_scale(predictions)
        self._reached_by_skipped: set[int] = set()

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        factors = self._factors(chunk, predictions)
        counted = [predictions.requires_grad and any(row) for row in factors]  # a constant has no backward
        self._had_backward.extend(counted)
        if any(counted):
            self._fold(predictions, factors, sum(counted))
        elif predictions.requires_grad:
            self._skip(predictions)

    def _factors(self, chunk: Chunk, predictions: Tensor) -> list[list[float]]:
        """Return the factors of a chunk, `1 + K` per pose, after rescaling the sums of the earlier poses."""
        count = len(predictions)
        if self._uniform and self._engine.options.nonfinite != "drop":
            self._softmax.update_uniform(count)
            return [[1.0]] * count
        rescaling = self._softmax.update(self._declaration(chunk, predictions))
        if rescaling is not None and rescaling.factor == 0:
            self._reached_by_skipped |= {index for index, total in enumerate(self._sums.sum(0)) if total is not None}
            self._sums.clear()
        elif rescaling is not None:
            self._sums.rescale(*rescaling)
        return self._softmax.last_factors(count)

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
        if self._engine.options.nonfinite == "drop":
            return declaration.masked(predictions.isfinite().flatten().logical_not().tolist())
        return declaration

    def _fold(self, predictions: Tensor, factors: list[list[float]], counted: int) -> None:
        if len(factors) == 1:
            # One backward serves all sums: the cotangent carries the first factor, the sums multiply by the others.
            (row,) = factors
            if len(row) > 1:
                self._sums.set_factors([factor / row[0] for factor in row])
            self._engine.backward(predictions, torch.full_like(predictions, row[0] * self._fp16_scale))
            return
        columns = list(zip(*factors, strict=True))
        for k, column in enumerate(columns):
            self._sums.set_factors([float(k == other) for other in range(len(columns))])
            cotangents = self._fp16_scale * torch.tensor(column, dtype=torch.float64).view(predictions.shape)
            self._engine.backward(
                predictions, cotangents, retain_graph=k < len(columns) - 1, poses=counted if k == 0 else 0
            )

    def _skip(self, predictions: Tensor) -> None:
        missing = {index for index, total in enumerate(self._sums.sum(0)) if total is None}
        if missing - self._reached_by_skipped:
            self._reached_by_skipped |= missing & self._engine.reached_leaves(predictions)

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
        engine.report.skipped = int((~torch.tensor(self._had_backward) & ~selected).sum())
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
        factors = self._softmax.factors()
        if not coefficients.isfinite().all():
            return [0.0] * factors.shape[1], coefficients  # nothing explains them: every pose runs again
        # Columns of equal size, since the solver takes a column of small numbers (probabilities) for rounding errors.
        sizes = factors.abs().amax(0).clamp_min(torch.finfo(torch.float64).tiny)
        scaled = torch.linalg.lstsq(factors / sizes, coefficients.unsqueeze(1), driver="gelsd").solution.squeeze(1)
        fitted = scaled / sizes
        terms = coefficients.abs() + factors.abs() @ fitted.abs()
        left = coefficients - factors @ fitted
        left = torch.where(left.abs() > self._rounding(terms, dtype), left, 0.0)
        unexplained = int((left != 0).sum())
        if unexplained:
            warnings.warn(
                f"combination {self._engine.combination.name}: its stream_weights do not explain the coefficients of "
                f"{unexplained} of {len(left)} poses, which were recomputed; the gradient is correct, and slower",
                GradhooksWarning,
                stacklevel=2,
            )
        return fitted.tolist(), left

    def _rounding(self, terms: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what rounding may leave of each coefficient: last bits of its terms, and of its factor's exponent."""
        exponent = 4 * torch.finfo(torch.float64).eps * (64 + self._softmax.largest_exponent)
        last_bits = 8 * torch.finfo(at_least_float32(dtype)).eps
        return last_bits * terms + max(self._threshold, exponent) * terms.max()


def _on_host(coefficients: Tensor) -> Tensor:
    return coefficients.detach().flatten().to("cpu", torch.float64)
