"""What the gradient combinations share: the combination of the predictions, and sums over poses."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from gradhooks import GradientCombination, registry


class GradientWrapper(GradientCombination):
    """Combine the predictions by another combination. Base class: subclasses define `combine_gradients`.

    Args:
        combination: The combination of the predictions: the name of an installed one, or an object.
    """

    def __init__(self, combination: str | Callable[..., Tensor] = "mean") -> None:
        super().__init__()
        self.combination = registry.combinations.resolve(combination)

    def forward(self, predictions: Tensor, **arguments: Any) -> Tensor:
        combined: Tensor = self.combination(predictions, **arguments)
        return combined


def contributions(gradients: Mapping[str, Tensor], coefficients: Tensor) -> dict[str, Tensor]:
    """Compute `g_i = dL/dy_i * dy_i/dtheta`, shape `(N, *leaf)`, for each leaf."""
    return {name: _scale_rows(rows, coefficients) for name, rows in gradients.items()}


def inner_products(contributions: Mapping[str, Tensor]) -> Tensor:
    """Compute `g_i . g_j` over all leaves together, shape `(N, N)`, in float64."""
    flat = [rearrange(rows.double(), "n ... -> n (...)") for rows in contributions.values()]
    return torch.stack([rows @ rows.T for rows in flat]).sum(0)


def sum_over_poses(contributions: Mapping[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
    """Compute `sum_i factors[i] g_i`, shape `(*leaf)`, for each leaf."""
    return {name: _scale_rows(rows, factors).sum(0) for name, rows in contributions.items()}


def _scale_rows(rows: Tensor, factors: Tensor) -> Tensor:
    # Not einsum, which multiplies matrices and rounds to TF32 where the user allows it.
    return rearrange(factors.to(rows), "n -> n" + " 1" * (rows.dim() - 1)) * rows
