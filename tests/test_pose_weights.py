"""Arguments and parameters of the built-in combinations: weights of the poses, and the learnable temperature."""

import math
from typing import Any

import pytest
import torch
from built_in_combinations import BUILT_IN, INDEPENDENT_OF_COUNT, close, every_combination, predictions_of_a_group
from hypothesis import given
from hypothesis import strategies as st
from model_zoo import TensorFactory, build, mlp
from torch import Tensor
from training_reference import ACCUMULATORS, assert_same_gradients, gradients_of, loss_on_both

from gradhooks import Combination, MultiPose, MultiPosePrediction
from gradhooks.combinations import Boltzmann, Max, Mean, Min
from gradhooks.errors import CombinationError


@every_combination
@given(predictions=predictions_of_a_group, data=st.data())
def test_mask_excludes_poses(name: str, predictions: Tensor, data: Any) -> None:
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(predictions), max_size=len(predictions))))
    mask[data.draw(st.integers(0, len(mask) - 1))] = True
    combination = BUILT_IN[name]()
    for weights in (mask, mask.double(), mask.float(), mask.long()):
        close(combination(predictions, weights=weights), combination(predictions[mask]))


@every_combination
@given(predictions=predictions_of_a_group, data=st.data())
def test_integer_weights_repeat_poses(name: str, predictions: Tensor, data: Any) -> None:
    counts = data.draw(st.lists(st.integers(1, 4), min_size=len(predictions), max_size=len(predictions)))
    repeated = predictions.repeat_interleave(torch.tensor(counts))
    combination = BUILT_IN[name]()
    close(combination(predictions, weights=torch.tensor(counts)), combination(repeated))


@pytest.mark.parametrize("name", INDEPENDENT_OF_COUNT)
@given(predictions=predictions_of_a_group, factor=st.floats(1e-3, 1e3))
def test_result_is_independent_of_the_sum_of_the_weights(name: str, predictions: Tensor, factor: float) -> None:
    weights = torch.linspace(0.5, 2, len(predictions), dtype=torch.float64)
    combination = BUILT_IN[name]()
    close(combination(predictions, weights=factor * weights), combination(predictions, weights=weights))


BAD_WEIGHTS = {
    "too many": (torch.ones(4), r"must have shape \(3,\), one weight for each pose, got shape \(4,\)"),
    "too many axes": (torch.ones(3, 1), r"must have shape \(3,\), one weight for each pose, got shape \(3, 1\)"),
    "number": (torch.tensor(1.0), r"got shape \(\)"),
    "negative": (torch.tensor([1.0, -1.0, 1.0]), "must not be negative or NaN, got -1"),
    "nan": (torch.tensor([1.0, math.nan, 1.0]), "must not be negative or NaN, got nan"),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
@every_combination
def test_bad_weights(name: str, kind: str, double: TensorFactory) -> None:
    weights, message = BAD_WEIGHTS[kind]
    with pytest.raises(CombinationError, match=f"^weights .*{message}"):
        BUILT_IN[name]()(double.randn(3), weights=weights)
    case = build("plain_mlp", double)
    for accumulator in ACCUMULATORS:
        scorer = MultiPose(case.model, BUILT_IN[name](), accumulator=accumulator)
        with pytest.raises(CombinationError, match=r"^weights must (have shape|not be negative)"):
            scorer(case.make_poses(3), weights=weights)


@pytest.mark.parametrize("kind", ["mask", "numbers", "learnable"])
@every_combination
def test_weights_in_a_group(name: str, kind: str, double: TensorFactory) -> None:
    def trained(accumulator: str | None) -> Any:
        torch.manual_seed(7)
        model, combination = mlp(4, 6, 1).to(double.device, double.dtype), BUILT_IN[name]().to(double.device)
        poses, weights = double.randn(6, 4), double.randn(6).exp()
        if kind == "mask":
            weights = weights > 1
            assert 0 < weights.sum() < 6
        elif kind == "learnable":
            weights.requires_grad_()
        if accumulator is None:  # the full graph
            per_pose = model(poses)
            prediction = MultiPosePrediction(combination(per_pose, weights=weights), per_pose)
        else:
            prediction = MultiPose(model, combination, accumulator=accumulator, chunk_size=2)(poses, weights=weights)
        loss_on_both(prediction).backward()
        leaves = {**dict(model.named_parameters()), **dict(combination.named_parameters())}
        return gradients_of({**leaves, "weights": weights} if kind == "learnable" else leaves)

    expected = trained(accumulator=None)
    for accumulator in ACCUMULATORS:
        assert_same_gradients(trained(accumulator), expected)


@pytest.mark.parametrize("combination", [Mean(), Min(), Max(normalize=True), Boltzmann()], ids=repr)
def test_weights_that_are_all_zero(combination: Combination) -> None:
    with pytest.raises(CombinationError, match="all 3 weights are 0, so no pose is left"):
        combination(torch.ones(3), weights=torch.zeros(3))


# -- the temperature ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, -3.0, 2.0**16])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_gradient_of_a_learnable_temperature(accumulator: str, scale: float, double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    combination = Boltzmann(0.9, learnable=True).to(double.device, double.dtype)
    combined, predictions = MultiPose(case.model, combination, accumulator=accumulator)(case.make_poses(6))
    (scale * combined.sum()).backward()
    # With h = sum w_i y_i and w_i ~ exp(-y_i/T): dh/dT = (<y^2> - h^2) / T^2, and dT/d ln T = T.
    weights = torch.softmax(-predictions.detach() / combination.temperature.detach(), 0)
    variance = (weights * (predictions.detach() - combined.detach()).square()).sum()
    assert combination.log_temperature.grad is not None
    close(combination.log_temperature.grad, scale * variance / combination.temperature.detach(), 1e-9)


def test_learnable_temperature_stays_positive(double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    combination = Boltzmann(0.5, learnable=True)
    scorer = MultiPose(case.model, combination)
    optimizer = torch.optim.SGD(combination.parameters(), lr=1e3)
    before = combination.temperature.item()
    for _ in range(3):
        scorer(case.make_poses(5)).combined.sum().backward()
        optimizer.step()
    assert 0 < combination.temperature.item() != before
    assert repr(Boltzmann(0.5, learnable=True)) == "Boltzmann(temperature=0.5, learnable=True)"
