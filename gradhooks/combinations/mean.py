"""The weighted mean."""

import torch
from torch import Tensor

from gradhooks.combination import Combination, StreamWeights
from gradhooks.combinations.pose_weights import log_weights
from gradhooks.numerics import to_float64


class Mean(Combination):
    """Compute the mean `h = sum_i g_i y_i / sum_i g_i`, with weights `g_i = 1` unless the call passes `weights=`."""

    def forward(self, predictions: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            return to_float64(predictions).mean(0).to(predictions.dtype)
        # g_i / sum_j g_j = softmax_i(ln g_i)
        fractions = torch.softmax(log_weights(weights, predictions, whole_group=True), dim=0)
        return (fractions * to_float64(predictions)).sum(0).to(predictions.dtype)

    def stream_weights(self, predictions: Tensor, weights: Tensor | None = None) -> StreamWeights:
        # dh/dy_i = g_i / sum_j g_j = exp(ln g_i) a_0, for any predictions
        return StreamWeights() if weights is None else StreamWeights(log_weights(weights, predictions))
