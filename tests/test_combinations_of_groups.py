"""Combinations of several groups: every built-in agrees with plain PyTorch on each group; `BoundCombination`."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from built_in_combinations import BUILT_IN, close, every_combination
from groups_of_poses import EMPTY, INDICES, one_by_one
from hypothesis import given
from hypothesis import strategies as st
from model_zoo import TensorFactory
from torch import Tensor, nn

from gradhooks import Combination
from gradhooks.combination import BoundCombination
from gradhooks.combinations import Boltzmann, Max, Mean, Min
from gradhooks.errors import CombinationError, PredictionError
from gradhooks.group_index import GroupIndex
from gradhooks.options import Nonfinite
from gradhooks.prediction import combine


def bound(combination: Any, index: list[int], count: int | None = None, **arguments: Any) -> BoundCombination:
    groups = GroupIndex(torch.tensor(index), max(index) + 1 if count is None else count)
    return BoundCombination(combination, len(index), arguments, groups)


def gradients(combined: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(combined, leaves, torch.ones_like(combined).cumsum(0), materialize_grads=True)


def compare_with_each_group(combination: Combination, predictions: Tensor, index: list[int], **rows: Tensor) -> None:
    """Compare results and derivatives with those of `forward` on each group."""
    combination.to(predictions)
    leaf, groups = predictions.clone().requires_grad_(), torch.tensor(index, device=predictions.device)
    combined = bound(combination, index, **rows)(leaf)
    expected = torch.stack(
        [
            combination(leaf[groups == number], **{name: row[groups == number] for name, row in rows.items()})
            for number in range(max(index) + 1)
        ]
    )
    leaves = (leaf, *combination.parameters(), *(row for row in rows.values() if row.requires_grad))
    result = (combined, *gradients(combined, *leaves))
    torch.testing.assert_close(result, (expected, *gradients(expected, *leaves)), rtol=1e-12, atol=1e-12)


# -- the built-in combinations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("index", INDICES, ids=str)
@every_combination
def test_groups(name: str, index: list[int], shape: tuple[int, ...], double: TensorFactory) -> None:
    compare_with_each_group(BUILT_IN[name](), 3 * double.randn(len(index), *shape), index)


@every_combination
@given(data=st.data())
def test_random_groups(name: str, data: Any) -> None:
    groups = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    index = torch.tensor(groups).unique(return_inverse=True)[1].tolist()  # without gaps
    numbers = data.draw(st.lists(st.floats(-50, 50), min_size=len(index), max_size=len(index)))
    compare_with_each_group(BUILT_IN[name](), torch.tensor(numbers, dtype=torch.float64), index)


@pytest.mark.parametrize("kind", ["numbers", "mask", "learnable"])
@every_combination
def test_weights_of_the_poses_of_groups(name: str, kind: str, double: TensorFactory) -> None:
    index = INDICES[-1]
    weights = double.randn(len(index)).exp()
    if kind == "mask":
        weights = torch.tensor([1, 1, 0, 0, 1, 1, 0, 1, 1, 1], device=double.device).bool()
    elif kind == "learnable":
        weights.requires_grad_()
    compare_with_each_group(BUILT_IN[name](), double.randn(len(index)), index, weights=weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_combination
def test_dtype_of_the_result(name: str, dtype: torch.dtype, device: torch.device) -> None:
    predictions = torch.linspace(-1, 1, 10, dtype=dtype, device=device)
    combination = BUILT_IN[name]().to(device)
    combined = bound(combination, INDICES[-1])(predictions)
    expected = bound(combination, INDICES[-1])(predictions.double())
    assert combined.dtype == torch.float32
    close(combined.double(), expected, 1e-5)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@every_combination
def test_a_prediction_that_is_not_finite(name: str, number: float, double: TensorFactory) -> None:
    predictions = double.randn(10)
    predictions[1] = number
    index, combination = torch.tensor(INDICES[-1], device=double.device), BUILT_IN[name]().to(double.device)
    leaf = predictions.requires_grad_()
    combined = bound(combination, INDICES[-1])(leaf)
    expected = one_by_one(combination, leaf, index, 4)
    result = (combined, *gradients(combined, leaf))
    torch.testing.assert_close(result, (expected, *gradients(expected, leaf)), equal_nan=True, rtol=1e-12, atol=1e-12)
    assert result[1][index != index[1]].isfinite().all()


@pytest.mark.parametrize("combination", [Mean(), Min(), Max(normalize=True), Boltzmann()], ids=repr)
def test_weights_of_a_group_that_are_all_zero(combination: Combination) -> None:
    with pytest.raises(CombinationError, match=r"^group 1: all 2 weights are 0"):
        bound(combination, [1, 0, 1], weights=torch.tensor([0.0, 2.0, 0.0]))(torch.ones(3))
    with pytest.raises(CombinationError, match=r"^weights must not be negative or NaN, got -2"):
        bound(combination, [1, 0, 1], weights=torch.tensor([0.0, -2.0, 0.0]))(torch.ones(3))


# -- which method is called ------------------------------------------------------------------------------------------


class CountsCalls(Combination):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def forward(self, predictions: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        self.calls.append("forward")
        return (predictions + offset).sum(0)

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int, offset: Tensor | float = 0.0) -> Tensor:
        self.calls.append("forward_groups")
        return predictions.new_zeros(count).index_add(0, groups, predictions + offset)


class OtherForward(CountsCalls):
    def forward(self, predictions: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        return 2 * super().forward(predictions, offset)


class Plain:
    """No Combination, and no module."""

    def __call__(self, predictions: Tensor) -> Tensor:
        return predictions.sum(0)

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int) -> Tensor:
        return predictions.new_zeros(count).index_add(0, groups, predictions)


Y = torch.tensor([1.0, 2.0, 4.0, 8.0])
INDEX = [1, 0, 1, 0]


def test_forward_groups_is_called_once() -> None:
    combination = CountsCalls()
    assert bound(combination, INDEX)(Y).tolist() == [10, 5]
    assert combination.calls == ["forward_groups"]


def test_one_group_without_an_index_is_not_a_batch_of_one_group() -> None:
    combination = CountsCalls()
    assert BoundCombination(combination, 4)(Y).shape == ()
    assert bound(combination, [0, 0, 0, 0])(Y).shape == (1,)
    assert combination.calls == ["forward", "forward_groups"]


def test_an_inherited_forward_groups_does_not_replace_another_forward() -> None:
    combination = OtherForward()
    assert bound(combination, INDEX)(Y).tolist() == [20, 10]
    assert combination.calls == ["forward", "forward"]
    combination = CountsCalls()
    combination.forward = lambda predictions: predictions.prod(0)  # type: ignore[method-assign, assignment]
    assert bound(combination, INDEX)(Y).tolist() == [16, 4]


def test_hooks_of_a_combination_run_for_each_group() -> None:
    combination, seen = CountsCalls(), []
    handle = combination.register_forward_hook(lambda _module, _inputs, output: seen.append(output.item()))
    assert bound(combination, INDEX)(Y).tolist() == seen == [10, 5]
    handle.remove()
    bound(combination, INDEX)(Y)
    assert combination.calls == ["forward", "forward", "forward_groups"]


@pytest.mark.parametrize(
    "combination", [Plain(), lambda rows: rows.sum(0), torch.compile(CountsCalls(), backend="eager")]
)
def test_any_callable(combination: Callable[[Tensor], Tensor]) -> None:
    assert bound(combination, INDEX)(Y).tolist() == [10, 5]


def test_the_loop_of_the_base_class_cuts_arguments_by_group(double: TensorFactory) -> None:
    index = INDICES[-1]
    predictions, offset = double.randn(10), double.randn(10).requires_grad_()
    groups = torch.tensor(index, device=double.device)
    expected = 2 * one_by_one(lambda rows: rows.sum(0), predictions + offset, groups, 4)
    for combined in (
        bound(OtherForward(), index, offset=offset)(predictions),
        Combination.forward_groups(OtherForward(), predictions, groups, 4, offset=offset),
    ):
        close(combined, expected)
        (gradient,) = torch.autograd.grad(combined.sum(), offset)
        close(gradient, torch.full_like(offset, 2.0))


def test_results_that_differ_in_shape_are_refused() -> None:
    with pytest.raises(
        CombinationError, match=r"returned shape \(3,\) for group 1 of 3 poses; .* as \(1,\) for group 0"
    ):
        bound(nn.Identity(), [0, 1, 1, 1])(Y)
    with pytest.raises(CombinationError, match="returned None for group 0"):
        bound(lambda _: None, INDEX)(Y)


@pytest.mark.parametrize(
    ("result", "found"), [(torch.zeros(3), r"shape \(3,\)"), (torch.zeros(()), r"shape \(\)"), (1, "1")]
)
def test_a_result_without_a_row_for_each_group_is_refused(result: Any, found: str) -> None:
    combination = Plain()
    combination_class = type("Wrong", (Plain,), {"forward_groups": lambda *_: result})
    assert bound(combination, INDEX)(Y).shape == (2,)
    with pytest.raises(CombinationError, match=f"Wrong.forward_groups returned {found} for 2 groups"):
        bound(combination_class(), INDEX)(Y)


def test_the_backward_of_the_loop_is_linear_in_the_number_of_poses(double: TensorFactory) -> None:
    """Rows of 64 groups come from one sorted tensor, whose gradient is made once."""
    predictions = double.randn(256).requires_grad_()
    combined = bound(lambda rows: rows.sum(0), [*range(64)] * 4)(predictions)
    nodes, kinds = [combined.grad_fn], []
    while nodes:
        node = nodes.pop()
        if node is not None and node not in kinds:
            kinds.append(node)
            nodes.extend(parent for parent, _ in node.next_functions)
    assert sum("IndexSelect" in type(node).__name__ for node in kinds) == 1


# -- poses that are left out -----------------------------------------------------------------------------------------


class SumOrNothing(Combination):
    accepts_empty_groups = True

    def forward(self, predictions: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        return (predictions + offset).sum(0)


def test_selected_poses_of_groups() -> None:
    selected, offset = torch.tensor([True, False, True, True]), torch.tensor([10.0, 20.0, 30.0, 40.0])
    for combination in (CountsCalls(), OtherForward()):
        factor = 2 if isinstance(combination, OtherForward) else 1
        result = bound(combination, INDEX, offset=offset)(Y, selected)
        assert (result / factor).tolist() == [48, 45]


def test_an_argument_has_rows_per_pose_by_the_number_of_all_poses() -> None:
    """Three of four poses are left: a tensor of three numbers has no row per pose."""
    selected = torch.tensor([True, False, True, True])
    seen = []

    def combination(rows: Tensor, levels: Tensor) -> Tensor:
        seen.append(levels.tolist())
        return rows.sum(0)

    bound(combination, INDEX, levels=torch.tensor([1.0, 2.0, 3.0]))(Y, selected)
    assert seen == [[1, 2, 3], [1, 2, 3]]


def test_a_group_that_loses_all_its_poses() -> None:
    selected = torch.tensor([True, False, True, False])
    with pytest.raises(
        PredictionError, match=r"^group 0: none of its 2 predictions is finite, .* CountsCalls does not"
    ):
        bound(CountsCalls(), INDEX)(Y, selected)
    assert bound(SumOrNothing(), INDEX)(Y, selected).tolist() == [0, 5]


def test_an_argument_of_one_number_is_passed_to_each_group() -> None:
    offset = torch.tensor(1.0)
    for combination in (SumOrNothing(), CountsCalls()):
        assert bound(combination, INDEX, offset=offset)(Y).tolist() == [12, 7]


@pytest.mark.parametrize("nonfinite", ["drop", "propagate"])
def test_all_poses_of_all_groups_are_dropped(nonfinite: Nonfinite) -> None:
    predictions = torch.full((4,), math.nan)
    combined = combine(bound(SumOrNothing(), INDEX), predictions, predictions, nonfinite).combined
    expected = [0.0, 0.0] if nonfinite == "drop" else [math.nan, math.nan]
    torch.testing.assert_close(combined, torch.tensor(expected), equal_nan=True)


def test_empty_groups() -> None:
    assert bound(SumOrNothing(), EMPTY, count=4)(Y[:3]).tolist() == [2, 0, 5, 0]
    assert bound(SumOrNothing(), EMPTY).accepts_empty_groups
    assert not bound(Mean(), EMPTY).accepts_empty_groups
    assert not bound(len, EMPTY).accepts_empty_groups


# -- no combination, declarations ------------------------------------------------------------------------------------


def test_no_combination() -> None:
    batch = bound(None, INDEX)
    assert (batch.name, batch.accepts_empty_groups, batch.combine_gradients) == ("none", True, None)
    assert batch.declare(Y, 0) is None
    half = Y.bfloat16()
    assert batch(half) is half


def test_a_declaration_is_made_for_each_pose(double: TensorFactory) -> None:
    weights = double.randn(4).exp()
    batch, predictions = bound(Boltzmann(0.7), INDEX, weights=weights), Y.to(double.device)
    whole, part = batch.declare(predictions, 0), batch.declare(predictions[1:3], 1)
    assert whole is not None
    assert part is not None
    for declared, expected in zip(part, whole, strict=True):
        close(declared, expected[1:3])
