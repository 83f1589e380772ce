"""The Boltzmann average."""

import math

import torch
from torch import Tensor

from gradhooks.combination import Combination, StreamWeights
from gradhooks.combinations.pose_weights import log_weights, log_weights_of_groups
from gradhooks.errors import CombinationError
from gradhooks.group_reductions import group_softmax, group_sum
from gradhooks.numerics import to_float64

ROOM_TEMPERATURE = 0.592485  # R * 298.15 K in kcal/mol, R = 1.987204e-3 kcal/(mol K) (CODATA 2018)


class Boltzmann(Combination):
    """Compute the thermal average `h = sum_i w_i y_i` with `w_i = g_i exp(-y_i/T - Q)`, `Q = ln sum_j g_j exp(-y_j/T)`.

    The degeneracies `g_i` are the argument `weights=` of the call, 1 by default.

    Args:
        temperature: `T > 0`, in the unit of the predictions. The default is `RT` at 298.15 K in kcal/mol, for
            predictions that are free energies in kcal/mol.
        learnable: Train the temperature with the other parameters. The parameter is its logarithm, so that the
            temperature stays positive.

    Raises:
        CombinationError: `temperature` is not a positive finite number.
    """

    def __init__(self, temperature: float = ROOM_TEMPERATURE, learnable: bool = False) -> None:
        super().__init__()
        if not (0 < temperature < math.inf):
            raise CombinationError(f"Boltzmann: temperature must be positive and finite, got {temperature}")
        self.learnable = learnable
        if learnable:
            self.log_temperature = torch.nn.Parameter(torch.tensor(math.log(temperature)))
        else:
            self._temperature = float(temperature)

    @property
    def temperature(self) -> Tensor | float:
        """`T`, in the unit of the predictions; a tensor of shape `()` if it is learnable."""
        return to_float64(self.log_temperature).exp() if self.learnable else self._temperature

    def forward(self, predictions: Tensor, weights: Tensor | None = None) -> Tensor:
        energies = to_float64(predictions)
        # w_i = exp(ln g_i - y_i/T) / sum_j exp(ln g_j - y_j/T) = softmax_i(ln g_i - y_i/T)
        occupations = torch.softmax(log_weights_of_groups(weights, predictions) - energies / self.temperature, dim=0)
        return (occupations * energies).sum(0).to(predictions.dtype)

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
        energies = to_float64(predictions)
        logarithms = log_weights_of_groups(weights, predictions, groups, count)
        occupations = group_softmax(logarithms - energies / self.temperature, groups, count)
        return group_sum(occupations * energies, groups, count).to(predictions.dtype)

    def stream_weights(self, predictions: Tensor, weights: Tensor | None = None) -> StreamWeights:
        temperature = self.temperature
        reduced = to_float64(predictions) / (temperature.detach() if isinstance(temperature, Tensor) else temperature)
        # dh/dy_i = w_i (1 - (y_i - h)/T) = exp(ln g_i - y_i/T) (a_0 + a_1 y_i/T)
        # with a_0 = e^-Q (1 + h/T) and a_1 = -e^-Q: one log-weight and one feature
        return StreamWeights(-reduced if weights is None else log_weights(weights, predictions) - reduced, reduced)

    def extra_repr(self) -> str:
        temperature = self.log_temperature.detach().exp().item() if self.learnable else self._temperature
        return f"temperature={temperature:g}, learnable={self.learnable}"
