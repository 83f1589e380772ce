"""Combinations for gradhooks that also combine the gradients of the poses."""

from gradhooks_robust.clipped_gradients import ClippedGradients
from gradhooks_robust.conflict_free_gradient import ConflictFreeGradient
from gradhooks_robust.median_gradient import MedianGradient

__all__ = ["ClippedGradients", "ConflictFreeGradient", "MedianGradient"]
