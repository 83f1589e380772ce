"""The arithmetic of running sums: several sums, rescaling, large, narrow and sparse gradients."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from gradhooks.engine.flat_sums import FLAT_BYTES
from gradhooks.engine.gradient_sums import add_into, all_finite, weighted_sum, zero_, zeros_like_gradient
from gradhooks.engine.parameter_hooks import ParameterHooks
from gradhooks.engine.running_sums import HOOKED_BYTES, RunningSums

LARGE = HOOKED_BYTES // 4
Step = tuple[int, Sequence[float]]


def leaves_of(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return a small leaf, a large one and one that few backwards reach."""
    return [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (3, LARGE, 2)]


def run_backward(hooks: ParameterHooks, values: Sequence[float | None]) -> None:
    """Run a backward whose gradients are constant; None for a leaf that it does not reach."""
    terms = [value * leaf.sum() for leaf, value in zip(hooks.leaves, values, strict=True) if value is not None]
    hooks.intercepting = True
    torch.stack(terms).sum().backward()
    hooks.intercepting = False


def assert_sums(sums: RunningSums, expected: Sequence[Sequence[float | None]]) -> None:
    found = [[None if total is None else total.double() for total in totals] for totals in sums.take()]
    assert len(found) == len(expected)
    for totals, numbers in zip(found, expected, strict=True):
        for total, number in zip(totals, numbers, strict=True):
            assert (total is None) == (number is None)
            if total is not None and number is not None:
                torch.testing.assert_close(total, torch.full_like(total, number))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_backward_enters_its_sums(dtype: torch.dtype) -> None:
    hooks = ParameterHooks(leaves_of(dtype))
    sums = RunningSums(hooks, count=4)
    run_backward(hooks, [1, 2, None])  # to sum 0, the first
    sums.add_to(3)
    run_backward(hooks, [4, 8, 16])
    run_backward(hooks, [4, 8, None])
    with sums.fold_into(1, [1.0, 0.5]):
        run_backward(hooks, [32, 64, None])
    with sums.fold_into(1, [1.0, 0.0]):
        run_backward(hooks, [2, 2, 2])
    with sums.fold_into(1, [1.0, -2.0]):
        run_backward(hooks, [1, 1, None])
    sums.add_to(1)
    run_backward(hooks, [100, 100, 100])
    sums.add_to(0)
    run_backward(hooks, [1, 1, None])
    assert_sums(sums, [[2, 3, None], [135, 167, 102], [14, 30, None], [8, 16, 16]])
    assert all(leaf.grad is None and not leaf._post_accumulate_grad_hooks for leaf in hooks.leaves)


def test_sums_are_float32_for_narrow_leaves() -> None:
    hooks = ParameterHooks(leaves_of(torch.bfloat16))
    sums = RunningSums(hooks, count=2)
    for _ in range(1000):
        run_backward(hooks, [1, 1, 1])
    with sums.fold_into(1, [1.0]):
        run_backward(hooks, [1, 1, 1])
    assert {total.dtype for totals in sums.take() for total in totals if total is not None} == {torch.float32}


def test_sums_that_begin_with_the_same_factor_are_separate() -> None:
    hooks = ParameterHooks(leaves_of())
    sums = RunningSums(hooks, count=2)
    for factors in ([1.0, 1.0], [1.0, 3.0]):
        with sums.fold_into(0, factors):
            run_backward(hooks, [1, 1, 1])
    assert_sums(sums, [[2, 2, 2], [4, 4, 4]])


def test_small_leaves_are_summed_in_blocks_for_several_groups() -> None:
    """Sums 0 and 1 are of one group, 2 and 3 of another one, which begins later and does not reach every leaf."""
    shapes = [(3,), (2, 2), (), (5,), (FLAT_BYTES,)]
    hooks = ParameterHooks([nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes])
    sums = RunningSums(hooks, count=4)
    expected: list[list[float | None]] = [[None] * len(shapes) for _ in range(4)]
    for first, factor, values in (
        (0, 3.0, [1, 2, 3, None, 4]),
        (0, 5.0, [1, None, 1, None, 1]),
        (0, 0.0, [7, 7, 7, 7, 7]),
        (2, -2.0, [None, 1, None, 8, 2]),
        (0, 4.0, [2, 2, 2, 2, 2]),
        (2, 6.0, [1, None, 2, None, 1]),
    ):
        with sums.fold_into(first, [1.0, factor]):
            run_backward(hooks, values)
        for k, share in ((first, 1.0), (first + 1, factor)):
            for index, value in enumerate(values):
                if value is not None and share:
                    expected[k][index] = (expected[k][index] or 0.0) + share * value
    sums.rescale(0, 0.5, [2.0])
    expected[1] = [_sum(second, 2.0, first) for first, second in zip(expected[0], expected[1], strict=True)]
    expected[:2] = [[None if each is None else 0.5 * each for each in row] for row in expected[:2]]
    expected[2][2], expected[3][2] = 2.0, 12.0  # the other group has reached it
    assert_sums(sums, expected)
    assert all(leaf.grad is None for leaf in hooks.leaves)


