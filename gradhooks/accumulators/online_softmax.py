"""Online softmax: weights of poses relative to the largest so far. Numbers only, no gradient."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gradhooks.accumulators.declaration import Declaration


class Rescaling(NamedTuple):
    """What a new largest weight does to running sums: add `shifts[k]` times sum 0 to sum `k + 1`, then multiply."""

    factor: float
    shifts: list[float]


class OnlineSoftmax:
    """With `l_i` the log-weight and `phi_i` the features of pose `i`, its weights are `e_i (1, phi_i - ref)`.

    Here `e_i = exp(l_i - top)`, `top` is the largest `l` so far and `ref` the features of its pose. Uncentred features
    would cancel: energies are large against the temperature.

    Args:
        features: K.
        skip_threshold: Weight relative to the largest below which a pose does not count.
    """

    def __init__(self, features: int, skip_threshold: float) -> None:
        self._negligible = skip_threshold
        self._top = -math.inf
        self._reference = [0.0] * features
        self._seen = Declaration([], [])
        self._counted: list[bool] = []
        self._counting = 0

    def advance(self, declaration: Declaration) -> Rescaling | None:
        """Take note of the next poses.

        Returns:
            What must be done to the sums of the earlier poses, None for nothing. With the factor 0 none of those counts
            any longer: added up they would be lost in rounding, and numbers so small are denormal and slow.
        """
        rescaling = None
        top, reference = max(
            (claim for claim in zip(*declaration[:2], strict=True) if math.isfinite(claim[0])),
            default=(-math.inf, self._reference),
        )
        if top > self._top:
            factor = math.exp(self._top - top)
            shifts = [old - new for old, new in zip(self._reference, reference, strict=True)]
            self._top, self._reference = top, reference
            if factor * self._counting < self._negligible:
                factor = 0.0
                self._counted = [False] * len(self._counted)
            rescaling = Rescaling(factor, shifts) if self._counting else None
            self._counting = self._counting if factor else 0
        self._seen.log_weights.extend(declaration.log_weights)
        self._seen.features.extend(declaration.features)
        counted = [max(map(abs, row)) > self._negligible for row in self._rows(declaration)]
        self._counted.extend(counted)
        self._counting += sum(counted)
        return rescaling

    def advance_alike(self, count: int) -> None:
        """Take note of poses that weigh like all others, without a look at any."""
        self._top = 0.0
        self._seen.log_weights.extend([0.0] * count)
        self._seen.features.extend([[]] * count)
        self._counted.extend([True] * count)
        self._counting += count

    def latest(self, count: int) -> list[list[float]]:
        """The weights of the `count` poses that came last, zero for those that do not count."""
        latest = Declaration(self._seen.log_weights[-count:], self._seen.features[-count:])
        zero = [0.0] * (1 + len(self._reference))
        return [row if counts else zero for row, counts in zip(self._rows(latest), self._counted[-count:], strict=True)]

    def all(self) -> Tensor:
        """The weights of all poses, shape `(N, 1 + K)`, float64, on the CPU."""
        return torch.tensor(self.latest(len(self._counted)), dtype=torch.float64)

    @property
    def largest_exponent(self) -> float:
        """The largest `|l_i|`, whose last bits the weights cannot know."""
        return max((abs(claim) for claim in self._seen.log_weights if math.isfinite(claim)), default=0.0)

    def _rows(self, declaration: Declaration) -> list[list[float]]:
        return [self._row(*claim) for claim in zip(*declaration[:2], strict=True)]

    def _row(self, log_weight: float, features: list[float]) -> list[float]:
        weight = math.exp(log_weight - self._top) if log_weight <= self._top else math.nan
        row = [weight, *(weight * (own - other) for own, other in zip(features, self._reference, strict=True))]
        return row if all(map(math.isfinite, row)) else [0.0] * len(row)  # a claim that is no number explains nothing
