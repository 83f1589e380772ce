import torch
from torch import Tensor

from gradhooks.combination import Combination, StreamWeights
from gradhooks.combinations.pose_weights import log_weights, widest


class Mean(Combination):
    """`h = sum_i w_i y_i / sum_i w_i`, with all `w_i = 1` unless the call says `weights=`."""

    def forward(self, predictions: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            return widest(predictions).mean(0).to(predictions.dtype)
        share = torch.softmax(log_weights(weights, predictions, whole_group=True), dim=0)
        return (share * widest(predictions)).sum(0).to(predictions.dtype)

    def stream_weights(self, predictions: Tensor, weights: Tensor | None = None) -> StreamWeights:
        # dh/dy_i = w_i / sum_j w_j, whatever the poses predict.
        return StreamWeights() if weights is None else StreamWeights(log_weights(weights, predictions))
