import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gradhooks import Combination, StreamWeights
from gradhooks.errors import CombinationError


class PowerPooling(Combination):
    """Instances weighted by a power of their probability: `P = sum_i p_i^(n+1) / sum_i p_i^n`.

    Takes logits, `p_i = sigmoid(y_i)`, and returns the logit of `P`. The mean for `n = 0`, the maximum for large `n`.
    Source: Liu et al., Power pooling, arXiv:2010.09985.

    Args:
        exponent: `n > 0`.
        learnable: Train `n` with everything else; the parameter is its logarithm, so that it stays positive.

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
        # 1 - P = sum p_i^n (1 - p_i) / sum p_i^n: the denominators of P and 1 - P cancel in the logit.
        log_p, log_q = logsigmoid(predictions.double()), logsigmoid(-predictions.double())
        positive = torch.logsumexp((self.exponent + 1) * log_p, dim=0)
        negative = torch.logsumexp(self.exponent * log_p + log_q, dim=0)
        return (positive - negative).to(predictions.dtype)

    @torch.no_grad()
    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        # dh/dy_i = p_i^n q_i (-n/B + (n + 1) (1/A + 1/B) p_i), A = sum p_j^(n+1), B = sum p_j^n q_j: one feature.
        log_p, log_q = logsigmoid(predictions.double()), logsigmoid(-predictions.double())
        return StreamWeights(self.exponent * log_p + log_q, features=log_p.exp())


class LinearSoftmax(PowerPooling):
    """Instances weighted by their own probability: `P = sum_i p_i^2 / sum_i p_i`.

    Takes logits, `p_i = sigmoid(y_i)`, and returns the logit of `P`; power pooling with `n = 1`. Source: Wang, Li and
    Metze, A comparison of five multiple instance learning pooling functions, arXiv:1810.09050, table 1.
    """

    def __init__(self) -> None:
        super().__init__(exponent=1.0, learnable=False)
