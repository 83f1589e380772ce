"""Every way to call the outer backward of a group gives what it gives for the full graph."""

from collections.abc import Callable

import pytest
import torch
from backward_cases import (
    CASE_COMBINATIONS,
    CASE_MODELS,
    BackwardCase,
    assert_gradients_of_full_graph,
)
from model_state import unchanged
from model_zoo import TensorFactory
from torch import Tensor
from training_reference import (
    ACCUMULATORS,
    ACCUMULATORS_AND_PLAIN,
    CONCRETE_ACCUMULATORS,
    Gradients,
    assert_same_gradients,
    case_label,
    loss_on_both,
    loss_on_combined,
)

from gradhooks import MultiPosePrediction


@pytest.mark.parametrize("combination", CASE_COMBINATIONS)
@pytest.mark.parametrize("name", CASE_MODELS)
class TestOneGroup:
    def test_existing_gradients_are_added_to(self, name: str, combination: str, double: TensorFactory) -> None:
        def train(case: BackwardCase) -> None:
            for leaf in case.leaves.values():
                leaf.grad = torch.full_like(leaf, 7.0)
            loss_on_both(case.predict()).backward()

        assert_gradients_of_full_graph(train, name, combination, double, CONCRETE_ACCUMULATORS)

    def test_a_scaled_loss_scales_the_gradients(self, name: str, combination: str, double: TensorFactory) -> None:
        def train_scaled(case: BackwardCase) -> None:
            (loss_on_both(case.predict()) * 2.0**16).backward()

        def train(case: BackwardCase) -> None:
            loss_on_both(case.predict()).backward()

        scaled_cases = assert_gradients_of_full_graph(train_scaled, name, combination, double, CONCRETE_ACCUMULATORS)
        cases = assert_gradients_of_full_graph(train, name, combination, double, CONCRETE_ACCUMULATORS)
        for accumulator, case in cases.items():
            scaled = scaled_cases[accumulator].gradients
            unscaled = {leaf: None if each is None else each / 2.0**16 for leaf, each in scaled.items()}
            with case_label(accumulator):
                assert_same_gradients(unscaled, case.gradients)

    def test_three_times_with_retain_graph(self, name: str, combination: str, double: TensorFactory) -> None:
        def train(case: BackwardCase) -> None:
            loss = loss_on_both(case.predict())
            loss.backward(retain_graph=True)
            loss.backward(retain_graph=True)
            loss.backward()

        assert_gradients_of_full_graph(train, name, combination, double)

    def test_two_losses_one_after_the_other(self, name: str, combination: str, double: TensorFactory) -> None:
        def train(case: BackwardCase) -> None:
            prediction = case.predict()
            prediction.per_pose.square().sum().backward(retain_graph=True)
            loss_on_combined(prediction).backward()

        assert_gradients_of_full_graph(train, name, combination, double)

    def test_coefficients_of_one_with_retain_graph(self, name: str, combination: str, double: TensorFactory) -> None:
        def train(case: BackwardCase) -> None:  # nothing is scaled, so a sum could be returned without a copy
            prediction = case.predict()
            prediction.per_pose.sum().backward(retain_graph=True)
            prediction.per_pose.sum().backward()

        assert_gradients_of_full_graph(train, name, combination, double)

    def test_a_second_backward_without_retain_graph_is_refused(
        self, name: str, combination: str, double: TensorFactory
    ) -> None:
        for accumulator in ACCUMULATORS_AND_PLAIN:
            case = BackwardCase(name, combination, accumulator, double)
            combined, predictions = case.predict()
            predictions.sum().backward()
            with (
                case_label(accumulator),
                unchanged(case.model_case.model),
                pytest.raises(RuntimeError, match="backward through the graph a second"),
            ):
                combined.sum().backward()

    @pytest.mark.parametrize("every", [1, 2], ids=["all leaves", "every other leaf"])
    def test_autograd_grad_as_the_outer_call(
        self, name: str, combination: str, every: int, double: TensorFactory
    ) -> None:
        def gradients(accumulator: str | None) -> Gradients:
            case = BackwardCase(name, combination, accumulator, double)
            chosen = dict(list(case.leaves.items())[every - 1 :: every])
            result = torch.autograd.grad(loss_on_both(case.predict()), list(chosen.values()), allow_unused=True)
            assert all(leaf.grad is None for leaf in case.leaves.values())
            return dict(zip(chosen, result, strict=True))

        expected = gradients(None)
        for accumulator in CONCRETE_ACCUMULATORS:
            with case_label(accumulator):
                assert_same_gradients(gradients(accumulator), expected)

    def test_backward_into_some_leaves(self, name: str, combination: str, double: TensorFactory) -> None:
        def train(case: BackwardCase) -> None:
            loss_on_both(case.predict()).backward(inputs=list(case.leaves.values())[1::2])

        assert_gradients_of_full_graph(train, name, combination, double, CONCRETE_ACCUMULATORS)

    def test_backward_of_tensors_with_given_gradients(self, name: str, combination: str, double: TensorFactory) -> None:
        def train(case: BackwardCase) -> None:
            combined, predictions = case.predict(4)
            combined.backward(torch.full_like(combined, -2.0), retain_graph=True)
            predictions.backward(torch.arange(4.0).to(predictions).view_as(predictions))

        assert_gradients_of_full_graph(train, name, combination, double)

    def test_a_gradient_of_zero(self, name: str, combination: str, double: TensorFactory) -> None:
        def train(case: BackwardCase) -> None:
            (0.0 * loss_on_both(case.predict())).backward()

        assert_gradients_of_full_graph(train, name, combination, double, CONCRETE_ACCUMULATORS)


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(4, 5), slice(0, 5, 2), slice(5, 5)], ids=str)
def test_a_loss_on_some_poses_only(chosen: slice, double: TensorFactory) -> None:
    def train(case: BackwardCase) -> None:
        case.predict(5).per_pose[chosen].square().sum().backward()

    cases = assert_gradients_of_full_graph(train, "plain_mlp", "boltzmann", double)
    for accumulator in ("recompute", "auto"):
        scorer = cases[accumulator].scorer
        assert scorer is not None
        assert scorer.report.recomputed == len(range(5)[chosen]), accumulator
        assert scorer.report.skipped == 5 - len(range(5)[chosen]), accumulator


