"""The conformance kit refuses broken plugins, names the check, and reports expected failures."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from broken_accumulators import BROKEN_ACCUMULATORS
from broken_combinations import BROKEN_COMBINATIONS, DetachesWeights, FirstPose, WrongSign

import gradhooks
from gradhooks import registry
from gradhooks.accumulators import Accumulator
from gradhooks.accumulators.declaration_warning import forget_warnings
from gradhooks.errors import GradhooksWarning, PluginError
from gradhooks.testing import (
    ACCUMULATOR_CHECKS,
    COMBINATION_CHECKS,
    ConformanceError,
    check_accumulator,
    check_combination,
    create_example,
    full_graph,
    parametrize_with_checks,
    results,
)

CHECKS = {check.__name__: check for check in (*COMBINATION_CHECKS, *ACCUMULATOR_CHECKS)}


@pytest.mark.parametrize(
    ("broken", "check", "message"), BROKEN_COMBINATIONS, ids=[broken.__name__ for broken, _, _ in BROKEN_COMBINATIONS]
)
def test_broken_combination_is_refused(broken: type[gradhooks.Combination], check: str, message: str) -> None:
    with pytest.raises(ConformanceError, match=rf"(?s)^{check}: {broken.__name__} .*{message}"):
        CHECKS[check](broken())


@pytest.mark.parametrize(("broken", "check", "message"), BROKEN_ACCUMULATORS.values(), ids=BROKEN_ACCUMULATORS)
def test_broken_accumulator_is_refused(broken: Accumulator, check: str, message: str) -> None:
    with pytest.raises(ConformanceError, match=rf"(?s)^{check}: .*({message})"):
        CHECKS[check](broken)


def test_every_check_refuses_a_broken_plugin() -> None:
    refused = {check for _, check, _ in (*BROKEN_COMBINATIONS, *BROKEN_ACCUMULATORS.values())}
    assert refused == set(CHECKS)


class BestFirst(FirstPose):
    expected_failures: ClassVar[dict[str, str]] = {"check_order_of_poses": "the poses are sorted, the best one first"}


@parametrize_with_checks([gradhooks.combinations.Boltzmann(learnable=True), BestFirst()])
def test_expected_failures_are_strict_xfails(plugin: Any, check: Callable[[Any], None]) -> None:
    check(plugin)


def test_ids_and_marks_of_the_parameters() -> None:
    parameters = parametrize_with_checks(["min", BestFirst()]).args[1]
    assert [parameter.id for parameter in parameters][::15] == [
        "min-check_result_shape",
        "BestFirst-check_result_shape",
    ]
    (marked,) = [parameter for parameter in parameters if parameter.marks]
    assert marked.id == "BestFirst-check_order_of_poses"
    assert marked.marks[0].kwargs["strict"]
    assert marked.marks[0].kwargs["reason"].startswith("the poses are sorted")


def test_expected_failures_in_results() -> None:
    states = {result.check: result.state for result in results(BestFirst())}
    assert states.pop("check_order_of_poses") == "expected failure"
    assert set(states.values()) == {"passed"}
    check_combination(BestFirst())


def test_results_of_a_combination_and_of_an_accumulator() -> None:
    for plugins, name, checks in (
        (registry.combinations, "mean", COMBINATION_CHECKS),
        (registry.accumulators, "recompute", ACCUMULATOR_CHECKS),
    ):
        outcomes = list(results(create_example(plugins, name)))
        assert [result.check for result in outcomes] == [check.__name__ for check in checks]
        assert all(result.good for result in outcomes)


def test_unexpected_pass_is_refused() -> None:
    reasons = {"check_one_pose": "the reason"}
    with pytest.raises(ConformanceError, match=r"check_one_pose: Mean passes, .* \(the reason\); remove this check"):
        check_combination("mean", expected_failures=reasons)


@pytest.mark.parametrize("reasons", [{"check_nothing": "why"}, {"check_one_pose": ""}])
def test_expected_failure_needs_a_known_check_and_a_reason(reasons: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"must be one of check_result_shape, .* with a reason"):
        check_combination("mean", expected_failures=reasons)


def test_all_failures_are_reported_together() -> None:
    with pytest.raises(ConformanceError, match=r"(?s)^\d of 15 checks failed.*check_coefficients: DetachesWeights"):
        check_combination(DetachesWeights())
    with pytest.raises(ConformanceError, match=r"(?s)^\d of 7 checks failed\ncheck_every_loss"):
        check_accumulator(BROKEN_ACCUMULATORS["doubled"][0])


def test_wrong_declaration_fails_one_check_and_trains_with_exact_gradients() -> None:
    states = {result.check: result.state for result in results(WrongSign())}
    assert states.pop("check_stream_declaration") == "failed"
    assert set(states.values()) == {"passed"}

    forget_warnings()
    poses = torch.randn(6, 3, dtype=torch.float64)
    model, expected_model = (torch.nn.Linear(3, 1, dtype=torch.float64) for _ in range(2))
    expected_model.load_state_dict(model.state_dict())
    with pytest.warns(GradhooksWarning, match=r"combination WrongSign.* stream_weights do not explain"):
        gradhooks.MultiPose(model, WrongSign(), accumulator="stream")(poses).combined.sum().backward()
    full_graph(expected_model, poses, WrongSign()).combined.sum().backward()
    torch.testing.assert_close(model.weight.grad, expected_model.weight.grad, rtol=1e-12, atol=1e-12)


def total(predictions: torch.Tensor) -> torch.Tensor:
    return predictions.sum(0)


def test_any_callable_can_be_checked() -> None:
    check_combination(total)


class GeometricMean(gradhooks.Combination):
    """A combination of positive numbers only, with a required argument of the call."""

    expected_failures: ClassVar[dict[str, str]] = {"check_extreme_values": "the predictions must be positive"}

    def forward(self, predictions: torch.Tensor, *, weights: torch.Tensor) -> torch.Tensor:
        return ((weights * predictions.log()).sum(0) / weights.sum()).exp()

    def stream_weights(self, predictions: torch.Tensor, *, weights: torch.Tensor) -> gradhooks.StreamWeights:
        return gradhooks.StreamWeights(weights.log() - predictions.log())

    def example(self, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.rand(count) + 0.5, {"weights": torch.rand(count) + 0.5}


def test_example_defines_the_domain_and_the_arguments() -> None:
    check_combination(GeometricMean())


class Scaled(gradhooks.Combination):
    example_options: ClassVar[dict[str, float]] = {"scale": 2.0}

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, predictions: torch.Tensor) -> torch.Tensor:
        return self.scale * predictions.mean(0)


def test_example_options_are_passed_when_a_combination_is_created_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.combinations, "_registered", {"scaled": Scaled})
    assert create_example(registry.combinations, "scaled").scale == 2.0
    check_combination("scaled")
    monkeypatch.setattr(Scaled, "example_options", {})
    with pytest.raises(PluginError, match=r"combination 'scaled' .*scale"):
        check_combination("scaled")


def test_checks_preserve_the_random_state_and_the_plugin() -> None:
    combination = gradhooks.combinations.Boltzmann(learnable=True)
    state = torch.get_rng_state()
    check_combination(combination)
    assert torch.equal(state, torch.get_rng_state())
    assert combination.log_temperature.grad is None
    assert combination.log_temperature.dtype == torch.float32
