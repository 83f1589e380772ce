from collections.abc import Callable
from typing import Any

import gradhooks_robust
import pytest
import torch
from torch import Tensor

from gradhooks import GradientCombination, MultiPose
from gradhooks.errors import CombinationError
from gradhooks.testing import full_graph, parametrize_with_checks

torch.set_num_threads(1)

ONES = torch.ones(3, dtype=torch.float64)


@parametrize_with_checks(
    [
        "clipped_gradients",
        "median_gradient",
        "conflict_free_gradient",
        gradhooks_robust.ClippedGradients("boltzmann", max_norm=0.01),
    ]
)
def test_conformance(plugin: Any, check: Callable[[Any], None]) -> None:
    check(plugin)


def combined(combination: GradientCombination, contributions: list[list[float]]) -> list[float]:
    """Combine contributions to the gradients of two parameters of one number each."""
    rows = torch.tensor(contributions, dtype=torch.float64)
    named = {"a": rows[:, :1], "b": rows[:, 1]}
    result = combination.combine_gradients(named, torch.zeros(len(rows)), torch.ones(len(rows)).double())
    return [result["a"].item(), result["b"].item()]


def test_norm_is_over_all_parameters_together() -> None:
    result = combined(gradhooks_robust.ClippedGradients(max_norm=2.5), [[3.0, 4.0], [0.0, 1.0]])
    assert result == pytest.approx([1.5, 3.0])


def test_median_ignores_an_outlier() -> None:
    assert combined(gradhooks_robust.MedianGradient(), [[1.0, 5.0], [2.0, 6.0], [1e9, -1e9]]) == [6.0, 15.0]


def test_median_of_an_even_number() -> None:
    assert combined(gradhooks_robust.MedianGradient(), [[1.0, 0.0], [2.0, 0.0]]) == [3.0, 0.0]


def test_conflicting_contributions_are_projected() -> None:
    # (1, 0) against (-1, 1): the first becomes (1/2, 1/2), the second (0, 1).
    result = combined(gradhooks_robust.ConflictFreeGradient(), [[1.0, 0.0], [-1.0, 1.0]])
    assert result == pytest.approx([0.5, 1.5])


def test_projections_agree_with_explicit_vectors() -> None:
    rows = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    combination = gradhooks_robust.ConflictFreeGradient(seed=4)
    expected = torch.zeros(2, dtype=torch.float64)
    for own, order in zip(rows, gradhooks_robust.ConflictFreeGradient(seed=4)._random_orders(5), strict=True):
        changed = own.clone()
        for other in order:
            opposing = changed @ rows[other]
            if rows[other] is not own and not torch.equal(rows[other], own) and opposing < 0:
                changed = changed - opposing / (rows[other] @ rows[other]) * rows[other]
        expected += changed
    assert combined(combination, rows.tolist()) == pytest.approx(expected.tolist())


@pytest.mark.parametrize(
    "combination",
    [gradhooks_robust.ClippedGradients(max_norm=1e9), gradhooks_robust.ConflictFreeGradient()],
    ids=["clipping nothing", "no conflicts"],
)
def test_gradients_without_clipping_or_conflicts_agree_with_the_full_graph(combination: GradientCombination) -> None:
    def trained(predict: Callable[[torch.nn.Module, list[Tensor]], Any]) -> Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1).double()
        poses = [ONES * (1 + torch.rand(())) for _ in range(6)]
        predict(model, poses).combined.sum().backward()
        assert model.weight.grad is not None
        return model.weight.grad

    result = trained(lambda model, poses: MultiPose(model, combination)(poses))
    torch.testing.assert_close(result, trained(lambda model, poses: full_graph(model, poses, combination)))


def test_invalid_options() -> None:
    with pytest.raises(CombinationError, match="max_norm must be positive"):
        gradhooks_robust.ClippedGradients(max_norm=0.0)
