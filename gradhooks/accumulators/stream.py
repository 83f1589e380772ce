"""Fold each pose's gradient at once into R running sums, from a weight that the combination declares."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from gradhooks.accumulators.base import Accumulation, Accumulator, Coefficients, refuse_gradient_combination
from gradhooks.accumulators.declaration import Declaration, declared, without
from gradhooks.accumulators.online_softmax import OnlineSoftmax
from gradhooks.accumulators.recompute import Recompute
from gradhooks.engine.context import Chunk, Group
from gradhooks.engine.gradient_sums import Gradients, RunningSums, add_into, all_finite, weighted
from gradhooks.engine.rerun import replayed_gradients
from gradhooks.errors import CombinationError, GradhooksWarning
from gradhooks.numerics import wide


class Stream(Accumulator):
    """One backward for each pose, in the forward of the group; R copies of the gradients, whatever N is.

    Needs a combination that declares `stream_weights`, and one number as prediction; other groups are recomputed.
    """

    name = "stream"

    def open(self, group: Group, predictions: Tensor) -> Accumulation:
        refuse_gradient_combination(group, self.name)
        declaration = declared(group, predictions)
        if declaration is None:
            reason = "the combination declares no stream_weights, or a prediction is more than one number"
            return Recompute().take_over(group, predictions, reason)
        return StreamAccumulation(
            group, declaration, group.skip_threshold(predictions.dtype), group.fp16_scale(predictions)
        )


class StreamAccumulation(Accumulation):
    """Running sums of gradients, `R = 1 + K`, with the weights of `OnlineSoftmax`.

    Once the coefficients are known, numbers `a` are fitted to them, `c_i = sum_k a_k weights[i, k]`. What that leaves
    of a coefficient, and what the loss reads beside the combination, is had by running the pose again.
    """

    keeps_graph = True

    def __init__(self, group: Group, first: Declaration, skip_threshold: float, guard: float) -> None:
        self._group = group
        self._features = features = len(first.features[0])
        self._uniform = first.uniform
        self._online = OnlineSoftmax(features, skip_threshold)
        self._negligible = skip_threshold
        self._sums = RunningSums(group.shadows, count=1 + features)
        self._chunks: list[Chunk] = []
        self._had_backward: list[bool] = []
        self._guard = guard
        self._passed_over: set[int] = set()  # places of leaves that only poses reach which do not count

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        self._chunks.append(chunk)
        weights = self._weights(chunk, predictions)
        counted = [predictions.requires_grad and any(row) for row in weights]  # a constant has no backward
        self._had_backward.extend(counted)
        self._group.report.backwards += sum(counted)
        if any(counted):
            self._fold(predictions, weights)
        elif predictions.requires_grad:
            self._pass_over(predictions)

    def _weights(self, chunk: Chunk, predictions: Tensor) -> list[list[float]]:
        """The weights of a chunk, `1 + K` for each pose, after the sums of the earlier poses were brought to scale."""
        count = len(predictions)
        if self._uniform and self._group.nonfinite != "drop":
            self._online.advance_alike(count)
            return [[1.0]] * count
        rescaling = self._online.advance(self._declared(chunk, predictions))
        if rescaling is not None and rescaling.factor == 0:
            self._passed_over |= {place for place, total in enumerate(self._sums.sum(0)) if total is not None}
            self._sums.clear()
        elif rescaling is not None:
            self._sums.rescale(*rescaling)
        return self._online.latest(count)

    def _declared(self, chunk: Chunk, predictions: Tensor) -> Declaration:
        declaration = declared(self._group, predictions, chunk.start)
        found = None if declaration is None else len(declaration.features[0])
        if declaration is None or found != self._features:
            raise CombinationError(
                f"combination {self._group.combination.name}: stream_weights declared the first pose of a group with "
                f"{self._features} features, and pose {chunk.start} "
                f"{'not at all' if found is None else f'with {found}'}; it must declare all or none, and alike"
            )
        if self._group.nonfinite == "drop":
            return without(declaration, predictions.isfinite().flatten().logical_not().tolist())
        return declaration

    def _fold(self, predictions: Tensor, weights: list[list[float]]) -> None:
        if len(weights) == 1:
            # One backward serves all sums: it carries the weight, and the features are numbers.
            (row,) = weights
            if len(row) > 1:
                self._sums.expect([weight / row[0] for weight in row])
            self._group.backward(predictions, torch.full_like(predictions, row[0] * self._guard))
            return
        columns = list(zip(*weights, strict=True))
        for k, column in enumerate(columns):
            self._sums.expect([float(k == other) for other in range(len(columns))])
            cotangents = self._guard * torch.tensor(column, dtype=torch.float64).view(predictions.shape)
            self._group.backward(predictions, cotangents, retain_graph=k < len(columns) - 1)

    def _pass_over(self, predictions: Tensor) -> None:
        leaves = self._group.shadows.leaves
        missing = {id(leaves[place]): place for place, total in enumerate(self._sums.sum(0)) if total is None}
        if set(missing.values()) - self._passed_over:
            reached = self._group.reached(predictions, inside_checkpoints=True)
            self._passed_over |= {missing[id(leaf)] for leaf in reached if id(leaf) in missing}

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        sums = self._sums.take()
        self._present = [[total is not None for total in totals] for totals in sums]
        return [predictions, *(total for totals in sums for total in totals if total is not None)]

    def gradients(self, kept: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        predictions, *present = kept
        pending = iter(present)
        sums = [[next(pending) if there else None for there in places] for places in self._present]
        through = _on_host(coefficients.through_combination)
        if self._guard == 1 or all_finite(sums):
            scales, unexplained = self._fit(through, predictions.dtype)
        else:
            # Scaled up, a gradient of float16 left its range: have it again, with the true coefficients alone.
            sums, scales, unexplained = [[None] * len(sums[0])], [0.0], through
        if coefficients.direct is not None:
            unexplained = unexplained + _on_host(coefficients.direct)
        again = unexplained != 0
        self._group.report.skipped = int((~torch.tensor(self._had_backward) & ~again).sum())
        # Before the sums are overwritten, so that a replay that fails leaves them as they were.
        cotangents = unexplained.to(predictions).view_as(predictions)
        totals = replayed_gradients(self._group, self._chunks, predictions, cotangents, again)
        add_into(totals, weighted(sums, [scale / self._guard for scale in scales], overwrite=last))
        for place in self._passed_over:
            if totals[place] is None:
                totals[place] = torch.zeros_like(self._group.shadows.leaves[place])
        return totals

    def _fit(self, coefficients: Tensor, dtype: torch.dtype) -> tuple[list[float], Tensor]:
        """The numbers `a`, and what they leave of each coefficient, exactly 0 where that is rounding."""
        weights = self._online.all()
        if not coefficients.isfinite().all():
            return [0.0] * weights.shape[1], coefficients  # explained by nothing: every pose is run again
        # Columns of one size: else the solver takes features that are all small (probabilities) for rounding errors.
        sizes = weights.abs().amax(0).clamp_min(torch.finfo(torch.float64).tiny)
        scaled = torch.linalg.lstsq(weights / sizes, coefficients.unsqueeze(1), driver="gelsd").solution.squeeze(1)
        fitted = scaled / sizes
        terms = coefficients.abs() + weights.abs() @ fitted.abs()
        left = coefficients - weights @ fitted
        left = torch.where(left.abs() > self._rounding(terms, dtype), left, 0.0)
        unexplained = int((left != 0).sum())
        if unexplained:
            warnings.warn(
                f"combination {self._group.combination.name}: its stream_weights do not explain the coefficients of "
                f"{unexplained} of {len(left)} poses, which were recomputed; the gradient is right, and slower to have",
                GradhooksWarning,
                stacklevel=2,
            )
        return fitted.tolist(), left

    def _rounding(self, terms: Tensor, dtype: torch.dtype) -> Tensor:
        """What rounding may leave of each coefficient: last bits of its terms, and of the exponent of its weight."""
        exponent = 4 * torch.finfo(torch.float64).eps * (64 + self._online.largest_exponent)
        last_bits = 8 * torch.finfo(wide(dtype)).eps
        return last_bits * terms + max(self._negligible, exponent) * terms.max()


def _on_host(coefficients: Tensor) -> Tensor:
    return coefficients.detach().flatten().to("cpu", torch.float64)
