from collections.abc import Mapping

import torch
from torch import Tensor

from gradhooks_robust.wrapper import GradientWrapper, contributions


class MedianGradient(GradientWrapper):
    """What most poses agree on, coordinate by coordinate: `N median_i(g_i)`.

    Here `g_i = dL/dy_i * dy_i/dtheta`; of an even number the mean of the middle two. `N` times the median, since it
    stands for a sum. For combinations that weigh poses about alike, as the mean does: the median over a sharp one is 0.
    Source: Yin et al., Byzantine-robust distributed learning, arXiv:1803.01498, definition 1.
    """

    def combine_gradients(
        self, gradients: Mapping[str, Tensor], predictions: Tensor, coefficients: Tensor
    ) -> Mapping[str, Tensor]:
        own = contributions(gradients, coefficients)
        return {name: len(predictions) * _median(rows) for name, rows in own.items()}


def _median(rows: Tensor) -> Tensor:
    # Not torch.quantile, which refuses inputs of more than 16 million numbers.
    ordered = torch.sort(rows, dim=0).values
    return (ordered[(len(rows) - 1) // 2] + ordered[len(rows) // 2]) / 2