def _sum(total: float | None, factor: float, value: float | None) -> float | None:
    return total if value is None else (total or 0.0) + factor * value


def test_rescaling_adds_the_first_sum_and_multiplies() -> None:
    hooks = ParameterHooks(leaves_of())
    sums = RunningSums(hooks, count=5)
    run_backward(hooks, [7, 7, 7])
    with sums.fold_into(1, [1.0, 2.0, 0.0]):
        run_backward(hooks, [1, 2, None])
    sums.rescale(1, 0.5, [1.0, 1.0])
    with sums.fold_into(1, [1.0, 1.0, 1.0]):
        run_backward(hooks, [4, 4, 4])
    expected = [[7, 7, 7], [4.5, 5, 4], [5.5, 7, 4], [4.5, 5, 4], [None, None, None]]
    assert_sums(sums, expected)


def test_rescaling_by_zero_clears_what_is_not_finite() -> None:
    hooks = ParameterHooks(leaves_of())
    sums = RunningSums(hooks, count=2)
    with sums.fold_into(0, [1.0, 2.0]):
        run_backward(hooks, [torch.inf, torch.nan, None])
    sums.rescale(0, 0.0, [torch.inf])
    with sums.fold_into(0, [1.0, 2.0]):
        run_backward(hooks, [1, 1, None])
    assert_sums(sums, [[1, 1, None], [2, 2, None]])


def test_leaves_that_no_backward_has_reached() -> None:
    hooks = ParameterHooks(leaves_of())
    sums = RunningSums(hooks, count=3)
    assert sums.unreached() == {0, 1, 2}
    sums.add_to(1)
    run_backward(hooks, [1, None, None])
    assert sums.unreached() == {1, 2}
    with sums.fold_into(1, [1.0, 2.0]):
        run_backward(hooks, [None, 1, None])
    assert sums.unreached() == {2}
    sums.rescale(1, 0.0, [0.0])
    assert sums.unreached() == {2}


def test_closed_hooks_leave_nothing_behind() -> None:
    hooks = ParameterHooks(leaves_of(torch.bfloat16))
    for _ in range(5):
        with RunningSums(hooks, count=2) as sums, sums.fold_into(0, [1.0, 2.0]):
            run_backward(hooks, [1, 1, 1])
    assert hooks._registered == []


def test_a_weighted_sum_keeps_the_sums_unless_they_may_be_overwritten() -> None:
    def make() -> list[list[Tensor | None]]:
        sparse = torch.eye(3).to_sparse()
        return [
            [None, torch.ones(2), sparse],
            [torch.ones(2), torch.ones(2), None],
            [torch.ones(2), None, sparse.clone()],
        ]

    for overwrite in (False, True):
        sums = make()
        first, second, third = weighted_sum(sums, [2.0, 1.0, 3.0], overwrite=overwrite)
        torch.testing.assert_close(first, torch.full((2,), 4.0))
        torch.testing.assert_close(second, torch.full((2,), 3.0))
        assert third is not None
        assert third.is_sparse
        torch.testing.assert_close(third.to_dense(), 5 * torch.eye(3))
        if not overwrite:
            for row, unchanged in zip(sums, make(), strict=True):
                for one, other in zip(row, unchanged, strict=True):
                    assert (one is None) == (other is None)
                    if one is not None and other is not None:
                        torch.testing.assert_close(one, other)


def test_adding_with_a_copy_leaves_the_gradient_alone() -> None:
    totals: list[Tensor | None] = [None]
    gradient = torch.ones(2)
    add_into(totals, [gradient], copy=True)
    add_into(totals, [gradient])
    assert gradient.tolist() == [1, 1]
    assert totals[0] is not None
    assert totals[0].tolist() == [2, 2]


def test_a_dense_gradient_is_added_to_a_sparse_sum() -> None:
    totals: list[Tensor | None] = [torch.eye(3).to_sparse()]
    gradient = torch.ones(3, 3)
    add_into(totals, [gradient], 2.0)
    assert totals[0] is not None
    torch.testing.assert_close(totals[0], torch.eye(3) + 2)
    assert gradient.sum() == 9


def test_zeros_have_the_layout_of_the_gradient() -> None:
    gradient = torch.sparse_coo_tensor(
        torch.tensor([[1, 1, 3]]), torch.full((3, 2), torch.nan), (5, 2), check_invariants=True
    )
    zeros = zeros_like_gradient(gradient, torch.float64)
    assert zeros.is_sparse
    assert zeros.dtype == torch.float64
    assert zeros.coalesce().indices().tolist() == [[1, 3]]
    assert zeros.to_dense().count_nonzero() == 0
    zero_([gradient, None])
    assert gradient.to_dense().count_nonzero() == 0


def test_all_finite_looks_at_every_entry() -> None:
    fine: list[Tensor | None] = [torch.ones(2), None, torch.eye(2).to_sparse()]
    assert all_finite([fine, fine])
    for bad in (torch.tensor([1.0, torch.inf]), (torch.eye(2) * torch.nan).to_sparse()):
        assert not all_finite([fine, [None, bad, None]])
