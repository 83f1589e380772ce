"""Fit the declared form of the coefficients: `c_i = sum_k a[g, k] factors[i, k]` for the poses `i` of group `g`."""

from typing import NamedTuple

import torch
from torch import Tensor


class Fit(NamedTuple):
    """The result of `fit_groups`.

    Attributes:
        numbers: The numbers `a`, shape `(B, R)`; 0 for a group with a coefficient that is not finite.
        left: What they leave of each coefficient, shape `(N,)`.
        terms: The size of the terms of each coefficient, of which rounding leaves a few last bits; shape `(N,)`.
        fitted: Whether the coefficients of the pose's group are finite, shape `(N,)`, bool.
    """

    numbers: Tensor
    left: Tensor
    terms: Tensor
    fitted: Tensor


def fit_groups(factors: Tensor, coefficients: Tensor, groups: Tensor, group_count: int) -> Fit:
    """Fit `R` numbers for each group by least squares.

    Args:
        factors: Shape `(N, R)`, float64, on the CPU.
        coefficients: Shape `(N,)`, float64.
        groups: The group of each pose, shape `(N,)`.
        group_count: `B`.
    """
    # Columns of equal size, since the solver takes a column of small numbers (probabilities) for rounding errors.
    sizes = torch.zeros(group_count, factors.shape[1], dtype=factors.dtype)
    index = groups.unsqueeze(1).expand_as(factors)
    sizes = sizes.scatter_reduce(0, index, factors.abs(), "amax").clamp_min(torch.finfo(factors.dtype).tiny)
    scaled = factors / sizes[groups]
    not_finite = torch.zeros(group_count, dtype=torch.float64).index_add(0, groups, (~coefficients.isfinite()).double())
    fitted = (not_finite == 0)[groups]
    usable = torch.where(fitted, coefficients, 0.0)
    solve = _ratios if factors.shape[1] == 1 else _least_squares
    numbers = solve(scaled, usable, groups, group_count) / sizes
    products = factors * numbers[groups]
    return Fit(numbers, coefficients - products.sum(1), coefficients.abs() + products.abs().sum(1), fitted)


def _ratios(column: Tensor, coefficients: Tensor, groups: Tensor, group_count: int) -> Tensor:
    """Return `sum_i f_i c_i / sum_i f_i^2` over the poses of each group, shape `(B, 1)`."""
    factors = column.squeeze(1)
    squares = torch.zeros(group_count, dtype=factors.dtype).index_add(0, groups, factors.square())
    numbers = torch.zeros_like(squares)
    for _ in range(2):  # the second time removes the rounding errors of long sums
        left = coefficients - factors * numbers[groups]
        projections = torch.zeros_like(squares).index_add(0, groups, factors * left)
        numbers = numbers + torch.where(squares > 0, projections / squares, 0.0)
    return numbers.unsqueeze(1)


def _least_squares(factors: Tensor, coefficients: Tensor, groups: Tensor, group_count: int) -> Tensor:
    """Return the least-squares solution of each group, shape `(B, R)`.

    Groups of similar size, up to the next power of two, are padded with zeros and solved together. This takes one call
    per power of two, and the padding at most doubles the numbers.
    """
    columns = factors.shape[1]
    counts = torch.bincount(groups, minlength=group_count)
    order = groups.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    positions = torch.arange(len(groups)) - starts[groups[order]]
    solution = torch.zeros(group_count, columns, dtype=factors.dtype)
    exponents = counts.clamp_min(1).double().log2().ceil().long()
    for exponent in exponents.unique().tolist():
        members = (exponents == exponent).nonzero().squeeze(1)
        slots = torch.full((group_count,), -1)
        slots[members] = torch.arange(len(members))
        chosen = slots[groups[order]] >= 0
        rows, cells = order[chosen], (slots[groups[order[chosen]]], positions[chosen])
        padded = factors.new_zeros(len(members), max(2**exponent, columns), 1 + columns)
        padded[cells] = torch.cat([factors[rows], coefficients[rows].unsqueeze(1)], 1)
        solved = torch.linalg.lstsq(padded[..., :columns], padded[..., columns:], driver="gelsd")
        solution[members] = solved.solution.squeeze(2)
    return solution
