"""Online softmax: the factor of each pose relative to the largest log-weight so far. Numbers only, no gradients."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gradhooks.accumulators.base import Engine
from gradhooks.errors import CombinationError


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


def declaration_of(engine: Engine, predictions: Tensor, start: int = 0) -> Declaration | None:
    """Return what the combination declares for the poses from `start` on, None without a declaration.

    Args:
        engine: The group.
        predictions: Shape `(n, *prediction)`.
        start: The index of their first pose.

    Raises:
        CombinationError: The declaration does not have the shapes of its contract.
    """
    count = len(predictions)
    if predictions.numel() != count:
        return None
    declared = engine.declare(predictions.detach().flatten(), start)
    if declared is None:
        return None
    log_weights, features = declared
    if log_weights is None and features is None:
        return Declaration([0.0] * count, [[]] * count, uniform=True)
    log_weights = torch.zeros(count) if log_weights is None else log_weights
    features = torch.zeros(count, 0) if features is None else features
    features = features.unsqueeze(1) if features.dim() == 1 else features
    if log_weights.shape != (count,) or features.shape != (count, features[:1].numel()):
        raise CombinationError(
            f"combination {engine.combination.name}: stream_weights of {count} predictions must give log_weights of "
            f"shape ({count},) and features of shape ({count},) or ({count}, K), got {tuple(log_weights.shape)} and "
            f"{tuple(features.shape)}"
        )
    if features.numel() == 0:
        return Declaration(log_weights.tolist(), [[]] * count)
    rows = torch.cat([log_weights.unsqueeze(1), features], 1).tolist()  # waits for the device once
    return Declaration([row[0] for row in rows], [row[1:] for row in rows])


class Rescaling(NamedTuple):
    """What a new largest log-weight does to running sums: see `RunningSums.rescale`."""

    factor: float
    shifts: list[float]


class OnlineSoftmax:
    """With log-weight `l_i` and features `phi_i` of pose `i`, its `1 + K` factors are `e_i (1, phi_i - reference)`.

    Here `e_i = exp(l_i - top)`, `top` is the largest log-weight so far, and `reference` the features of its pose.
    Without centring, energies that are large against the temperature would cancel.

    Source: the running maximum and rescaling of Milakov and Gimelshein, "Online normalizer calculation for softmax",
    arXiv:1805.02867, applied to gradients.

    Args:
        features: `K`.
        threshold: The factor below which a pose does not count.
    """

    def __init__(self, features: int, threshold: float) -> None:
        self._threshold = threshold
        self._top = -math.inf
        self._reference = [0.0] * features
        self._seen = Declaration([], [])
        self._counts: list[bool] = []
        self._counted = 0

    def update(self, declaration: Declaration) -> Rescaling | None:
        """Add the next poses.

        Returns:
            How to rescale the sums of the earlier poses, None if they stay. The factor 0 says that none of them counts
            any longer: together they would be lost in rounding, and such small numbers are denormal and slow.
        """
        rescaling = None
        top, reference = max(
            (
                entry
                for entry in zip(declaration.log_weights, declaration.features, strict=True)
                if math.isfinite(entry[0])
            ),
            default=(-math.inf, self._reference),
        )
        if top > self._top:
            factor = math.exp(self._top - top)
            shifts = [old - new for old, new in zip(self._reference, reference, strict=True)]
            self._top, self._reference = top, reference
            if factor * self._counted < self._threshold:
                factor = 0.0
                self._counts = [False] * len(self._counts)
            rescaling = Rescaling(factor, shifts) if self._counted else None
            self._counted = self._counted if factor else 0
        self._seen.log_weights.extend(declaration.log_weights)
        self._seen.features.extend(declaration.features)
        counts = [max(map(abs, row)) > self._threshold for row in self._factors(declaration)]
        self._counts.extend(counts)
        self._counted += sum(counts)
        return rescaling

    def update_uniform(self, count: int) -> None:
        """Add equally weighted poses without reading them."""
        self._top = 0.0
        self._seen.log_weights.extend([0.0] * count)
        self._seen.features.extend([[]] * count)
        self._counts.extend([True] * count)
        self._counted += count

    def last_factors(self, count: int) -> list[list[float]]:
        """Return the factors of the last `count` poses, 0 for those that do not count."""
        last = Declaration(self._seen.log_weights[-count:], self._seen.features[-count:])
        zero = [0.0] * (1 + len(self._reference))
        factors = zip(self._factors(last), self._counts[-count:], strict=True)
        return [row if counts else zero for row, counts in factors]

    def factors(self) -> Tensor:
        """Return the factors of all poses, shape `(N, 1 + K)`, float64, on the CPU."""
        return torch.tensor(self.last_factors(len(self._counts)), dtype=torch.float64)

    @property
    def largest_exponent(self) -> float:
        """The largest finite `|l_i|`, which bounds the rounding error of the exponents."""
        return max((abs(log_weight) for log_weight in self._seen.log_weights if math.isfinite(log_weight)), default=0.0)

    def _factors(self, declaration: Declaration) -> list[list[float]]:
        return [self._row(*entry) for entry in zip(declaration.log_weights, declaration.features, strict=True)]

    def _row(self, log_weight: float, features: list[float]) -> list[float]:
        factor = math.exp(log_weight - self._top) if log_weight <= self._top else math.nan
        row = [factor, *(factor * (own - other) for own, other in zip(features, self._reference, strict=True))]
        return row if all(map(math.isfinite, row)) else [0.0] * len(row)  # non-finite declarations get factor 0
