"""Noisy-or of probabilities."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gradhooks import Combination, StreamWeights
from gradhooks.group_reductions import group_logsumexp
from gradhooks_mil.logarithms import NEGLIGIBLE, log_one_minus_exp, log_softplus


class NoisyOr(Combination):
    """Compute the probability that at least one instance is positive: `P = 1 - prod_i (1 - p_i)`.

    Takes logits, `p_i = sigmoid(y_i)`, and returns the logit of `P`. Source: Maron and Lozano-Perez, A framework for
    multiple-instance learning, NIPS 1997 (the noisy-or model of diverse density). An empty bag has `P = 0`, the logit
    `-inf`.
    """

    accepts_empty_groups: ClassVar[bool] = True

    def forward(self, predictions: Tensor) -> Tensor:
        # u = -ln(1 - P) = sum_i -ln(1 - p_i) = sum_i softplus(y_i)
        return self._logit(torch.logsumexp(log_softplus(predictions.double()), dim=0)).to(predictions.dtype)

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int) -> Tensor:
        return self._logit(group_logsumexp(log_softplus(predictions.double()), groups, count)).to(predictions.dtype)

    def _logit(self, log_u: Tensor) -> Tensor:
        # logit P = ln P - ln(1 - P) = ln(1 - e^-u) + u, which is ln u where u is nearly 0
        u_is_tiny = log_u < NEGLIGIBLE
        u = torch.where(u_is_tiny, 0.0, log_u).exp()
        return torch.where(u_is_tiny, log_u, log_one_minus_exp(-u) + u)

    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        # dh/dy_i = dh/du du/dy_i = dh/du p_i = exp(ln p_i) a_0 with a_0 = dh/du
        return StreamWeights(logsigmoid(predictions.double()))
