import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gradhooks import Combination, StreamWeights
from gradhooks.errors import CombinationError
from gradhooks_mil.logarithms import NEGLIGIBLE, log_mean, log_one_minus_exp


class GeneralizedMean(Combination):
    """Power mean of probabilities: `P = (mean_i p_i^r)^(1/r)`.

    Takes logits, `p_i = sigmoid(y_i)`, and returns the logit of `P`. The mean for `r = 1`, the maximum for large `r`.
    Source: Kraus, Ba and Frey, arXiv:1511.05286, table 1.

    Args:
        exponent: `r > 0`.

    Raises:
        CombinationError: `exponent` is not positive and finite.
    """

    def __init__(self, exponent: float = 4.0) -> None:
        super().__init__()
        if not 0 < exponent < math.inf:
            raise CombinationError(f"GeneralizedMean: exponent must be positive and finite, got {exponent}")
        self.exponent = float(exponent)

    def forward(self, predictions: Tensor) -> Tensor:
        # M = mean p^r. Both ln M and ln(1 - M) are had as means, each exact where the other has lost its digits.
        powers = self.exponent * logsigmoid(predictions.double())
        log_m, log_rest = log_mean(powers), log_mean(self._log_rests(predictions.double(), powers))
        high = log_rest < -math.log(2)
        log_m = torch.where(high, torch.log1p(-torch.where(high, log_rest, -1.0).exp()), log_m)
        # P = M^(1/r), and 1 - P = (1 - M) / r where M is nearly 1.
        near_one = log_rest < NEGLIGIBLE
        log_negative = torch.where(
            near_one,
            log_rest - math.log(self.exponent),
            log_one_minus_exp(torch.where(near_one, -1.0, log_m / self.exponent)),
        )
        return (log_m / self.exponent - log_negative).to(predictions.dtype)

    def _log_rests(self, logits: Tensor, powers: Tensor) -> Tensor:
        """`ln(1 - p_i^r)`, which is `ln r - y_i` where `p_i` is nearly 1."""
        near_one = logits > -NEGLIGIBLE
        return torch.where(
            near_one, math.log(self.exponent) - logits, log_one_minus_exp(torch.where(near_one, -1.0, powers))
        )

    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        # dp_i^r / dy_i = r p_i^r (1 - p_i), and the rest is a function of M.
        logits = predictions.double()
        return StreamWeights(self.exponent * logsigmoid(logits) + logsigmoid(-logits))

    def extra_repr(self) -> str:
        return f"exponent={self.exponent:g}"
