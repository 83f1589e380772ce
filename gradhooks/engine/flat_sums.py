"""FlatSums: weighted sums of the gradients of many small leaves, in one block of memory for each sum."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from gradhooks.engine.gradient_sums import Factor

FLAT_BYTES = 4 * 1024
"""Gradients of up to this size are added in one block, which takes the memory of one more copy of them.

Adding one of them alone takes as long as calling the kernel.
"""


class FlatSums:
    """Sums of gradients, each in one block of memory.

    The `.grad` of the leaves are parts of a block, to which autograd adds in place. To add the block to a sum then is
    one operation, however many leaves there are, where `torch._foreach_add_` on the CPU is one for each leaf.

    Args:
        leaves: Leaves that every sum contains, of one dtype and device, on which no gradient is waiting.
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self._leaves = leaves
        self._arrived = leaves[0].new_zeros(sum(leaf.numel() for leaf in leaves), requires_grad=False)
        self._sums: dict[int, Tensor] = {}
        for leaf, part in zip(leaves, self._parts(self._arrived), strict=True):
            leaf.grad = part

    def _parts(self, block: Tensor) -> Sequence[Tensor]:
        parts: Sequence[Tensor] = _unflatten_dense_tensors(block, self._leaves)
        return parts

    def __contains__(self, k: int) -> bool:
        return k in self._sums

    def block(self, k: int) -> Tensor:
        """Return sum `k`, shape `(P,)` for leaves of `P` numbers together."""
        return self._sums[k]

    def add_sum(self, k: int, gradients: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """Move sum `k` into a block, or begin it with zeros; return the parts of the block, one for each leaf."""
        block = torch.zeros_like(self._arrived) if gradients is None else _flatten_dense_tensors(gradients)
        self._sums[k] = block
        return self._parts(block)

    def fold(self, targets: Sequence[tuple[int, Factor]]) -> None:
        """Add what arrived in the leaves, times a factor, to some sums."""
        for k, factor in targets:
            if isinstance(factor, Tensor):
                self._sums[k].addcmul_(self._arrived, factor.to(self._arrived, non_blocking=True))
            else:
                self._sums[k].add_(self._arrived, alpha=factor)
        self._arrived.zero_()

    def release(self) -> None:
        """Clear the leaves. The parts of the sums stay valid."""
        for leaf in self._leaves:
            leaf.grad = None


def can_be_flat(leaf: Tensor, gradient: Tensor) -> bool:
    """Return whether a gradient can be part of a block: a small one, to which autograd adds in place.

    Parts of a block are contiguous, and autograd expects the strides of the leaf.
    """
    is_dense = type(gradient) is Tensor and gradient.layout == torch.strided
    return is_dense and gradient.nbytes <= FLAT_BYTES and leaf.is_contiguous()


def is_of_one_kind(gradient: Tensor, other: Tensor) -> bool:
    """Return whether two gradients can be part of the same block."""
    return gradient.dtype == other.dtype and gradient.device == other.device
