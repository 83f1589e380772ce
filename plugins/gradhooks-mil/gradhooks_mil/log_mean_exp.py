"""Smooth maximum that is independent of the number of instances."""

import math

from torch import Tensor

from gradhooks import Combination, StreamWeights
from gradhooks.errors import CombinationError
from gradhooks_mil.logarithms import group_log_mean_exp, log_mean_exp


class LogMeanExp(Combination):
    """Compute `h = (1/t) ln mean_i exp(t y_i)`, a smooth maximum that does not depend on the size of the bag.

    It lies between the mean (small `t`) and the maximum (large `t`; the minimum for negative `t`), from which it
    differs by at most `ln(N) / |t|`. Source: Pinheiro and Collobert, From image-level to pixel-level labeling with
    convolutional networks, arXiv:1411.6228, eq. 6.

    Args:
        scale: `t`, not 0, in the inverse unit of the predictions.

    Raises:
        CombinationError: `scale` is 0 or not finite.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        if scale == 0 or not math.isfinite(scale):
            raise CombinationError(f"LogMeanExp: scale must be finite and not 0, got {scale}")
        self.scale = float(scale)

    def forward(self, predictions: Tensor) -> Tensor:
        return (log_mean_exp(self.scale * predictions.double()) / self.scale).to(predictions.dtype)

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int) -> Tensor:
        scaled = self.scale * predictions.double()
        return (group_log_mean_exp(scaled, groups, count) / self.scale).to(predictions.dtype)

    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        # dh/dy_i = exp(t y_i - Q) with Q = ln sum_j exp(t y_j) = exp(t y_i) a_0 with a_0 = exp(-Q)
        return StreamWeights(self.scale * predictions.double())

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"
