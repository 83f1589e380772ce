"""The conformance kit refuses what is broken, and names it."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from broken_accumulators import BROKEN_ACCUMULATORS
from broken_combinations import BROKEN_COMBINATIONS, DetachesWeights, FirstPose, WrongSign

import gradhooks
from gradhooks.accumulators import Accumulator
from gradhooks.errors import GradhooksWarning
from gradhooks.testing import (
    ACCUMULATOR_CHECKS,
    COMBINATION_CHECKS,
    ConformanceError,
    check_accumulator,
    check_combination,
    full_graph,
    parametrize_with_checks,
    results,
)

CHECKS = {check.__name__: check for check in (*COMBINATION_CHECKS, *ACCUMULATOR_CHECKS)}


@pytest.mark.parametrize(
    ("broken", "check", "message"), BROKEN_COMBINATIONS, ids=[broken.__name__ for broken, _, _ in BROKEN_COMBINATIONS]
)
def test_a_broken_combination_is_refused(broken: type[gradhooks.Combination], check: str, message: str) -> None:
    with pytest.raises(ConformanceError, match=rf"(?s)^{check}: {broken.__name__} .*{message}"):
        CHECKS[check](broken())


@pytest.mark.parametrize(("broken", "check", "message"), BROKEN_ACCUMULATORS)
def test_a_broken_accumulator_is_refused(broken: Accumulator, check: str, message: str) -> None:
    with pytest.raises(ConformanceError, match=rf"(?s)^{check}: .*({message})"):
        CHECKS[check](broken)


def test_every_check_can_fail() -> None:
    refused = {check for _, check, _ in (*BROKEN_COMBINATIONS, *BROKEN_ACCUMULATORS)}
    assert refused == set(CHECKS)


class BestFirst(FirstPose):
    expected_failures: ClassVar[dict[str, str]] = {"check_order_of_poses": "the poses come sorted, the best one first"}


@parametrize_with_checks([gradhooks.combinations.Boltzmann(learnable=True), BestFirst()])
def test_declared_failures_are_strict_xfails(plugin: Any, check: Callable[[Any], None]) -> None:
    check(plugin)


def test_what_is_marked_for_pytest() -> None:
    parameters = parametrize_with_checks(["min", BestFirst()]).args[1]
    assert [parameter.id for parameter in parameters][::12] == [
        "min-check_result_shape",
        "BestFirst-check_result_shape",
    ]
    (marked,) = [parameter for parameter in parameters if parameter.marks]
    assert marked.id == "BestFirst-check_order_of_poses"
    assert marked.marks[0].kwargs["strict"]
    assert marked.marks[0].kwargs["reason"].startswith("the poses come sorted")


def test_declared_failures_in_results() -> None:
    states = {result.check: result.state for result in results(BestFirst())}
    assert states.pop("check_order_of_poses") == "expected failure"
    assert set(states.values()) == {"passed"}
    check_combination(BestFirst())


def test_a_declared_failure_that_passes_is_refused() -> None:
    reasons = {"check_one_pose": "once upon a time"}
    with pytest.raises(ConformanceError, match=r"check_one_pose: Mean passes, .* \(once upon a time\); drop that"):
        check_combination("mean", expected_failures=reasons)


@pytest.mark.parametrize("reasons", [{"check_nothing": "why"}, {"check_one_pose": ""}])
def test_a_declared_failure_must_exist_and_have_a_reason(reasons: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"must be one of check_result_shape, .* with a reason"):
        check_combination("mean", expected_failures=reasons)


def test_all_failures_are_reported_together() -> None:
    with pytest.raises(ConformanceError, match=r"(?s)^\d of 12 checks failed.*check_coefficients: DetachesWeights"):
        check_combination(DetachesWeights())
    with pytest.raises(ConformanceError, match=r"(?s)^\d of 7 checks failed\ncheck_every_loss"):
        check_accumulator(BROKEN_ACCUMULATORS[0][0])


def test_a_wrong_declaration_fails_the_kit_alone_and_trains_right() -> None:
    states = {result.check: result.state for result in results(WrongSign())}
    assert states.pop("check_stream_declaration") == "failed"
    assert set(states.values()) == {"passed"}

    poses = torch.randn(6, 3, dtype=torch.float64)
    model, twin = (torch.nn.Linear(3, 1, dtype=torch.float64) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    with pytest.warns(GradhooksWarning, match="combination WrongSign: its stream_weights do not explain"):
        gradhooks.MultiPose(model, WrongSign(), accumulator="stream")(poses).combined.sum().backward()
    full_graph(twin, poses, WrongSign()).combined.sum().backward()
    torch.testing.assert_close(model.weight.grad, twin.weight.grad, rtol=1e-12, atol=1e-12)


def total(predictions: torch.Tensor) -> torch.Tensor:
    return predictions.sum(0)


def test_any_callable_can_be_proved() -> None:
    check_combination(total)


class Positive(gradhooks.Combination):
    """The geometric mean, which has its own domain and needs an argument."""

    expected_failures: ClassVar[dict[str, str]] = {"check_extreme_values": "the predictions must be positive"}

    def forward(self, predictions: torch.Tensor, *, weights: torch.Tensor) -> torch.Tensor:
        return ((weights * predictions.log()).sum(0) / weights.sum()).exp()

    def stream_weights(self, predictions: torch.Tensor, *, weights: torch.Tensor) -> gradhooks.StreamWeights:
        return gradhooks.StreamWeights(weights.log() - predictions.log())

    def example(self, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.rand(count) + 0.5, {"weights": torch.rand(count) + 0.5}


def test_an_example_gives_the_domain_and_the_arguments() -> None:
    check_combination(Positive())


def test_a_check_leaves_the_random_state_and_the_plugin_as_they_were() -> None:
    combination = gradhooks.combinations.Boltzmann(learnable=True)
    state = torch.get_rng_state()
    check_combination(combination)
    assert torch.equal(state, torch.get_rng_state())
    assert combination.log_temperature.grad is None
    assert combination.log_temperature.dtype == torch.float32
