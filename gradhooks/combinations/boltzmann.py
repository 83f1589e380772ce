import math

import torch
from torch import Tensor

from gradhooks.combination import Combination, StreamWeights
from gradhooks.combinations.pose_weights import log_weights, widest
from gradhooks.errors import CombinationError

ROOM_TEMPERATURE = 0.592485  # R * 298.15 K in kcal/mol, R = 1.987204e-3 kcal/(mol K) (CODATA 2018)


class Boltzmann(Combination):
    """Thermal average `h = sum_i w_i y_i`, `w_i = g_i exp(-y_i/T - Q)`, `Q = ln sum_j g_j exp(-y_j/T)`.

    All degeneracies `g_i` are 1 unless the call says `weights=`.

    Args:
        temperature: `T > 0`, in the unit of the predictions. The default is `RT` at 298.15 K in kcal/mol, for
            predictions that are free energies in kcal/mol.
        learnable: Train the temperature with everything else; the parameter is its logarithm, so it stays positive.

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
        """`T`, in the unit of the predictions; a tensor of shape `()` where it is learnable."""
        return widest(self.log_temperature).exp() if self.learnable else self._temperature

    def forward(self, predictions: Tensor, weights: Tensor | None = None) -> Tensor:
        energies = widest(predictions)
        occupations = torch.softmax(
            log_weights(weights, predictions, whole_group=True) - energies / self.temperature, dim=0
        )
        return (occupations * energies).sum(0).to(predictions.dtype)

    @torch.no_grad()
    def stream_weights(self, predictions: Tensor, weights: Tensor | None = None) -> StreamWeights:
        # dh/dy_i = w_i (1 - (y_i - h)/T) = exp(-y_i/T) e^-Q ((1 + h/T) - y_i/T): one weight, two numbers, one feature.
        reduced = widest(predictions) / self.temperature
        return StreamWeights(log_weights(weights, predictions) - reduced, features=reduced)

    def extra_repr(self) -> str:
        temperature = self.log_temperature.detach().exp().item() if self.learnable else self._temperature
        return f"temperature={temperature:g}, learnable={self.learnable}"
