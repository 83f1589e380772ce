"""Clipping of each pose's gradient."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gradhooks.errors import CombinationError
from gradhooks_robust.wrapper import GradientWrapper, contributions, inner_products, sum_over_poses


class ClippedGradients(GradientWrapper):
    """Bound the norm of each pose's contribution to the gradient: `sum_i g_i min(1, C / norm(g_i))`.

    Here `g_i = dL/dy_i * dy_i/dtheta`, over all leaves together. Source: Abadi et al., Deep learning with differential
    privacy, arXiv:1607.00133, algorithm 1 (its gradient clipping; without noise, and summed instead of averaged).

    Args:
        combination: The combination of the predictions: the name of an installed one, or an object.
        max_norm: `C > 0`, in the unit of the gradient of the loss.

    Raises:
        CombinationError: `max_norm` is not positive.
    """

    def __init__(self, combination: str | Callable[..., Tensor] = "mean", max_norm: float = 1.0) -> None:
        super().__init__(combination)
        if not max_norm > 0:
            raise CombinationError(f"ClippedGradients: max_norm must be positive, got {max_norm}")
        self.max_norm = max_norm

    def combine_gradients(
        self, gradients: Mapping[str, Tensor], predictions: Tensor, coefficients: Tensor
    ) -> Mapping[str, Tensor]:
        del predictions
        rows = contributions(gradients, coefficients)
        norms = inner_products(rows).diagonal().sqrt()
        # min(1, C / norm) = C / max(norm, C), which does not divide by 0
        return sum_over_poses(rows, self.max_norm / torch.clamp_min(norms, self.max_norm))

    def extra_repr(self) -> str:
        return f"max_norm={self.max_norm:g}"
