"""The helpers that compare fail on wrong input."""

import dataclasses

import pytest
import torch
from model_zoo import TensorFactory, build
from training_reference import (
    COMBINATIONS,
    Gradients,
    TrainingResult,
    assert_bit_equal,
    assert_same_gradients,
    assert_same_training,
    case_label,
    loss_on_both,
    relative_errors,
    train_full_graph,
)


@pytest.fixture
def trained(double: TensorFactory) -> TrainingResult:
    return train_full_graph(build("batch_norm_in_training", double), COMBINATIONS["mean"], loss_on_both, 3)


def test_equal_gradients_pass(trained: TrainingResult) -> None:
    assert_same_gradients(trained.gradients, trained.gradients)
    assert_bit_equal(trained.gradients, trained.gradients)
    assert_same_training(trained, trained)


def test_one_wrong_entry_fails() -> None:
    right, wrong = torch.ones(2, 1000, dtype=torch.float64)
    wrong[3] += 1e-9
    expected: Gradients = {"weight": right, "bias": None}
    result: Gradients = {"weight": wrong, "bias": None}
    with pytest.raises(AssertionError, match="weight"):
        assert_same_gradients(result, expected)
    with pytest.raises(AssertionError, match="weight"):
        assert_bit_equal(result, expected)


def test_nan_fails() -> None:
    expected: Gradients = {"weight": torch.ones(2)}
    with pytest.raises(AssertionError, match="weight"):
        assert_same_gradients({"weight": torch.tensor([1.0, float("nan")])}, expected)


@pytest.mark.parametrize("result", [None, torch.zeros(2, dtype=torch.float32), torch.zeros(2, 1, dtype=torch.float64)])
def test_another_shape_or_dtype_fails(result: torch.Tensor | None) -> None:
    with pytest.raises(AssertionError, match="weight"):
        assert_same_gradients({"weight": result}, {"weight": torch.zeros(2, dtype=torch.float64)})


def test_a_gradient_where_none_is_expected_fails() -> None:
    with pytest.raises(AssertionError, match="weight"):
        assert_same_gradients({"weight": torch.zeros(2)}, {"weight": None})


def test_the_error_of_a_small_gradient_is_relative_to_its_own_size() -> None:
    large, small = torch.tensor([[1.0], [1e-3]], dtype=torch.float64)
    expected: Gradients = {"large": large, "small": small}
    result: Gradients = {"large": large, "small": small * (1 + 1e-6)}
    assert relative_errors(result, expected) == {"large": 0.0, "small": pytest.approx(1e-6, rel=1e-3)}


def test_wrong_buffers_and_random_state_fail(trained: TrainingResult) -> None:
    buffers = {name: buffer + 1 for name, buffer in trained.buffers.items()}
    with pytest.raises(AssertionError, match="running_mean"):
        assert_same_training(dataclasses.replace(trained, buffers=buffers), trained)
    with pytest.raises(AssertionError, match="random state"):
        assert_same_training(dataclasses.replace(trained, random_state=trained.random_state + 1), trained)


def test_a_failure_in_a_loop_names_its_case(trained: TrainingResult) -> None:
    wrong = dataclasses.replace(trained, random_state=trained.random_state + 1)
    with (
        pytest.raises(AssertionError, match=r"\[stream - 5\] AssertionError: global random state"),
        case_label("stream", 5),
    ):
        assert_same_training(wrong, trained)
    with pytest.raises(AssertionError, match=r"\[stream\] ValueError: not an assertion"), case_label("stream"):
        raise ValueError("not an assertion")
