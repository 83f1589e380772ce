import math
from typing import ClassVar

import torch
from torch import Tensor

from gradhooks.combination import Combination, StreamWeights
from gradhooks.combinations.pose_weights import log_weights, widest
from gradhooks.errors import CombinationError


class LogSumExp(Combination):
    """What `Max` and `Min` share: `h = (n/t) ln sum_i w_i exp(n t y_i)`, with `n` the sign and `t` the scale.

    All `w_i` are 1 unless the call says `weights=`.

    Args:
        scale: `t > 0`, in the inverse unit of the predictions. The larger, the closer to the hard extremum, and the
            fewer poses matter; the distance from it is at most `ln(N) / t`.
        normalize: Take the mean of the exponentials instead of their sum, so that the result does not depend on `N`:
            subtract `(n/t) ln sum_i w_i`.

    Raises:
        CombinationError: `scale` is not a positive finite number.
    """

    sign: ClassVar[int]

    def __init__(self, scale: float = 1000.0, normalize: bool = False) -> None:
        super().__init__()
        if not (0 < scale < math.inf):
            raise CombinationError(f"{type(self).__name__}: scale must be positive and finite, got {scale}")
        self.scale = float(scale)
        self.normalize = normalize

    def forward(self, predictions: Tensor, weights: Tensor | None = None) -> Tensor:
        steepness = self.sign * self.scale
        logarithms = log_weights(weights, predictions, whole_group=True)
        combined = torch.logsumexp(steepness * widest(predictions) + logarithms, dim=0)
        if self.normalize:
            combined = combined - torch.logsumexp(logarithms.expand_as(predictions), dim=0)
        return (combined / steepness).to(predictions.dtype)

    def stream_weights(self, predictions: Tensor, weights: Tensor | None = None) -> StreamWeights:
        # dh/dy_i = w_i exp(n t y_i - Q) with Q = ln sum_j w_j exp(n t y_j): one weight, times a number that all share.
        return StreamWeights(self.sign * self.scale * widest(predictions) + log_weights(weights, predictions))

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, normalize={self.normalize}"


class Max(LogSumExp):
    """Smooth maximum, `h = (1/t) ln sum_i exp(t y_i)`: the best score of the group."""

    sign = 1


class Min(LogSumExp):
    """Smooth minimum, `h = -(1/t) ln sum_i exp(-t y_i)`: the lowest energy of the group."""

    sign = -1
