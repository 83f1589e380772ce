"""Means of probabilities, weighted by a power of the probability itself."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gradhooks import Combination, StreamWeights
from gradhooks.errors import CombinationError
from gradhooks.group_reductions import group_logsumexp


class PowerPooling(Combination):
    """Compute the mean of probabilities weighted by their own power, `P = sum_i p_i^(n+1) / sum_i p_i^n`.

    Takes logits, `p_i = sigmoid(y_i)`, and returns the logit of `P`. It is the mean for `n = 0` and approaches the
    maximum as `n` grows. Source: Liu et al., Power pooling: an adaptive pooling function for weakly labelled sound
    event detection, arXiv:2010.09985.

    Args:
        exponent: `n > 0`.
        learnable: Train `n` with the other parameters. The parameter is its logarithm, so that `n` stays positive.

    Raises:
        CombinationError: `exponent` is not positive.
    """

    def __init__(self, exponent: float = 1.0, learnable: bool = True) -> None:
        super().__init__()
        if not exponent > 0:
            raise CombinationError(f"{type(self).__name__}: exponent must be positive, got {exponent}")
        self.log_exponent = torch.nn.Parameter(torch.tensor(float(exponent)).log(), requires_grad=learnable)

    @property
    def exponent(self) -> Tensor:
        """`n`, shape `()`."""
        return self.log_exponent.double().exp()

    def forward(self, predictions: Tensor) -> Tensor:
        positive, negative = self._log_terms(predictions)
        return (torch.logsumexp(positive, dim=0) - torch.logsumexp(negative, dim=0)).to(predictions.dtype)

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int) -> Tensor:
        positive, negative = self._log_terms(predictions)
        logit = group_logsumexp(positive, groups, count) - group_logsumexp(negative, groups, count)
        return logit.to(predictions.dtype)

    def _log_terms(self, predictions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithms of the terms of which the sums are `D P` and `D (1 - P)`, with `D = sum_i p_i^n`."""
        log_p, log_one_minus_p = logsigmoid(predictions.double()), logsigmoid(-predictions.double())
        # P = sum_i p_i^(n+1) / D and 1 - P = sum_i p_i^n (1 - p_i) / D
        # logit P = ln P - ln(1 - P), where ln D cancels
        return (self.exponent + 1) * log_p, self.exponent * log_p + log_one_minus_p

    @torch.no_grad()
    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        log_p, log_one_minus_p = logsigmoid(predictions.double()), logsigmoid(-predictions.double())
        # dh/dy_i = p_i^n (1 - p_i) (-n/B + (n + 1) (1/A + 1/B) p_i) with A = sum_j p_j^(n+1), B = sum_j p_j^n (1 - p_j)
        #         = exp(n ln p_i + ln(1 - p_i)) (a_0 + a_1 p_i): one log-weight and one feature
        return StreamWeights(self.exponent * log_p + log_one_minus_p, features=log_p.exp())


class LinearSoftmax(PowerPooling):
    """Compute the mean of probabilities weighted by themselves, `P = sum_i p_i^2 / sum_i p_i`.

    Takes logits, `p_i = sigmoid(y_i)`, and returns the logit of `P`; power pooling with `n = 1`. Source: Wang, Li and
    Metze, A comparison of five multiple instance learning pooling functions for sound event detection with weak
    labeling, arXiv:1810.09050 (linear softmax).
    """

    def __init__(self) -> None:
        super().__init__(exponent=1.0, learnable=False)
