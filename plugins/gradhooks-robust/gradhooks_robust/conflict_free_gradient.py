from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gradhooks_robust.wrapper import GradientWrapper, contributions, inner_products, weighted_sums


class ConflictFreeGradient(GradientWrapper):
    """PCGrad: from each pose's contribution, take away what opposes another's.

    For each `i`, for each `j != i` in random order: where `g_i . g_j < 0`, replace `g_i` by its part orthogonal to the
    original `g_j`, `g_i - (g_i . g_j / g_j . g_j) g_j`; then sum. Here `g_i = dL/dy_i * dy_i/dtheta` over all leaves
    together. Source: Yu et al., Gradient surgery for multi-task learning, arXiv:2001.06782, algorithm 1.

    Args:
        combination: Makes the prediction.
        seed: Of the random order, which changes from step to step.
    """

    def __init__(self, combination: str | Callable[..., Tensor] = "mean", seed: int = 0) -> None:
        super().__init__(combination)
        self.seed = seed
        self._steps = 0

    def combine_gradients(
        self, gradients: Mapping[str, Tensor], predictions: Tensor, coefficients: Tensor
    ) -> Mapping[str, Tensor]:
        del predictions
        own = contributions(gradients, coefficients)
        order = self._orders(len(coefficients))
        return weighted_sums(own, _without_conflicts(inner_products(own).cpu(), order).to(coefficients.device))

    def _orders(self, count: int) -> list[list[int]]:
        """For each pose an order of all."""
        generator = torch.Generator().manual_seed(self.seed + self._steps)
        self._steps += 1
        return [torch.randperm(count, generator=generator).tolist() for _ in range(count)]

    def extra_repr(self) -> str:
        return f"seed={self.seed}"


def _without_conflicts(products: Tensor, orders: list[list[int]]) -> Tensor:
    """How often each contribution counts in the sum, shape `(N,)`, given all inner products, shape `(N, N)`.

    Projections are linear: the changed `g_i` is `sum_j mixture[j] g_j`, so that no gradient need be copied.
    """
    total = torch.zeros(len(products), dtype=products.dtype)
    for own, order in enumerate(orders):
        mixture = torch.zeros_like(total)
        mixture[own] = 1.0
        for other in order:
            opposing = torch.dot(mixture, products[:, other])
            if other != own and opposing < 0:
                mixture[other] -= opposing / products[other, other]
        total += mixture
    return total
