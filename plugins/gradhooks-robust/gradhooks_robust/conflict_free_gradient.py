"""Removal of conflicts between the poses' gradients."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gradhooks_robust.wrapper import GradientWrapper, contributions, inner_products, sum_over_poses


class ConflictFreeGradient(GradientWrapper):
    """Remove from each pose's contribution to the gradient the part that opposes another pose (PCGrad).

    For each `i` and for each `j != i` in random order: if `g_i . g_j < 0`, replace `g_i` by its part orthogonal to the
    original `g_j`, `g_i - (g_i . g_j / g_j . g_j) g_j`. Then sum over `i`. Here `g_i = dL/dy_i * dy_i/dtheta`, over all
    leaves together. Source: Yu et al., Gradient surgery for multi-task learning, arXiv:2001.06782, algorithm 1.

    Args:
        combination: The combination of the predictions: the name of an installed one, or an object.
        seed: Seed of the random order, which differs from step to step.
    """

    def __init__(self, combination: str | Callable[..., Tensor] = "mean", seed: int = 0) -> None:
        super().__init__(combination)
        self.seed = seed
        self._steps = 0

    def combine_gradients(
        self, gradients: Mapping[str, Tensor], predictions: Tensor, coefficients: Tensor
    ) -> Mapping[str, Tensor]:
        del predictions
        rows = contributions(gradients, coefficients)
        orders = self._random_orders(len(coefficients))
        return sum_over_poses(rows, _conflict_free_factors(inner_products(rows).cpu(), orders).to(coefficients.device))

    def _random_orders(self, count: int) -> list[list[int]]:
        """Return a random order of all poses for each pose."""
        generator = torch.Generator().manual_seed(self.seed + self._steps)
        self._steps += 1
        return [torch.randperm(count, generator=generator).tolist() for _ in range(count)]

    def extra_repr(self) -> str:
        return f"seed={self.seed}"


def _conflict_free_factors(products: Tensor, orders: list[list[int]]) -> Tensor:
    """Compute the factor of each contribution in the conflict-free sum, shape `(N,)`.

    Projections are linear: the changed `g_i` is `sum_j mixture[j] g_j`, so no gradient is copied.

    Args:
        products: The inner products `g_i . g_j`, shape `(N, N)`.
        orders: For each pose, the order in which conflicts with the others are removed.
    """
    total = torch.zeros(len(products), dtype=products.dtype)
    for pose, order in enumerate(orders):
        mixture = torch.zeros_like(total)
        mixture[pose] = 1.0
        for other in order:
            # g_i . g_j = sum_k mixture[k] g_k . g_j
            product = torch.dot(mixture, products[:, other])
            if other != pose and product < 0:
                mixture[other] -= product / products[other, other]
        total += mixture
    return total
