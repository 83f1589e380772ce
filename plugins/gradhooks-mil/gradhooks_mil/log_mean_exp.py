import math

from torch import Tensor

from gradhooks import Combination, StreamWeights
from gradhooks.errors import CombinationError
from gradhooks_mil.logarithms import log_mean


class LogMeanExp(Combination):
    """Smooth maximum that does not depend on the size of the bag: `h = (1/t) ln mean_i exp(t y_i)`.

    Between the mean (small `t`) and the maximum (large `t`; negative `t`: the minimum), within `ln(N) / |t|` of it.
    Source: Pinheiro and Collobert, From image-level to pixel-level labeling, arXiv:1411.6228.

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
        return (log_mean(self.scale * predictions.double()) / self.scale).to(predictions.dtype)

    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        # dh/dy_i = exp(t y_i - Q), Q = ln sum_j exp(t y_j).
        return StreamWeights(self.scale * predictions.double())

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"
