from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradhooks import GradientCombination, registry


class GradientWrapper(GradientCombination):
    """Makes the prediction that another combination makes.

    Args:
        combination: That combination: the name of an installed one, or an object.
    """

    def __init__(self, combination: str | Callable[..., Tensor] = "mean") -> None:
        super().__init__()
        self.combination = registry.combinations.resolve(combination)

    def forward(self, predictions: Tensor, **arguments: Any) -> Tensor:
        combined: Tensor = self.combination(predictions, **arguments)
        return combined


def contributions(gradients: Mapping[str, Tensor], coefficients: Tensor) -> dict[str, Tensor]:
    """`g_i = dL/dy_i * dy_i/dtheta`, shape `(N, *leaf)`, for each leaf."""
    return {name: _rows(coefficients.to(gradient), gradient) * gradient for name, gradient in gradients.items()}


def inner_products(contributions: Mapping[str, Tensor]) -> Tensor:
    """`g_i . g_j` over all leaves together, shape `(N, N)`, float64."""
    flat = [contribution.double().reshape(len(contribution), -1) for contribution in contributions.values()]
    return torch.stack([rows @ rows.T for rows in flat]).sum(0)


def weighted_sums(contributions: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """`sum_i weights[i] g_i`, shape `(*leaf)`, for each leaf."""
    return {name: (_rows(weights.to(rows), rows) * rows).sum(0) for name, rows in contributions.items()}


def _rows(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.view(-1, *[1] * (like.dim() - 1))
