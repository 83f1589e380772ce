"""Functions of probabilities given as logarithms, with gradients that are finite everywhere."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from gradhooks.group_reductions import group_logsumexp, group_sum

NEGLIGIBLE = -40.0
"""Below this, `ln(1 + exp(x))` and `exp(x)` are the same number in float64: `e^-40 < eps / 50`."""


def log_softplus(logits: Tensor) -> Tensor:
    """Compute `ln(-ln(1 - p)) = ln softplus(y)` with `p = sigmoid(y)`, which is `y` where `p` is nearly 0."""
    p_is_tiny = logits < NEGLIGIBLE
    # torch.where passes NaN gradients of the branch that is not taken, so each branch gets arguments it can handle.
    return torch.where(p_is_tiny, logits, softplus(torch.where(p_is_tiny, 0.0, logits)).log())


def log_one_minus_exp(exponents: Tensor) -> Tensor:
    """Compute `ln(1 - exp(x))` for `x < 0`, by the formula that keeps all digits on each side of `-ln 2`."""
    near_zero = exponents > -math.log(2)
    return torch.where(
        near_zero,
        torch.expm1(torch.where(near_zero, exponents, -1.0)).neg().log(),
        torch.log1p(-torch.where(near_zero, -1.0, exponents).exp()),
    )


def log_mean_exp(logarithms: Tensor) -> Tensor:
    """Compute `ln mean_i exp(x_i)` over axis 0."""
    return torch.logsumexp(logarithms, dim=0) - math.log(len(logarithms))


def group_log_mean_exp(logarithms: Tensor, groups: Tensor, count: int) -> Tensor:
    """Compute `ln mean_i exp(x_i)` over each of the `count` groups."""
    sizes = group_sum(torch.ones_like(logarithms), groups, count)
    return group_logsumexp(logarithms, groups, count) - sizes.log()
