"""Several groups in one loss, in any order, and accumulated gradients are those of the full graphs."""

import pytest
import torch
from backward_cases import (
    CASE_COMBINATIONS,
    CASE_MODELS,
    FIRST_GROUP_ACCUMULATORS,
    BackwardCase,
    assert_gradients_of_full_graph,
    case_label,
)
from model_zoo import TensorFactory, build
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    LOSSES,
    assert_same_training,
    loss_on_both,
    loss_on_combined,
    train_full_graph,
    train_multi_pose,
)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", CASE_MODELS[1:])
def test_groups_of_every_size(name: str, loss: str, count: int, double: TensorFactory) -> None:
    expected = train_full_graph(build(name, double), COMBINATIONS["boltzmann"], LOSSES[loss], count)
    for accumulator in FIRST_GROUP_ACCUMULATORS:
        with case_label(accumulator):
            result = train_multi_pose(build(name, double), COMBINATIONS["boltzmann"], LOSSES[loss], count, accumulator)
            assert_same_training(result, expected)


@pytest.mark.parametrize("combination", CASE_COMBINATIONS)
@pytest.mark.parametrize("name", CASE_MODELS)
class TestSeveralGroups:
    def test_in_one_loss(self, name: str, combination: str, double: TensorFactory) -> None:
        def train(case: BackwardCase) -> None:
            first, second, third = case.predict(3), case.predict(4, 3), case.predict(1, 7)
            margin = (first.combined - second.combined).square() + third.combined * first.per_pose.mean(0)
            margin.sum().backward()

        assert_gradients_of_full_graph(train, name, combination, double)

    def test_backward_in_the_order_of_the_forwards(self, name: str, combination: str, double: TensorFactory) -> None:
        def train(case: BackwardCase) -> None:
            for prediction in [case.predict(3), case.predict(5)]:
                loss_on_both(prediction).backward()

        assert_gradients_of_full_graph(train, name, combination, double)

    def test_backward_in_the_other_order(self, name: str, combination: str, double: TensorFactory) -> None:
        def train(case: BackwardCase) -> None:
            for prediction in [case.predict(3), case.predict(5)][::-1]:
                loss_on_both(prediction).backward()

        assert_gradients_of_full_graph(train, name, combination, double)

    def test_a_group_between_forward_and_backward_of_another(
        self, name: str, combination: str, double: TensorFactory
    ) -> None:
        def train(case: BackwardCase) -> None:
            outer = case.predict(5)
            loss_on_both(case.predict(3)).backward()
            with torch.no_grad():
                case.predict(2)
            case.predict(4)  # without backward
            loss_on_both(outer).backward()

        assert_gradients_of_full_graph(train, name, combination, double)

    def test_accumulated(self, name: str, combination: str, double: TensorFactory) -> None:
        def train(case: BackwardCase) -> None:
            for count in (3, 1, 5):
                (loss_on_both(case.predict(count)) / 3).backward()

        assert_gradients_of_full_graph(train, name, combination, double)

    def test_in_one_loss_with_a_plain_forward(self, name: str, combination: str, double: TensorFactory) -> None:
        def train(case: BackwardCase) -> None:
            (pose,) = case.model_case.make_poses(1)
            plain = case.model_case.call(case.model_case.model, pose)
            (plain.square().sum() + loss_on_both(case.predict(4))).backward()

        assert_gradients_of_full_graph(train, name, combination, double)

    def test_in_a_list_of_losses(self, name: str, combination: str, double: TensorFactory) -> None:
        def train(case: BackwardCase) -> None:
            torch.autograd.backward([loss_on_combined(case.predict(3)), loss_on_both(case.predict(5))])

        assert_gradients_of_full_graph(train, name, combination, double)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_each_group_has_its_own_report(accumulator: str, double: TensorFactory) -> None:
    case = BackwardCase("plain_mlp", "boltzmann", accumulator, double)
    assert case.scorer is not None
    first = case.predict(5)
    first_report = case.scorer.report
    second = case.predict(3)
    second_report = case.scorer.report
    loss_on_combined(second).backward()
    loss_on_combined(first).backward()
    assert (first_report.poses, first_report.backwards) == (5, 5)
    assert (second_report.poses, second_report.backwards) == (3, 3)
