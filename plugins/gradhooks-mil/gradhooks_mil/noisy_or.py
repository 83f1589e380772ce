import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gradhooks import Combination, StreamWeights
from gradhooks_mil.logarithms import NEGLIGIBLE, log_one_minus_exp, log_softplus


class NoisyOr(Combination):
    """The bag is positive unless every instance fails to make it so: `P = 1 - prod_i (1 - p_i)`.

    Takes logits, `p_i = sigmoid(y_i)`, and returns the logit of `P`. Source: Maron and Lozano-Perez, A framework for
    multiple-instance learning, NIPS 1997, section 2.
    """

    def forward(self, predictions: Tensor) -> Tensor:
        # With u = -ln(1 - P) = sum_i softplus(y_i), the logit is ln P - ln(1 - P) = ln(1 - e^-u) + u = ln(e^u - 1).
        log_u = torch.logsumexp(log_softplus(predictions.double()), dim=0)
        tiny = log_u < NEGLIGIBLE  # e^u - 1 = u
        u = torch.where(tiny, 0.0, log_u).exp()
        return torch.where(tiny, log_u, log_one_minus_exp(-u) + u).to(predictions.dtype)

    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        # dh/dy_i = dh/du p_i, and all instances share dh/du.
        return StreamWeights(logsigmoid(predictions.double()))
