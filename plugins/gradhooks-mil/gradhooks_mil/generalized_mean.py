"""Generalized (power) mean of probabilities."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gradhooks import Combination, StreamWeights
from gradhooks.errors import CombinationError
from gradhooks_mil.logarithms import NEGLIGIBLE, group_log_mean_exp, log_mean_exp, log_one_minus_exp


class GeneralizedMean(Combination):
    """Compute the power mean of probabilities, `P = (mean_i p_i^r)^(1/r)`.

    Takes logits, `p_i = sigmoid(y_i)`, and returns the logit of `P`. It is the mean for `r = 1` and approaches the
    maximum as `r` grows. Source: Kraus, Ba and Frey, Classifying and segmenting microscopy images using convolutional
    multiple instance learning, arXiv:1511.05286 (generalized mean, in the comparison of pooling functions).

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
        log_powers, log_one_minus_powers = self._log_powers(predictions.double())
        return self._logit(log_mean_exp(log_powers), log_mean_exp(log_one_minus_powers)).to(predictions.dtype)

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int) -> Tensor:
        log_m, log_one_minus_m = (
            group_log_mean_exp(logarithms, groups, count) for logarithms in self._log_powers(predictions.double())
        )
        return self._logit(log_m, log_one_minus_m).to(predictions.dtype)

    def _logit(self, log_m: Tensor, log_one_minus_m: Tensor) -> Tensor:
        """Compute `logit P` from the logarithms of `M = mean_i p_i^r` and of `1 - M = mean_i (1 - p_i^r)`."""
        # Each mean keeps the digits that the other one loses.
        m_is_large = log_one_minus_m < -math.log(2)
        log_m = torch.where(m_is_large, torch.log1p(-torch.where(m_is_large, log_one_minus_m, -1.0).exp()), log_m)
        # ln(1 - P) = ln(1 - M^(1/r)), which is ln((1 - M) / r) where M is nearly 1
        m_is_one = log_one_minus_m < NEGLIGIBLE
        log_one_minus_p = torch.where(
            m_is_one,
            log_one_minus_m - math.log(self.exponent),
            log_one_minus_exp(torch.where(m_is_one, -1.0, log_m / self.exponent)),
        )
        # logit P = ln P - ln(1 - P) with ln P = (ln M) / r
        return log_m / self.exponent - log_one_minus_p

    def _log_powers(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `ln p_i^r`, and `ln(1 - p_i^r)`, which is `ln r - y_i` where `p_i` is nearly 1."""
        log_powers = self.exponent * logsigmoid(logits)
        p_is_one = logits > -NEGLIGIBLE
        return log_powers, torch.where(
            p_is_one, math.log(self.exponent) - logits, log_one_minus_exp(torch.where(p_is_one, -1.0, log_powers))
        )

    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        logits = predictions.double()
        # dh/dy_i = dh/dM dM/dy_i = dh/dM (r/N) p_i^r (1 - p_i) = exp(r ln p_i + ln(1 - p_i)) a_0
        return StreamWeights(self.exponent * logsigmoid(logits) + logsigmoid(-logits))

    def extra_repr(self) -> str:
        return f"exponent={self.exponent:g}"
