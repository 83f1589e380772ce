"""Sums, means, maxima and softmax over groups agree with plain PyTorch on each group."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from groups_of_poses import EMPTY, INDICES, one_by_one
from model_zoo import TensorFactory
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradhooks.group_reductions import (
    expand_groups,
    group_logsumexp,
    group_max,
    group_mean,
    group_sizes,
    group_softmax,
    group_sum,
)

Reduction = Callable[[Tensor, Tensor, int], Tensor]

REDUCTIONS: dict[str, tuple[Reduction, Callable[[Tensor], Tensor]]] = {
    "sum": (group_sum, lambda rows: rows.sum(0)),
    "mean": (group_mean, lambda rows: rows.mean(0)),
    "max": (group_max, lambda rows: rows.amax(0)),
    "logsumexp": (group_logsumexp, lambda rows: rows.logsumexp(0)),
    "largest softmax": (
        lambda values, groups, count: group_max(group_softmax(values, groups, count), groups, count),
        lambda rows: rows.softmax(0).amax(0),
    ),
}
every_reduction = pytest.mark.parametrize("name", REDUCTIONS)


def results(name: str, values: Tensor, index: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Return value and gradient by the reduction, and by plain PyTorch for each group."""
    groups, count = torch.tensor(index, device=values.device), max(index) + 1
    reduction, of_one = REDUCTIONS[name]
    both: list[list[Tensor]] = []
    for combine in (lambda leaf: reduction(leaf, groups, count), lambda leaf: one_by_one(of_one, leaf, groups, count)):
        leaf = values.clone().requires_grad_()
        combined = combine(leaf)
        (gradient,) = torch.autograd.grad(combined, leaf, torch.ones_like(combined).cumsum(0))
        both.append([combined, gradient])
    return both[0], both[1]


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("index", INDICES, ids=str)
@every_reduction
def test_reductions(name: str, index: list[int], shape: tuple[int, ...], double: TensorFactory) -> None:
    result, expected = results(name, 3 * double.randn(len(index), *shape), index)
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("numbers", [[math.nan], [math.inf], [-math.inf], [-math.inf, -math.inf], [math.inf, math.nan]])
@every_reduction
def test_numbers_that_are_not_finite_stay_in_their_group(
    name: str, numbers: list[float], double: TensorFactory
) -> None:
    index = [1, 0, 1, 2, 0, 2, 1]
    values = double.randn(7)
    values[[1, 4][: len(numbers)]] = torch.tensor(numbers, dtype=values.dtype, device=values.device)
    result, expected = results(name, values, index)
    torch.testing.assert_close(result[0], expected[0], rtol=1e-13, atol=1e-13, equal_nan=True)
    if name != "max":  # torch.amax gives NaN as a gradient where the maximum is NaN
        torch.testing.assert_close(result[1], expected[1], rtol=1e-13, atol=1e-13, equal_nan=True)
    assert result[1][torch.tensor(index) != 0].isfinite().all()


@pytest.mark.parametrize(("name", "of_none"), [("sum", 0.0), ("mean", math.nan), ("max", -math.inf)])
def test_an_empty_group(name: str, of_none: float, double: TensorFactory) -> None:
    values = double.randn(3)
    result = REDUCTIONS[name][0](values, torch.tensor(EMPTY, device=values.device), 4)
    expected = torch.tensor([of_none, of_none], dtype=values.dtype, device=values.device)
    torch.testing.assert_close(result[[1, 3]], expected, equal_nan=True)


def test_logsumexp_of_an_empty_group_has_no_gradient(double: TensorFactory) -> None:
    values = double.randn(3).requires_grad_()
    result = group_logsumexp(values, torch.tensor(EMPTY, device=values.device), 4)
    assert result[[1, 3]].tolist() == [-math.inf, -math.inf]
    result.sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad.sum(), torch.tensor(2.0, dtype=values.dtype, device=values.device))


def test_second_derivatives(double: TensorFactory) -> None:
    groups = torch.tensor([1, 0, 1, 2, 0], device=double.device)
    for reduction in (group_sum, group_mean, group_softmax, group_logsumexp):
        values = double.randn(5, 2).requires_grad_()
        assert torch.autograd.gradgradcheck(lambda leaf, own=reduction: own(leaf, groups, 3), values)


def test_softmax_of_half_precision_is_computed_in_float32(single: TensorFactory) -> None:
    values = single.randn(300).bfloat16()
    groups = torch.zeros(300, dtype=torch.int64, device=values.device)
    result = group_softmax(values, groups, 1)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, values.softmax(0))


def test_sizes_and_expansion(double: TensorFactory) -> None:
    groups = torch.tensor([2, 0, 2, 2], device=double.device)
    assert group_sizes(groups, 4).tolist() == [1, 0, 3, 0]
    assert expand_groups(torch.arange(4, device=double.device), groups).tolist() == [2, 0, 2, 2]


class Operators(TorchDispatchMode):
    """Counts operators, and those that wait for a device: reading a number, or finding out how many there are."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "_unique2", "unique_dim", "bincount", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count, self.waits = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.waits += func.overloadpacket.__name__ in self.WAITS
        return func(*args, **(kwargs or {}))


@every_reduction
def test_number_of_kernels_does_not_depend_on_the_number_of_groups(name: str, double: TensorFactory) -> None:
    counts = []
    for count in (2, 50):
        values = double.randn(100).requires_grad_()
        groups = torch.arange(100, device=values.device) % count
        with Operators() as operators:
            REDUCTIONS[name][0](values, groups, count).sum().backward()
        assert operators.waits == 0
        counts.append(operators.count)
    assert counts[0] == counts[1]
