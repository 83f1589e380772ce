"""Functions of probabilities by their logarithms, with gradients that are finite everywhere."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

NEGLIGIBLE = -40.0
"""Below this a number and `ln(1 + exp(number))`'s logarithm are the same in float64: `e^-40 < eps / 50`."""


def log_softplus(logits: Tensor) -> Tensor:
    """`ln(-ln(1 - p)) = ln softplus(y)` with `p = sigmoid(y)`; it is `y` where `p` vanishes."""
    tiny = logits < NEGLIGIBLE
    return torch.where(tiny, logits, softplus(torch.where(tiny, 0.0, logits)).log())


def log_one_minus_exp(exponents: Tensor) -> Tensor:
    """`ln(1 - exp(x))` for `x < 0`, by the form that loses no digits on each side of `-ln 2`."""
    near = exponents > -math.log(2)
    return torch.where(
        near,
        torch.expm1(torch.where(near, exponents, -1.0)).neg().log(),
        torch.log1p(-torch.where(near, -1.0, exponents).exp()),
    )


def log_mean(logarithms: Tensor) -> Tensor:
    """`ln mean_i exp(x_i)` over axis 0."""
    return torch.logsumexp(logarithms, dim=0) - math.log(len(logarithms))
