"""Median of the poses' gradients."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gradhooks_robust.wrapper import GradientWrapper, contributions


class MedianGradient(GradientWrapper):
    """Take the coordinate-wise median of the poses' contributions to the gradient: `N median_i(g_i)`.

    Here `g_i = dL/dy_i * dy_i/dtheta`; the median of an even number of values is the mean of the middle two. The factor
    `N` makes it an estimate of the sum. For combinations with coefficients of similar size, such as the mean: if few
    coefficients differ from 0, the median is 0. Source: Yin et al., Byzantine-robust distributed learning: towards
    optimal statistical rates, arXiv:1803.01498 (coordinate-wise median).

    Args:
        combination: The combination of the predictions: the name of an installed one, or an object.
    """

    def combine_gradients(
        self, gradients: Mapping[str, Tensor], predictions: Tensor, coefficients: Tensor
    ) -> Mapping[str, Tensor]:
        rows = contributions(gradients, coefficients)
        return {name: len(predictions) * _median(values) for name, values in rows.items()}


def _median(rows: Tensor) -> Tensor:
    """Return the median over axis 0."""
    # Not torch.quantile, which refuses inputs of more than 16 million numbers.
    ordered = torch.sort(rows, dim=0).values
    return (ordered[(len(rows) - 1) // 2] + ordered[len(rows) // 2]) / 2
