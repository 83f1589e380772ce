"""The weighted mean."""

import torch
from torch import Tensor

from gradhooks.combination import Combination, StreamWeights
from gradhooks.combinations.pose_weights import log_weights, log_weights_of_groups
from gradhooks.group_reductions import group_mean, group_softmax, group_sum
from gradhooks.numerics import to_float64


class Mean(Combination):
    """Compute the mean `h = sum_i g_i y_i / sum_i g_i`, with weights `g_i = 1` unless the call passes `weights=`."""

    def forward(self, predictions: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            return to_float64(predictions).mean(0).to(predictions.dtype)
        # g_i / sum_j g_j = softmax_i(ln g_i)
        fractions = torch.softmax(log_weights_of_groups(weights, predictions), dim=0)
        return (fractions * to_float64(predictions)).sum(0).to(predictions.dtype)

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
        numbers = to_float64(predictions)
        if weights is None:
            return group_mean(numbers, groups, count).to(predictions.dtype)
        fractions = group_softmax(log_weights_of_groups(weights, predictions, groups, count), groups, count)
        return group_sum(fractions * numbers, groups, count).to(predictions.dtype)

    def stream_weights(self, predictions: Tensor, weights: Tensor | None = None) -> StreamWeights:
        # dh/dy_i = g_i / sum_j g_j = exp(ln g_i) a_0, for any predictions
        return StreamWeights() if weights is None else StreamWeights(log_weights(weights, predictions))
