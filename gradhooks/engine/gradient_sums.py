"""Arithmetic on gradients, of which some may be missing, sparse or narrow."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from gradhooks.engine.shadow_parameters import ShadowParameters
from gradhooks.numerics import wide

Gradients = list[Tensor | None]


def accumulate(total: Tensor | None, gradient: Tensor, factor: float) -> Tensor:
    """`total + factor * gradient`, in place where there is a total, never narrower than float32.

    Takes `gradient` over, without a copy, if it is the first and needs no change.
    """
    if total is None:
        first = gradient.to(wide(gradient.dtype))
        return first if factor == 1 else first * factor
    if not total.is_sparse:
        return total.add_(gradient, alpha=factor)
    if gradient.is_sparse:
        return (total + factor * gradient.to(total.dtype)).coalesce()  # uncoalesced sums would grow with every pose
    return gradient.to(total.dtype).mul(factor).add_(total)


def scale_(gradients: Sequence[Tensor | None], factor: float) -> None:
    """Multiply all that is there in place."""
    present = [gradient for gradient in gradients if gradient is not None]
    dense = [gradient for gradient in present if not gradient.is_sparse]
    if dense:
        torch._foreach_mul_(dense, factor)
    for gradient in present:
        if gradient.is_sparse:
            gradient.mul_(factor)


def add_into(totals: Gradients, gradients: Sequence[Tensor | None], factor: float = 1.0) -> None:
    """`totals += factor * gradients`, one list over the other."""
    for place, gradient in enumerate(gradients):
        if gradient is not None:
            totals[place] = accumulate(totals[place], gradient, factor)


def weighted(sums: Sequence[Gradients], scales: Sequence[float], *, overwrite: bool) -> Gradients:
    """`sum_k scales[k] * sums[k]`, without a copy of the first where it may be overwritten."""
    totals = sums[0] if overwrite else [None if total is None else total.clone() for total in sums[0]]
    scale_(totals, scales[0])
    for other, scale in zip(sums[1:], scales[1:], strict=True):
        add_into(totals, other, scale)
    return totals


def all_finite(sums: Sequence[Gradients]) -> bool:
    """Whether there is neither NaN nor infinity in any of them."""
    present = [total for totals in sums for total in totals if total is not None]
    return all(bool((total.coalesce().values() if total.is_sparse else total).isfinite().all()) for total in present)


class RunningSums:
    """R weighted sums of the gradients that arrive in a group's leaves, R copies of the gradients large.

    With one sum of wide gradients no Python runs for a parameter: the backward carries the weight and the engine adds
    it up in the leaf's own `.grad`. Otherwise a hook on each leaf folds its gradient as it arrives and frees it, so
    that one parameter's gradient is alive at a time.

    Args:
        shadows: The leaves.
        count: R.
    """

    def __init__(self, shadows: ShadowParameters, count: int) -> None:
        self._leaves = shadows.leaves
        self._sums: list[Gradients] = [[None] * len(self._leaves) for _ in range(count)]
        self.expect((1.0,) * count)
        folded = [place for place, leaf in enumerate(self._leaves) if count > 1 or wide(leaf.dtype) != leaf.dtype]
        in_place = set(folded)
        self._in_leaf = [place for place in range(len(self._leaves)) if place not in in_place]
        self._hooks = shadows.intercept(self._fold, folded)

    def expect(self, factors: Sequence[float]) -> None:
        """What the gradients of the next backward count in each sum."""
        # The sum that takes the first gradient over must come last, or the others would change with it.
        targets = reversed(list(zip(self._sums, factors, strict=True)))
        self._targets = [(sums, factor) for sums, factor in targets if factor != 0]

    def _fold(self, place: int, gradient: Tensor) -> None:
        for sums, factor in self._targets:
            sums[place] = accumulate(sums[place], gradient, factor)

    def rescale(self, factor: float, shifts: Sequence[float]) -> None:
        """Multiply every sum by `factor`, after adding `shifts[k]` times sum 0 to sum `k + 1`."""
        first = self.sum(0)
        for sums, shift in zip(self._sums[1:], shifts, strict=True):
            add_into(sums, [gradient if shift else None for gradient in first], shift)
        for k in range(len(self._sums)):
            scale_(self.sum(k), factor)

    def clear(self) -> None:
        """Forget everything."""
        for leaf in self._leaves:
            leaf.grad = None
        for sums in self._sums:
            sums[:] = [None] * len(self._leaves)

    def sum(self, k: int) -> Gradients:
        """The present sum `k`, leaf by leaf."""
        if k == 0:
            for place in self._in_leaf:
                self._sums[0][place] = self._leaves[place].grad
        return self._sums[k]

    def take(self) -> list[Gradients]:
        """All sums; the leaves are left without them, and without hooks."""
        with self:
            return [list(self.sum(k)) for k in range(len(self._sums))]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()
        self.clear()
