"""Arithmetic on lists of gradients, in which entries may be missing, sparse or narrow."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradhooks.numerics import at_least_float32

Gradients = list[Tensor | None]


def accumulate(total: Tensor | None, gradient: Tensor, factor: float, *, copy: bool = False) -> Tensor:
    """Return `total + factor * gradient`, in place if there is a total, in float32 or wider.

    The first gradient is taken over if it needs no change, without a copy unless `copy` asks for one.
    """
    if total is None:
        first = gradient.to(at_least_float32(gradient.dtype))
        return first if factor == 1 and not (copy and first is gradient) else first * factor
    if not total.is_sparse:
        return total.add_(gradient, alpha=factor)
    if gradient.is_sparse:
        # Coalesced, since the entries of an uncoalesced sum grow with each pose.
        return (total + factor * gradient.to(total.dtype)).coalesce()
    return gradient.to(total.dtype).mul(factor).add_(total)


def scale_(gradients: Sequence[Tensor | None], factor: float) -> None:
    """Multiply the gradients in place."""
    dense, sparse = _by_layout(gradients)
    if dense:
        torch._foreach_mul_(dense, factor)
    for gradient in sparse:
        gradient.mul_(factor)


def zero_(gradients: Sequence[Tensor | None]) -> None:
    """Set the gradients to zero in place, also entries that are not finite. Sparse ones stay sparse."""
    dense, sparse = _by_layout(gradients)
    if dense:
        torch._foreach_zero_(dense)
    for gradient in sparse:
        gradient.zero_()


def add_into(totals: Gradients, gradients: Sequence[Tensor | None], factor: float = 1.0, *, copy: bool = False) -> None:
    """Add `factor * gradients` to `totals`, entry by entry. With `copy` no gradient is taken over."""
    dense: list[Tensor] = []
    added: list[Tensor] = []
    for index, gradient in enumerate(gradients):
        if gradient is None:
            continue
        total = totals[index]
        if total is None or total.is_sparse:
            totals[index] = accumulate(total, gradient, factor, copy=copy)
        else:
            dense.append(total)
            added.append(gradient)
    if dense:
        torch._foreach_add_(dense, added, alpha=factor)


def weighted_sum(sums: Sequence[Gradients], factors: Sequence[float], *, overwrite: bool) -> Gradients:
    """Return `sum_k factors[k] * sums[k]`; with `overwrite` in the memory of the sums."""
    totals: Gradients = [None] * len(sums[0])
    for gradients, factor in zip(sums, factors, strict=True):
        known = [total is not None for total in totals]
        first = [None if there else gradient for gradient, there in zip(gradients, known, strict=True)]
        add_into(totals, [one if there else None for one, there in zip(gradients, known, strict=True)], factor)
        if overwrite:
            scale_(first, factor)
            add_into(totals, first)
        else:
            add_into(totals, first, factor, copy=True)
    return totals


def zeros_like_gradient(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros in the layout of `gradient`; a sparse one keeps its indices, as a product with 0 does."""
    if not gradient.is_sparse:
        return torch.zeros_like(gradient, dtype=dtype)
    entries = gradient.coalesce()
    values = torch.zeros_like(entries.values(), dtype=dtype)
    return torch.sparse_coo_tensor(entries.indices(), values, entries.shape, is_coalesced=True, check_invariants=False)


def all_finite(sums: Sequence[Gradients]) -> bool:
    """Return whether no entry contains NaN or infinity. Waits for each device once."""
    finite: dict[torch.device, list[Tensor]] = {}
    for total in (total for totals in sums for total in totals if total is not None):
        values = total.coalesce().values() if total.is_sparse else total
        finite.setdefault(total.device, []).append(values.isfinite().all())
    return all(bool(torch.stack(flags).all()) for flags in finite.values())


def _by_layout(gradients: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the dense and the sparse gradients."""
    present = [gradient for gradient in gradients if gradient is not None]
    sparse = [gradient for gradient in present if gradient.is_sparse]
    return (present, []) if not sparse else ([one for one in present if not one.is_sparse], sparse)
