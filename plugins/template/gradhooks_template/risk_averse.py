"""The mean, reduced by the disagreement of the poses."""

from torch import Tensor

from gradhooks import Combination, StreamWeights
from gradhooks.group_reductions import expand_groups, group_mean


class RiskAverse(Combination):
    """Compute the mean minus a multiple of the variance: `h = mean_i y_i - r var_i y_i`.

    Args:
        risk: `r`, in the inverse unit of the predictions.
    """

    api_version = 1  # the version of the plugin contract of gradhooks

    def __init__(self, risk: float = 0.1) -> None:
        super().__init__()
        self.risk = risk

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.mean(0) - self.risk * predictions.var(0, correction=0)

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int) -> Tensor:
        # Optional; without it, forward is called for each group.
        means = group_mean(predictions, groups, count)
        variances = group_mean((predictions - expand_groups(means, groups)).square(), groups, count)
        return means - self.risk * variances

    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        # Optional; leave it out if your coefficients have no such form.
        # dh/dy_i = 1/N - 2 r (y_i - mean)/N = a_0 + a_1 y_i: equal weights and one feature
        return StreamWeights(features=predictions)
