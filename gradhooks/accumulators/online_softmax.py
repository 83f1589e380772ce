"""Online softmax: the factor of each pose relative to the largest log-weight of its group so far. No gradients."""

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Declaration(NamedTuple):
    """`StreamWeights` as Python numbers: torch operators on single numbers would cost more than a small model.

    Attributes:
        log_weights: One per pose.
        features: `K` per pose.
        uniform: Whether all poses have the same log-weight, whatever they predict.
    """

    log_weights: list[float]
    features: list[list[float]]
    uniform: bool = False

    def masked(self, excluded: list[bool]) -> "Declaration":
        """Return the declaration with weight 0 for the excluded poses."""
        entries = zip(self.log_weights, self.features, excluded, strict=True)
        kept = [(-math.inf, [0.0] * len(row)) if out else (log_weight, row) for log_weight, row, out in entries]
        return Declaration([log_weight for log_weight, _ in kept], [row for _, row in kept])


class Rescaling(NamedTuple):
    """What a new largest log-weight does to the running sums of a group: see `RunningSums.rescale`."""

    group: int
    factor: float
    shifts: list[float]


def factor_rows(log_weights: Tensor, features: Tensor, tops: Tensor, references: Tensor) -> Tensor:
    """Return the factors of poses, shape `(n, 1 + K)`, 0 for those whose declaration is not finite.

    Args:
        log_weights: Shape `(n,)`.
        features: Shape `(n, K)`.
        tops: Shape `(n,)`: the largest log-weight of the group of each pose.
        references: Shape `(n, K)`: the features of the pose that has it.
    """
    weights = torch.where(log_weights <= tops, log_weights - tops, math.nan).exp().unsqueeze(1)
    rows = torch.cat([weights, weights * (features - references)], 1)
    return torch.where(rows.isfinite().all(1, keepdim=True), rows, 0.0)


def largest_size(numbers: Tensor) -> float:
    """Return the largest absolute value of finite numbers, shape `(n,)`, on the CPU; 0 without any."""
    sizes = numbers.abs()
    return float(torch.where(sizes.isfinite(), sizes, 0.0).max()) if len(sizes) else 0.0


class OnlineSoftmax:
    """With log-weight `l_i` and features `phi_i` of pose `i`, its `1 + K` factors are `e_i (1, phi_i - reference)`.

    Here `e_i = exp(l_i - top)`, `top` is the largest log-weight of its group so far, and `reference` the features of
    the pose that has it. Without centring, energies that are large against the temperature would cancel.

    Poses come one by one or in small chunks, where Python numbers are faster than kernels; `factors` uses kernels.

    Source: the running maximum and rescaling of Milakov and Gimelshein, "Online normalizer calculation for softmax",
    arXiv:1805.02867, applied to gradients.

    Args:
        features: `K`.
        threshold: The factor below which a pose does not count.
        group_count: `B`.
    """

    def __init__(self, features: int, threshold: float, group_count: int = 1) -> None:
        self._feature_count = features
        self._threshold = threshold
        self._tops = [-math.inf] * group_count
        self._references = [[0.0] * features for _ in range(group_count)]
        self._counted = [0] * group_count
        self._counts_from = [0] * group_count  # earlier poses of the group no longer count
        self._groups = array("q")
        self._log_weights = array("d")
        self._features = array("d")
        self._counts = bytearray()

    def update(self, declaration: Declaration, groups: Sequence[int]) -> tuple[list[Rescaling], list[list[float]]]:
        """Add the next poses, whose groups are `groups`.

        Returns:
            How to rescale the sums of the earlier poses of some groups, and the factors of the new poses, 0 for those
            that do not count. The rescaling factor 0 says that no earlier pose counts any longer: together they would
            be lost in rounding, and such small numbers are denormal and slow.
        """
        if len(groups) == 1:
            return self._update_pose(groups[0], declaration.log_weights[0], declaration.features[0])
        entries = list(zip(groups, declaration.log_weights, declaration.features, strict=True))
        highest: dict[int, tuple[float, list[float]]] = {}
        for group, log_weight, features in entries:
            top = highest[group][0] if group in highest else self._tops[group]
            if top < log_weight < math.inf and all(map(math.isfinite, features)):
                highest[group] = log_weight, features
        rescalings = [self._raise_top(group, *entry) for group, entry in highest.items()]
        rows = [self._add(*entry) for entry in entries]
        return [rescaling for rescaling in rescalings if rescaling is not None], rows

    def _update_pose(
        self, group: int, log_weight: float, features: list[float]
    ) -> tuple[list[Rescaling], list[list[float]]]:
        rescaling = None
        if self._tops[group] < log_weight < math.inf and all(map(math.isfinite, features)):
            rescaling = self._raise_top(group, log_weight, features)
        return [] if rescaling is None else [rescaling], [self._add(group, log_weight, features)]

    def _raise_top(self, group: int, top: float, reference: list[float]) -> Rescaling | None:
        factor = math.exp(self._tops[group] - top)
        shifts = [old - new for old, new in zip(self._references[group], reference, strict=True)]
        self._tops[group], self._references[group] = top, reference
        if not self._counted[group]:
            return None
        if factor * self._counted[group] < self._threshold:
            factor = 0.0
            self._counted[group], self._counts_from[group] = 0, len(self._counts)
        return Rescaling(group, factor, shifts)

    def _add(self, group: int, log_weight: float, features: list[float]) -> list[float]:
        row = self._row(group, log_weight, features)
        counts = max(map(abs, row)) > self._threshold
        self._groups.append(group)
        self._log_weights.append(log_weight)
        self._features.extend(features)
        self._counts.append(counts)
        self._counted[group] += counts
        return row if counts else [0.0] * len(row)

    def _row(self, group: int, log_weight: float, features: list[float]) -> list[float]:
        top, reference = self._tops[group], self._references[group]
        factor = math.exp(log_weight - top) if log_weight <= top else math.nan
        row = [factor, *(factor * (own - other) for own, other in zip(features, reference, strict=True))]
        return row if all(map(math.isfinite, row)) else [0.0] * len(row)  # non-finite declarations get factor 0

    def factors(self) -> Tensor:
        """Return the factors of all poses, shape `(N, 1 + K)`, float64, on the CPU."""
        groups = torch.tensor(self._groups)
        log_weights = torch.tensor(self._log_weights, dtype=torch.float64)
        features = torch.tensor(self._features, dtype=torch.float64).view(len(groups), self._feature_count)
        tops = torch.tensor(self._tops, dtype=torch.float64)[groups]
        references = torch.tensor(self._references, dtype=torch.float64)[groups]
        rows = factor_rows(log_weights, features, tops, references)
        counts = torch.tensor(self._counts, dtype=torch.bool) & (
            torch.arange(len(groups)) >= torch.tensor(self._counts_from)[groups]
        )
        return torch.where(counts.unsqueeze(1), rows, 0.0)

    @property
    def largest_exponent(self) -> float:
        """The largest finite `|l_i|`, which bounds the rounding error of the exponents."""
        return largest_size(torch.tensor(self._log_weights, dtype=torch.float64))
