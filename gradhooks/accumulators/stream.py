"""Fold each pose's gradient at once into R running sums, from a weight that the combination declares."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from gradhooks.accumulators.base import Accumulator, Coefficients, Ledger
from gradhooks.accumulators.declaration import Declaration, declared
from gradhooks.accumulators.recompute import Recompute, replayed_gradients
from gradhooks.accumulators.sums import Gradients, RunningSums, add_into, scale_
from gradhooks.errors import GradhooksWarning
from gradhooks.group import Chunk, Group
from gradhooks.shadow import reached_leaves


class Stream(Accumulator):
    """One backward for each pose, in the forward of the group; R copies of the gradients, whatever N is.

    Needs a combination that declares `stream_weights`, and one number as prediction; other groups are recomputed.
    """

    name = "stream"

    def open(self, group: Group, predictions: Tensor) -> Ledger:
        declaration = declared(group, predictions)
        if declaration is None:
            group.report.reason = f"not streamable: {group.combination_name} or predictions of more than one number"
            group.report.accumulator = Recompute.name
            return Recompute().open(group, predictions)
        return StreamLedger(group, features=declaration.features.shape[1])


class StreamLedger(Ledger):
    """Online softmax over gradients.

    With `l_i` the log-weight and `phi_i` the features of pose `i`, sum 0 holds `sum_i e_i g_i` and sum `k` holds
    `sum_i e_i (phi_ik - ref_k) g_i`, where `g_i = dy_i/dtheta`, `e_i = exp(l_i - top)`, `top` is the largest log-weight
    so far and `ref` the features of its pose. A new largest rescales by `exp(old top - new top)` and shifts by
    `(old ref - new ref)` times sum 0. Uncentred features would cancel: energies are large against the temperature.
    """

    keeps_graph = True

    def __init__(self, group: Group, features: int) -> None:
        self._group = group
        self._sums = RunningSums(group.shadows, count=1 + features)
        self._top = -math.inf
        self._reference = torch.zeros(features, dtype=torch.float64)
        self._chunks: list[Chunk] = []
        self._declarations: list[Declaration] = []
        self._folded: list[Tensor] = []
        self._passed_over: set[int] = (
            set()
        )  # leaves that some pose reached whose gradient was not, or no longer, wanted

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        group = self._group
        declaration = declared(group, predictions)
        assert declaration is not None  # the same combination declared the first chunk
        self._chunks.append(chunk)
        self._declarations.append(declaration)
        if not predictions.requires_grad:
            self._folded.append(torch.ones(len(predictions), dtype=torch.bool))  # a constant's gradient is nothing
            return
        self._raise_top(declaration, group.negligible(predictions.dtype))
        weights = declaration.weights(self._top, self._reference)
        wanted = weights.abs().amax(1) > group.negligible(predictions.dtype)
        self._folded.append(wanted)
        if wanted.any():
            self._fold(predictions, weights * wanted.unsqueeze(1))
            group.report.backwards += int(wanted.sum())
        else:
            self._pass_over(predictions)

    def _raise_top(self, declaration: Declaration, negligible: float) -> None:
        top, reference = declaration.top()
        if top <= self._top:
            return
        factor = math.exp(self._top - top)
        poses_before = sum(int(folded.sum()) for folded in self._folded)
        if factor * poses_before < negligible:
            # Not only cheaper: numbers this small would be denormal, and slow every later addition down.
            self._passed_over |= {place for place, total in enumerate(self._sums.sum(0)) if total is not None}
            self._sums.clear()
            self._folded = [torch.zeros_like(folded) for folded in self._folded]
        elif poses_before:
            self._sums.rescale(factor, (self._reference - reference).tolist())
        self._top, self._reference = top, reference

    def _fold(self, predictions: Tensor, weights: Tensor) -> None:
        flat = predictions.flatten()
        if len(flat) == 1:
            # One backward serves all sums: the gradient times e is there, the features are numbers.
            features = (weights[0] / weights[0, 0]).tolist()
            self._sums.expect(features)
            self._group.backward(flat, weights[:, 0])
            return
        count = weights.shape[1]
        for k in range(count):
            self._sums.expect([float(k == other) for other in range(count)])
            self._group.backward(flat, weights[:, k], retain_graph=k < count - 1)

    def _pass_over(self, predictions: Tensor) -> None:
        missing = {
            id(leaf): place
            for place, (leaf, total) in enumerate(zip(self._group.shadows.leaves, self._sums.sum(0), strict=True))
            if total is None and place not in self._passed_over
        }
        if missing:
            reached = reached_leaves(predictions)
            self._passed_over |= {missing[id(leaf)] for leaf in reached if id(leaf) in missing}

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        sums = self._sums.take()
        self._present = [[total is not None for total in totals] for totals in sums]
        return [predictions, *(total for totals in sums for total in totals if total is not None)]

    def gradients(self, kept: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        predictions, *present = kept
        pending = iter(present)
        sums = [[next(pending) if there else None for there in places] for places in self._present]
        del present
        scales, unexplained = self._fit(coefficients, predictions.dtype)
        totals = _weighted(sums, scales, overwrite=last)
        extra = unexplained if coefficients.direct is None else unexplained + self._flat(coefficients.direct)
        again = extra != 0
        self._group.report.skipped = int((~torch.cat(self._folded) & ~again).sum())
        if again.any():
            cotangents = extra.to(predictions).view_as(predictions)
            add_into(totals, replayed_gradients(self._group, self._chunks, predictions, cotangents, again))
        for place in self._passed_over:
            if totals[place] is None:
                totals[place] = torch.zeros_like(self._group.shadows.leaves[place])
        return totals

    @staticmethod
    def _flat(coefficients: Tensor) -> Tensor:
        return coefficients.detach().flatten().to("cpu", torch.float64)

    def _fit(self, coefficients: Coefficients, dtype: torch.dtype) -> tuple[list[float], Tensor]:
        """Numbers `a` with `c_i = sum_k a_k weights[i, k]`, and what they leave of each `c_i`."""
        wanted = self._flat(coefficients.through_combination)
        weights = torch.cat([declaration.weights(self._top, self._reference) for declaration in self._declarations])
        weights = torch.where(torch.cat(self._folded).unsqueeze(1), weights, 0.0)
        if not wanted.isfinite().all():
            return [0.0] * weights.shape[1], wanted  # explained by nothing: every pose is recomputed
        fitted = torch.linalg.lstsq(weights, wanted.unsqueeze(1), driver="gelsd").solution
        left = wanted - (weights @ fitted).squeeze(1)
        terms = wanted.abs() + weights.abs() @ fitted.abs().squeeze(1)
        left = torch.where(left.abs() > self._noise(terms, dtype), left, 0.0)
        unexplained = int((left != 0).sum())
        if unexplained:
            warnings.warn(
                f"combination {self._group.combination_name}: its stream_weights do not explain the coefficients of "
                f"{unexplained} of {len(left)} poses, which were recomputed; the gradient is right, and slower to have",
                GradhooksWarning,
                stacklevel=2,
            )
        return fitted.squeeze(1).tolist(), left

    def _noise(self, terms: Tensor, dtype: torch.dtype) -> Tensor:
        """What rounding may leave of each coefficient: the last bits of its terms, and those of its weight's exponent."""
        exponent = max(float(declaration.log_weights.abs().max()) for declaration in self._declarations)
        double = torch.finfo(torch.float64).eps
        floor = max(self._group.negligible(dtype), 4 * double * (64 + (exponent if math.isfinite(exponent) else 0)))
        last_bits = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        return last_bits * terms + floor * terms.max()


def _weighted(sums: list[Gradients], scales: Sequence[float], *, overwrite: bool) -> Gradients:
    """`sum_k scales[k] * sums[k]`, without a copy of the first where it may be overwritten."""
    totals = sums[0] if overwrite else [None if total is None else total.clone() for total in sums[0]]
    scale_(totals, scales[0])
    for other, scale in zip(sums[1:], scales[1:], strict=True):
        add_into(totals, other, scale)
    return totals