def test_a_loss_on_the_poses_with_a_detached_combination(double: TensorFactory) -> None:
    def train(case: BackwardCase) -> None:
        combined, predictions = case.predict(5)
        (predictions - combined.detach()).square().sum().backward()

    assert_gradients_of_full_graph(train, "plain_mlp", "boltzmann learnable", double)


def test_a_loss_on_the_combination_with_detached_poses(double: TensorFactory) -> None:
    def train(case: BackwardCase) -> None:
        combined, predictions = case.predict(5)
        (predictions.detach() - combined).square().sum().backward()

    cases = assert_gradients_of_full_graph(train, "plain_mlp", "boltzmann learnable", double)
    for accumulator in ACCUMULATORS:
        scorer = cases[accumulator].scorer
        assert scorer is not None
        assert scorer.report.recomputed == (5 if scorer.report.accumulator == "recompute" else 0), accumulator


def test_predictions_may_be_changed_in_place(double: TensorFactory) -> None:
    def train(case: BackwardCase) -> None:
        combined, predictions = case.predict(5)
        if case.scorer is None:  # the combination reads the same tensor, so autograd refuses to change it
            combined, predictions = combined.clone(), predictions.clone()
        predictions.mul_(3).add_(1)
        combined.add_(predictions.sum())
        (combined.sum() + predictions.square().sum()).backward()

    assert_gradients_of_full_graph(train, "plain_mlp", "boltzmann learnable", double)


@pytest.mark.parametrize("hooked", ["parameters", "encoder", "combined"])
def test_a_users_hook_that_is_not_linear(hooked: str, double: TensorFactory) -> None:
    calls: dict[str | None, int] = {}

    def train(case: BackwardCase) -> None:
        clamp = _counting_clamp(calls, case.accumulator)
        if hooked in {"parameters", "encoder"}:
            for name, leaf in case.leaves.items():
                if name.startswith("encoder") == (hooked == "encoder"):
                    leaf.register_hook(clamp)
        combined, predictions = case.predict(5)
        if hooked == "combined":
            combined.register_hook(clamp)
        (combined.square().sum() + predictions.square().sum()).backward()

    assert_gradients_of_full_graph(train, "shared_encoder_output", "boltzmann", double)
    assert list(calls) == [None, *ACCUMULATORS_AND_PLAIN]
    assert len(set(calls.values())) == 1


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_users_hook_on_the_predictions_runs_once(accumulator: str, double: TensorFactory) -> None:
    # In the full graph, the predictions are also the input of the combination: the gradients are not comparable.
    calls: dict[str | None, int] = {}
    case = BackwardCase("shared_encoder_output", "boltzmann", accumulator, double)
    combined, predictions = case.predict(5)
    predictions.register_hook(_counting_clamp(calls, accumulator))
    (combined.square().sum() + predictions.square().sum()).backward()
    assert calls == {accumulator: 1}


def _counting_clamp(calls: dict[str | None, int], key: str | None) -> Callable[[Tensor], Tensor]:
    def clamp(gradient: Tensor) -> Tensor:
        calls[key] = calls.get(key, 0) + 1
        return (10 * gradient).clamp(-0.01, 0.01)

    return clamp


@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
def test_hooks_after_the_accumulation_run_once(accumulator: str, double: TensorFactory) -> None:
    case = BackwardCase("tied_weights", "boltzmann", accumulator, double)
    calls: list[int] = []
    for index, leaf in enumerate(case.leaves.values()):
        leaf.register_post_accumulate_grad_hook(lambda _, index=index: calls.append(index))
    loss_on_both(case.predict()).backward()
    assert sorted(calls) == list(range(len(case.leaves)))


# backwards, skipped, recomputed: after a loss on the combination, and after one that also reads the first of five poses
REPORTS = {
    "store": ((5, 0, 0), (5, 0, 0)),
    "stream": ((5, 0, 0), (6, 0, 1)),
    "recompute": ((5, 0, 5), (5, 0, 5)),
    "auto": ((5, 0, 5), (5, 0, 5)),
    "plain": ((5, 0, 0), (5, 0, 0)),
}


def loss_on_combined_and_first_pose(prediction: MultiPosePrediction) -> Tensor:
    return loss_on_combined(prediction) + prediction.per_pose[0].sum()


@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
def test_counts_of_the_report(accumulator: str, double: TensorFactory) -> None:
    for loss, expected in zip((loss_on_combined, loss_on_combined_and_first_pose), REPORTS[accumulator], strict=True):
        case = BackwardCase("plain_mlp", "boltzmann", accumulator, double)
        assert case.scorer is not None
        loss(case.predict(5)).backward()
        report = case.scorer.report
        assert (report.backwards, report.skipped, report.recomputed) == expected
        assert (report.poses, report.chunks, report.plain) == (5, 5, 5 if accumulator == "plain" else 0)
        assert report.accumulator == {"auto": "recompute", "plain": "none"}.get(accumulator, accumulator)
        assert report.reason
