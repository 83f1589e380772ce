"""Arithmetic on lists of gradients, in which entries may be missing, sparse or narrow."""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gradhooks.numerics import at_least_float32, on_host

Gradients = list[Tensor | None]

Factor = float | Tensor
"""A number of the host, or of a device: shape `()`, so that the host need not know it."""

_WIDE = {torch.float32, torch.float64, torch.complex64, torch.complex128}
TEMPORARY_BYTES = 16 << 20
"""How much memory a sum with a factor of a device uses at once for products."""


def accumulate(total: Tensor | None, gradient: Tensor, factor: Factor, *, copy: bool = False) -> Tensor:
    """Return `total + factor * gradient`, in place if there is a total, in float32 or wider.

    The first gradient is taken over if it needs no change, without a copy unless `copy` asks for one.
    """
    if total is None:
        first = gradient if gradient.dtype in _WIDE else gradient.to(at_least_float32(gradient.dtype))
        is_one = not isinstance(factor, Tensor) and factor == 1
        return first if is_one and not (copy and first is gradient) else first * _moved(factor, first)
    if not total.is_sparse:
        if isinstance(factor, Tensor):
            return total.addcmul_(gradient.to(total.dtype), factor.to(total.device, total.dtype, non_blocking=True))
        return total.add_(gradient, alpha=factor)
    factor = _moved(factor, total)
    if gradient.is_sparse:
        # Coalesced, since the entries of an uncoalesced sum grow with each pose.
        return (total + factor * gradient.to(total.dtype)).coalesce()
    return gradient.to(total.dtype).mul(factor).add_(total)


def scale_(gradients: Sequence[Tensor | None], factor: Factor) -> None:
    """Multiply the gradients in place."""
    if not isinstance(factor, Tensor) and factor == 1:
        return
    dense, sparse = _by_layout(gradients)
    kinds = {(tensor.device, tensor.dtype) for tensor in dense}
    of_dense = factor
    if not isinstance(factor, Tensor) and {device.type for device, _ in kinds} == {"cpu"}:
        of_dense = torch.tensor(factor, dtype=torch.float64)  # with it the kernel takes a third of the time
    for part in _of_one_kind(dense) if isinstance(of_dense, Tensor) and len(kinds) > 1 else [dense] if dense else []:
        torch._foreach_mul_(part, _moved(of_dense, part[0]))
    for gradient in sparse:
        gradient.mul_(_moved(factor, gradient))


def zero_(gradients: Sequence[Tensor | None]) -> None:
    """Set the gradients to zero in place, also entries that are not finite. Sparse ones stay sparse."""
    dense, sparse = _by_layout(gradients)
    if dense:
        torch._foreach_zero_(dense)
    for gradient in sparse:
        gradient.zero_()


def add_into(
    totals: Gradients, gradients: Sequence[Tensor | None], factor: Factor = 1.0, *, copy: bool = False
) -> None:
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
    add_dense(dense, added, factor)


def add_dense(totals: Sequence[Tensor], gradients: Sequence[Tensor], factor: Factor) -> None:
    """Add `factor * gradients` to `totals` in place; none is sparse."""
    if not isinstance(factor, Tensor):
        if totals:
            torch._foreach_add_(list(totals), list(gradients), alpha=factor)
        return
    for pairs in _of_one_kind(list(zip(totals, gradients, strict=True)), most=TEMPORARY_BYTES):
        of_totals, added = [total for total, _ in pairs], [gradient for _, gradient in pairs]
        torch._foreach_add_(of_totals, torch._foreach_mul(added, _moved(factor, of_totals[0])))


def may_count(factor: Factor) -> bool:
    """Return whether a factor is not 0, as far as the host knows."""
    return isinstance(factor, Tensor) or factor != 0


def shift_and_rescale(sums: Sequence[Gradients], factor: Factor, shifts: Sequence[Factor]) -> None:
    """Add `shifts[k]` times the first sum to sum `k + 1`, then multiply all sums by `factor`.

    The number 0 as factor sets them to zero, also where they are not finite.
    """
    for other, shift in zip(sums[1:], shifts, strict=True):
        if may_count(shift) and may_count(factor):
            add_into(other, sums[0], shift, copy=True)
    for gradients in sums:
        if may_count(factor):
            scale_(gradients, factor)
        else:
            zero_(gradients)


def weighted_sum(sums: Sequence[Gradients], factors: Sequence[float], *, overwrite: bool) -> Gradients:
    """Return `sum_k factors[k] * sums[k]`; with `overwrite` in the memory of the sums."""
    totals: Gradients = [None] * len(sums[0])
    for gradients, factor in zip(sums, factors, strict=True):
        pairs = list(zip(totals, gradients, strict=True))
        first = [gradient if total is None else None for total, gradient in pairs]
        if any(total is not None for total in totals):
            add_into(totals, [None if total is None else gradient for total, gradient in pairs], factor)
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
    """Return whether no entry contains NaN or infinity. Waits for each device once.

    Entries so large that their sum overflows count as infinite.
    """
    present = [total for totals in sums for total in totals if total is not None]
    values = [total.coalesce().values() if total.is_sparse else total for total in present]
    norms = [torch.stack(torch._foreach_norm(part, 1)).sum() for part in _of_one_kind(values)]
    return all(bool(norm.isfinite()) for norm in on_host(*norms))


Entry = TypeVar("Entry", Tensor, tuple[Tensor, Tensor])


def _of_one_kind(entries: Sequence[Entry], most: float = math.inf) -> list[list[Entry]]:
    """Split tensors, or pairs of them, into lists of one device and dtype, of at most `most` bytes where possible."""
    parts: dict[tuple[torch.device, torch.dtype], list[list[Entry]]] = {}
    filled: dict[tuple[torch.device, torch.dtype], float] = {}
    for entry in entries:
        tensor = entry if isinstance(entry, Tensor) else entry[0]
        kind = tensor.device, tensor.dtype
        if kind not in filled or filled[kind] + tensor.nbytes > most:
            parts.setdefault(kind, []).append([])
            filled[kind] = 0.0
        parts[kind][-1].append(entry)
        filled[kind] += tensor.nbytes
    return [part for of_kind in parts.values() for part in of_kind]


def _moved(factor: Factor, beside: Tensor) -> Factor:
    """Return a factor of the device and dtype of a tensor, so that all products are one kernel."""
    return factor.to(beside.device, beside.dtype, non_blocking=True) if isinstance(factor, Tensor) else factor


def _by_layout(gradients: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the dense and the sparse gradients."""
    present = [gradient for gradient in gradients if gradient is not None]
    sparse = [gradient for gradient in present if gradient.is_sparse]
    return (present, []) if not sparse else ([one for one in present if not one.is_sparse], sparse)
