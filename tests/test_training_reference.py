"""The helpers that compare must be able to fail."""

import dataclasses

import pytest
import torch
from model_zoo import Place, build
from training_reference import (
    COMBINATIONS,
    Gradients,
    Trained,
    assert_bit_equal,
    assert_same_gradients,
    assert_same_training,
    distances,
    of_both,
    train_by_full_graph,
)


@pytest.fixture
def trained(double: Place) -> Trained:
    return train_by_full_graph(build("batch_norm_in_training", double), COMBINATIONS["mean"], of_both, 3)


def test_equal_gradients_pass(trained: Trained) -> None:
    assert_same_gradients(trained.gradients, trained.gradients)
    assert_bit_equal(trained.gradients, trained.gradients)
    assert_same_training(trained, trained)


def test_one_wrong_entry_fails() -> None:
    right, wrong = torch.ones(2, 1000, dtype=torch.float64)
    wrong[3] += 1e-9
    expected: Gradients = {"weight": right, "bias": None}
    found: Gradients = {"weight": wrong, "bias": None}
    with pytest.raises(AssertionError, match="weight"):
        assert_same_gradients(found, expected)
    with pytest.raises(AssertionError, match="weight"):
        assert_bit_equal(found, expected)


def test_nan_fails() -> None:
    expected: Gradients = {"weight": torch.ones(2)}
    with pytest.raises(AssertionError, match="weight"):
        assert_same_gradients({"weight": torch.tensor([1.0, float("nan")])}, expected)


@pytest.mark.parametrize("found", [None, torch.zeros(2, dtype=torch.float32), torch.zeros(2, 1, dtype=torch.float64)])
def test_another_form_fails(found: torch.Tensor | None) -> None:
    with pytest.raises(AssertionError, match="weight"):
        assert_same_gradients({"weight": found}, {"weight": torch.zeros(2, dtype=torch.float64)})


def test_a_gradient_where_none_belongs_fails() -> None:
    with pytest.raises(AssertionError, match="weight"):
        assert_same_gradients({"weight": torch.zeros(2)}, {"weight": None})


def test_a_small_gradient_is_measured_by_its_own_size() -> None:
    large, small = torch.tensor([[1.0], [1e-3]], dtype=torch.float64)
    expected: Gradients = {"large": large, "small": small}
    found: Gradients = {"large": large, "small": small * (1 + 1e-6)}
    assert distances(found, expected) == {"large": 0.0, "small": pytest.approx(1e-6, rel=1e-3)}


def test_wrong_buffers_and_random_state_fail(trained: Trained) -> None:
    buffers = {name: buffer + 1 for name, buffer in trained.buffers.items()}
    with pytest.raises(AssertionError, match="running_mean"):
        assert_same_training(dataclasses.replace(trained, buffers=buffers), trained)
    with pytest.raises(AssertionError, match="random state"):
        assert_same_training(dataclasses.replace(trained, random_state=trained.random_state + 1), trained)
