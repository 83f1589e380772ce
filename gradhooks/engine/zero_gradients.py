"""Zeros in the layout that the gradient of a leaf has."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradhooks.engine.context import ForwardContext
from gradhooks.engine.gradient_sums import zeros_like_gradient
from gradhooks.engine.graph_leaves import reached_leaves


def zero_gradients(context: ForwardContext, predictions: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """Return zeros like the gradients of some leaves; only a backward shows whether these are sparse."""
    if not indices:
        return []
    shadows = context.leaves.shadows
    leaves = [shadows[index] for index in indices]
    _, checkpoints = reached_leaves(predictions)  # reentrant ones refuse a choice of leaves
    try:
        with context.batch.autocast.disabled():
            cotangents = torch.zeros_like(predictions)
            torch.autograd.backward(predictions, cotangents, inputs=None if checkpoints else leaves)
        return [_zeros_like(leaf) for leaf in leaves]
    finally:
        for leaf in shadows:
            leaf.grad = None


def _zeros_like(leaf: Tensor) -> Tensor:
    gradient = leaf.grad
    if gradient is None or not gradient.is_sparse:
        return torch.zeros_like(leaf)
    return zeros_like_gradient(gradient, gradient.dtype)
