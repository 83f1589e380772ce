"""Arithmetic on lists of gradients, in which entries may be missing, sparse or narrow."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradhooks.numerics import at_least_float32

Gradients = list[Tensor | None]


def accumulate(total: Tensor | None, gradient: Tensor, factor: float) -> Tensor:
    """Return `total + factor * gradient`, in place if there is a total, in float32 or wider.

    The first gradient is taken over without a copy if it needs no change.
    """
    if total is None:
        first = gradient.to(at_least_float32(gradient.dtype))
        return first if factor == 1 else first * factor
    if not total.is_sparse:
        return total.add_(gradient, alpha=factor)
    if gradient.is_sparse:
        # Coalesced, since the entries of an uncoalesced sum grow with each pose.
        return (total + factor * gradient.to(total.dtype)).coalesce()
    return gradient.to(total.dtype).mul(factor).add_(total)


def scale_(gradients: Sequence[Tensor | None], factor: float) -> None:
    """Multiply the gradients in place."""
    present = [gradient for gradient in gradients if gradient is not None]
    dense = [gradient for gradient in present if not gradient.is_sparse]
    if dense:
        torch._foreach_mul_(dense, factor)
    for gradient in present:
        if gradient.is_sparse:
            gradient.mul_(factor)


def add_into(totals: Gradients, gradients: Sequence[Tensor | None], factor: float = 1.0) -> None:
    """Add `factor * gradients` to `totals`, entry by entry."""
    for index, gradient in enumerate(gradients):
        if gradient is not None:
            totals[index] = accumulate(totals[index], gradient, factor)


def weighted_sum(sums: Sequence[Gradients], factors: Sequence[float], *, overwrite: bool) -> Gradients:
    """Return `sum_k factors[k] * sums[k]`; with `overwrite` in the memory of the first."""
    totals = sums[0] if overwrite else [None if total is None else total.clone() for total in sums[0]]
    scale_(totals, factors[0])
    for other, factor in zip(sums[1:], factors[1:], strict=True):
        add_into(totals, other, factor)
    return totals


def all_finite(sums: Sequence[Gradients]) -> bool:
    """Return whether no entry contains NaN or infinity."""
    present = [total for totals in sums for total in totals if total is not None]
    return all(bool((total.coalesce().values() if total.is_sparse else total).isfinite().all()) for total in present)
