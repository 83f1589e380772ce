"""The built-in combinations: closed forms, invariants, options, extreme numbers and dtypes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from built_in_combinations import BUILT_IN, CLOSED_FORMS, VALUES, close, every_combination, predictions_of_a_group
from hypothesis import given
from hypothesis import strategies as st
from model_zoo import TensorFactory, build
from torch import Tensor
from training_reference import ACCUMULATORS

from gradhooks import MultiPose
from gradhooks.combinations import Boltzmann, Max, Min
from gradhooks.errors import CombinationError

# -- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (7, 1), (7, 3), (5, 2, 2)], ids=str)
@every_combination
def test_coefficients_agree_with_the_closed_form(name: str, shape: tuple[int, ...], double: TensorFactory) -> None:
    predictions = (3 * double.randn(*shape)).requires_grad_()
    combination = BUILT_IN[name]().to(double.device)
    combined = combination(predictions)
    assert combined.shape == shape[1:]
    (coefficients,) = torch.autograd.grad(combined.sum(), predictions)
    # The learnable temperature is a float32 parameter.
    tolerance = 1e-6 if name == "boltzmann learnable" else 1e-11
    close(coefficients, CLOSED_FORMS[name](predictions.detach()), tolerance)


@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (7, 3)], ids=str)
@pytest.mark.parametrize("name", VALUES)
def test_values_agree_with_the_closed_form(name: str, shape: tuple[int, ...], double: TensorFactory) -> None:
    predictions = double.randn(*shape)
    close(BUILT_IN[name]()(predictions), VALUES[name](predictions), 1e-12)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in {"min", "max"}])
def test_gradcheck(name: str, double: TensorFactory) -> None:
    combination = BUILT_IN[name]().double().to(double.device)
    predictions = double.randn(5).requires_grad_()
    assert torch.autograd.gradcheck(combination, predictions)
    assert torch.autograd.gradcheck(
        lambda y, weights: combination(y, weights=weights), (predictions, (double.randn(5).exp()).requires_grad_())
    )


def test_default_temperature_is_room_temperature() -> None:
    assert pytest.approx(1.987204e-3 * 298.15, rel=1e-5) == Boltzmann().temperature
    assert "temperature=0.592485, learnable=False" in repr(Boltzmann())
    assert repr(Min(scale=3.0)) == "Min(scale=3, normalize=False)"


# -- invariants -----------------------------------------------------------------------------------------------------


@every_combination
@given(predictions=predictions_of_a_group, seed=st.integers(0, 99))
def test_result_is_independent_of_the_order_of_poses(name: str, predictions: Tensor, seed: int) -> None:
    order = torch.randperm(len(predictions), generator=torch.Generator().manual_seed(seed))
    combination = BUILT_IN[name]()
    close(combination(predictions[order]), combination(predictions))


@every_combination
@given(predictions=predictions_of_a_group, shift=st.floats(-100, 100))
def test_shifting_all_predictions_shifts_the_result(name: str, predictions: Tensor, shift: float) -> None:
    combination = BUILT_IN[name]()
    close(combination(predictions + shift), combination(predictions) + shift)


@every_combination
@given(number=st.floats(-1e4, 1e4))
def test_one_pose_combines_to_its_own_prediction(name: str, number: float) -> None:
    predictions = torch.tensor([number], dtype=torch.float64)
    close(BUILT_IN[name]()(predictions), predictions[0])


@every_combination
@given(number=st.floats(-1e4, 1e4), count=st.integers(1, 20))
def test_equal_predictions(name: str, number: float, count: int) -> None:
    predictions = torch.full((count,), number, dtype=torch.float64, requires_grad=True)
    combination = BUILT_IN[name]()
    combined = combination(predictions)
    expected = number
    if isinstance(combination, (Min, Max)) and not combination.normalize:
        expected += combination.sign * math.log(count) / combination.scale
    close(combined, torch.tensor(expected, dtype=torch.float64))
    (coefficients,) = torch.autograd.grad(combined, predictions)
    close(coefficients, torch.full_like(coefficients, 1 / count))


@every_combination
@given(predictions=predictions_of_a_group)
def test_coefficients_sum_to_one(name: str, predictions: Tensor) -> None:
    predictions.requires_grad_()
    (coefficients,) = torch.autograd.grad(BUILT_IN[name]()(predictions), predictions)
    assert coefficients.sum().item() == pytest.approx(1.0, abs=1e-9)
    if not name.startswith("boltzmann"):
        assert (coefficients >= 0).all()


@every_combination
@given(predictions=predictions_of_a_group)
def test_bounds(name: str, predictions: Tensor) -> None:
    combination = BUILT_IN[name]()
    combined, slack = combination(predictions).item(), 1e-9
    lowest, highest = predictions.min().item() - slack, predictions.max().item() + slack
    distance = math.log(len(predictions)) / combination.scale if isinstance(combination, (Min, Max)) else 0.0
    if isinstance(combination, Max):
        assert highest - 2 * slack - distance * combination.normalize <= combined
        assert combined <= highest + distance * (not combination.normalize)
    elif isinstance(combination, Min):
        assert lowest - distance * (not combination.normalize) <= combined
        assert combined <= lowest + 2 * slack + distance * combination.normalize
    else:
        assert lowest <= combined <= highest
        if isinstance(combination, Boltzmann):
            assert combined <= predictions.mean().item() + slack


@pytest.mark.parametrize("name", [name for name in BUILT_IN if not name.startswith("boltzmann")])
@given(predictions=predictions_of_a_group, pose=st.integers(0, 11), rise=st.floats(0, 10))
def test_result_is_monotonic_in_each_prediction(name: str, predictions: Tensor, pose: int, rise: float) -> None:
    combination = BUILT_IN[name]()
    raised = predictions.clone()
    raised[pose % len(predictions)] += rise
    assert combination(raised) >= combination(predictions) - 1e-10


@pytest.mark.parametrize("normalize", [False, True])
@given(predictions=predictions_of_a_group, scale=st.floats(0.1, 2000))
def test_minimum_is_the_negated_maximum_of_negated_predictions(
    normalize: bool, predictions: Tensor, scale: float
) -> None:
    close(Min(scale, normalize)(predictions), -Max(scale, normalize)(-predictions))


@given(predictions=predictions_of_a_group)
def test_limits(predictions: Tensor) -> None:
    close(Boltzmann(1e9)(predictions), predictions.mean(), 1e-5)
    close(Boltzmann(1e-6)(predictions), predictions.min(), 1e-4)
    close(Max(1e6)(predictions), predictions.max(), 1e-4)
    close(Min(1e-6, normalize=True)(predictions), predictions.mean(), 1e-2)


# -- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0.0, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Min, "Min: scale must be positive and finite"),
        (Max, "Max: scale must be positive and finite"),
        (Boltzmann, "Boltzmann: temperature must be positive and finite"),
        (lambda number: Boltzmann(number, learnable=True), "Boltzmann: temperature must be positive and finite"),
    ],
    ids=["min", "max", "boltzmann", "learnable"],
)
def test_bad_options(make: Callable[[float], Any], message: str, number: float) -> None:
    with pytest.raises(CombinationError, match=f"{message}, got {number}"):
        make(number)


# -- extreme numbers ------------------------------------------------------------------------------------------------


EDGES: dict[str, list[float]] = {
    "large": [1e30, -1e30, 0.0],
    "largest": [3e38, 3e38, -3e38],
    "large and close together": [-1e4, -1e4 + 0.25, -1e4 + 0.5],
    "tiny": [1e-38, -1e-38, 0.0],
    "denormal": [1e-44, 0.0, -1e-44],
    "one": [3.0],
    "rising": [50.0 * i for i in range(20)],
    "falling": [-50.0 * i for i in range(20)],
}


@pytest.mark.parametrize("edge", EDGES)
@every_combination
def test_extreme_predictions_stay_finite(name: str, edge: str, single: TensorFactory) -> None:
    predictions = torch.tensor(EDGES[edge], device=single.device).requires_grad_()
    combination = BUILT_IN[name]().to(single.device)
    combined = combination(predictions)
    combined.backward()
    assert combined.isfinite()
    assert predictions.grad is not None
    assert predictions.grad.isfinite().all()
    for parameter in combination.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all() or edge in {"large", "largest"}  # where the variance overflows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_combination
def test_result_has_the_dtype_of_the_predictions(name: str, dtype: torch.dtype, device: torch.device) -> None:
    predictions = torch.tensor([1.0, 2.0, 2.5], dtype=dtype, device=device)
    combined = BUILT_IN[name]().to(device)(predictions, weights=torch.ones(3, device=device))
    assert (combined.dtype, combined.device) == (dtype, predictions.device)
    close(combined.double(), BUILT_IN[name]().to(device)(predictions.double()), 10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_group_is_combined_in_float32_or_wider(accumulator: str, dtype: torch.dtype, device: torch.device) -> None:
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    for name in ("mean", "min", "boltzmann"):
        case = build("plain_mlp", TensorFactory(device, dtype))
        scorer = MultiPose(case.model, name, accumulator=accumulator)
        with torch.no_grad():
            combined, per_pose = scorer(case.make_poses(3))
        assert (combined.dtype, per_pose.dtype) == (at_least_float32, dtype)
        combined, per_pose = scorer(case.make_poses(3))
        assert (combined.dtype, per_pose.dtype) == (at_least_float32, dtype)
        (combined.sum() + per_pose.sum()).backward()
        gradients = [parameter.grad for parameter in case.model.parameters()]
        assert all(gradient is not None and gradient.dtype == dtype for gradient in gradients)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("far", [100.0, 3e4])
def test_sharp_maximum_in_half_precision(scale: float, far: float, device: torch.device) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        predictions = torch.tensor([far, -far, far / 2], dtype=dtype, device=device, requires_grad=True)
        combined = Max(scale)(predictions)
        combined.backward()
        assert combined.item() == predictions[0].item()
        assert predictions.grad is not None
        assert predictions.grad.tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-20)
