"""The built-in combinations under test, and their closed forms."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from gradhooks import Combination
from gradhooks.combinations import Boltzmann, Max, Mean, Min

BUILT_IN: dict[str, Callable[[], Combination]] = {
    "mean": Mean,
    "min": Min,
    "max": Max,
    "min of scale 2": lambda: Min(scale=2.0),
    "max of scale 2": lambda: Max(scale=2.0),
    "min normalised": lambda: Min(scale=2.0, normalize=True),
    "max normalised": lambda: Max(scale=2.0, normalize=True),
    "boltzmann": Boltzmann,
    "boltzmann of 3": lambda: Boltzmann(3.0),
    "boltzmann learnable": lambda: Boltzmann(0.9, learnable=True),
}
INDEPENDENT_OF_COUNT = ["mean", "min normalised", "max normalised", "boltzmann", "boltzmann of 3"]

predictions_of_a_group = st.lists(st.floats(-50, 50, allow_subnormal=False), min_size=1, max_size=12).map(
    lambda numbers: torch.tensor(numbers, dtype=torch.float64)
)
every_combination = pytest.mark.parametrize("name", BUILT_IN)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def coefficients_of_mean(y: Tensor) -> Tensor:
    return torch.full_like(y, 1 / len(y))


def coefficients_of_extremum(y: Tensor, sign: int, scale: float) -> Tensor:
    """`exp(n t y_i - Q)`, `Q = ln sum exp(n t y_i)`."""
    exponents = sign * scale * y
    return (exponents - exponents.logsumexp(0)).exp()


def coefficients_of_boltzmann(y: Tensor, temperature: float) -> Tensor:
    """`w_i (1 - (y_i - h) / T)`."""
    weights = torch.softmax(-y / temperature, 0)
    average = (weights * y).sum(0)
    return weights * (1 - (y - average) / temperature)


CLOSED_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": coefficients_of_mean,
    "min": lambda y: coefficients_of_extremum(y, -1, 1000.0),
    "max": lambda y: coefficients_of_extremum(y, 1, 1000.0),
    "min of scale 2": lambda y: coefficients_of_extremum(y, -1, 2.0),
    "max of scale 2": lambda y: coefficients_of_extremum(y, 1, 2.0),
    "min normalised": lambda y: coefficients_of_extremum(y, -1, 2.0),
    "max normalised": lambda y: coefficients_of_extremum(y, 1, 2.0),
    "boltzmann": lambda y: coefficients_of_boltzmann(y, 0.592485),
    "boltzmann of 3": lambda y: coefficients_of_boltzmann(y, 3.0),
    "boltzmann learnable": lambda y: coefficients_of_boltzmann(y, 0.9),
}

VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda y: y.sum(0) / len(y),
    "min of scale 2": lambda y: -(-2 * y).exp().sum(0).log() / 2,
    "max of scale 2": lambda y: (2 * y).exp().sum(0).log() / 2,
    "min normalised": lambda y: -((-2 * y).exp().sum(0) / len(y)).log() / 2,
    "max normalised": lambda y: ((2 * y).exp().sum(0) / len(y)).log() / 2,
    "boltzmann of 3": lambda y: ((-y / 3).exp() * y).sum(0) / (-y / 3).exp().sum(0),
}
