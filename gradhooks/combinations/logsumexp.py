"""Smooth maximum and minimum."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from gradhooks.combination import Combination, StreamWeights
from gradhooks.combinations.pose_weights import log_weights, log_weights_of_groups
from gradhooks.errors import CombinationError
from gradhooks.group_reductions import group_logsumexp
from gradhooks.numerics import to_float64


class LogSumExp(Combination):
    """Compute `h = (n/t) ln sum_i g_i exp(n t y_i)`, with `n` the sign and `t` the scale.

    Base class of `Max` and `Min`. The weights `g_i` are the argument `weights=` of the call, 1 by default.

    Args:
        scale: `t > 0`, in the inverse unit of the predictions. With a larger scale the result is closer to the hard
            extremum, from which it differs by at most `ln(N) / t`, and fewer poses matter.
        normalize: Take the mean of the exponentials instead of their sum, which makes the result independent of `N`:
            subtract `(n/t) ln sum_i g_i`.

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
        signed_scale = self.sign * self.scale
        logarithms = log_weights_of_groups(weights, predictions)
        # n t h = ln sum_i exp(n t y_i + ln g_i), minus ln sum_i g_i if normalized; 1/(n t) = n/t since n = 1 or -1
        exponent = torch.logsumexp(signed_scale * to_float64(predictions) + logarithms, dim=0)
        if self.normalize:
            exponent = exponent - torch.logsumexp(logarithms.expand_as(predictions), dim=0)
        return (exponent / signed_scale).to(predictions.dtype)

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
        signed_scale = self.sign * self.scale
        logarithms = log_weights_of_groups(weights, predictions, groups, count)
        exponent = group_logsumexp(signed_scale * to_float64(predictions) + logarithms, groups, count)
        if self.normalize:
            exponent = exponent - group_logsumexp(logarithms.expand_as(predictions), groups, count)
        return (exponent / signed_scale).to(predictions.dtype)

    def stream_weights(self, predictions: Tensor, weights: Tensor | None = None) -> StreamWeights:
        # dh/dy_i = g_i exp(n t y_i - Q) with Q = ln sum_j g_j exp(n t y_j)
        #         = exp(n t y_i + ln g_i) a_0 with a_0 = exp(-Q)
        exponents = self.sign * self.scale * to_float64(predictions)
        return StreamWeights(exponents if weights is None else exponents + log_weights(weights, predictions))

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, normalize={self.normalize}"


class Max(LogSumExp):
    """Compute the smooth maximum `h = (1/t) ln sum_i exp(t y_i)`, for example the best score of a group."""

    sign = 1


class Min(LogSumExp):
    """Compute the smooth minimum `h = -(1/t) ln sum_i exp(-t y_i)`, for example the lowest energy of a group."""

    sign = -1
