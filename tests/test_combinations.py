"""The built-in combinations: closed forms, rules that hold for all numbers, weights of poses, widths."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_zoo import Place, build, mlp
from torch import Tensor
from torch.utils._pytree import tree_map
from training_reference import ACCUMULATORS, assert_same_gradients, gradients_of, of_both

import gradhooks
from gradhooks import MultiPose, MultiPosePrediction
from gradhooks.errors import CombinationError
from gradhooks.combinations import Boltzmann, Max, Mean, Min

BUILT_IN: dict[str, Callable[[], gradhooks.Combination]] = {
    "mean": Mean,
    "min": Min,
    "max": Max,
    "min of scale 2": lambda: Min(scale=2.0),
    "max of scale 2": lambda: Max(scale=2.0),
    "min normalised": lambda: Min(scale=2.0, normalize=True),
    "max normalised": lambda: Max(scale=2.0, normalize=True),
    "boltzmann": Boltzmann,
    "boltzmann of 3": lambda: Boltzmann(3.0),
    "boltzmann learnable": lambda: Boltzmann(0.9, learnable=True),
}
INDEPENDENT_OF_COUNT = ["mean", "min normalised", "max normalised", "boltzmann", "boltzmann of 3"]

predictions_of_a_group = st.lists(st.floats(-50, 50, allow_subnormal=False), min_size=1, max_size=12).map(
    lambda numbers: torch.tensor(numbers, dtype=torch.float64)
)
every_combination = pytest.mark.parametrize("name", BUILT_IN)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# -- closed forms ---------------------------------------------------------------------------------------------------


def coefficients_of_mean(y: Tensor) -> Tensor:
    return torch.full_like(y, 1 / len(y))


def coefficients_of_extremum(y: Tensor, sign: int, scale: float) -> Tensor:
    """`exp(n t y_i - Q)`, `Q = ln sum exp(n t y_i)`."""
    exponents = sign * scale * y
    return (exponents - exponents.logsumexp(0)).exp()


def coefficients_of_boltzmann(y: Tensor, temperature: float) -> Tensor:
    """`w_i (1 - (y_i - h) / T)`."""
    weights = torch.softmax(-y / temperature, 0)
    average = (weights * y).sum(0)
    return weights * (1 - (y - average) / temperature)


CLOSED_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": coefficients_of_mean,
    "min": lambda y: coefficients_of_extremum(y, -1, 1000.0),
    "max": lambda y: coefficients_of_extremum(y, 1, 1000.0),
    "min of scale 2": lambda y: coefficients_of_extremum(y, -1, 2.0),
    "max of scale 2": lambda y: coefficients_of_extremum(y, 1, 2.0),
    "min normalised": lambda y: coefficients_of_extremum(y, -1, 2.0),
    "max normalised": lambda y: coefficients_of_extremum(y, 1, 2.0),
    "boltzmann": lambda y: coefficients_of_boltzmann(y, 0.592485),
    "boltzmann of 3": lambda y: coefficients_of_boltzmann(y, 3.0),
    "boltzmann learnable": lambda y: coefficients_of_boltzmann(y, 0.9),
}

VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda y: y.sum(0) / len(y),
    "min of scale 2": lambda y: -(-2 * y).exp().sum(0).log() / 2,
    "max of scale 2": lambda y: (2 * y).exp().sum(0).log() / 2,
    "min normalised": lambda y: -((-2 * y).exp().sum(0) / len(y)).log() / 2,
    "max normalised": lambda y: ((2 * y).exp().sum(0) / len(y)).log() / 2,
    "boltzmann of 3": lambda y: ((-y / 3).exp() * y).sum(0) / (-y / 3).exp().sum(0),
}


@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (7, 1), (7, 3), (5, 2, 2)], ids=str)
@every_combination
def test_coefficients_have_their_closed_form(name: str, shape: tuple[int, ...], double: Place) -> None:
    predictions = (3 * double.randn(*shape)).requires_grad_()
    combination = BUILT_IN[name]().to(double.device)
    combined = combination(predictions)
    assert combined.shape == shape[1:]
    (coefficients,) = torch.autograd.grad(combined.sum(), predictions)
    # The learnable temperature is a parameter of 32 bits.
    tolerance = 1e-6 if name == "boltzmann learnable" else 1e-11
    close(coefficients, CLOSED_FORMS[name](predictions.detach()), tolerance)


@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (7, 3)], ids=str)
@pytest.mark.parametrize("name", VALUES)
def test_values_have_their_closed_form(name: str, shape: tuple[int, ...], double: Place) -> None:
    predictions = double.randn(*shape)
    close(BUILT_IN[name]()(predictions), VALUES[name](predictions), 1e-12)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in {"min", "max"}])
def test_gradcheck(name: str, double: Place) -> None:
    combination = BUILT_IN[name]().double().to(double.device)
    predictions = double.randn(5).requires_grad_()
    assert torch.autograd.gradcheck(combination, predictions)
    assert torch.autograd.gradcheck(
        lambda y, weights: combination(y, weights=weights), (predictions, (double.randn(5).exp()).requires_grad_())
    )


def test_the_default_temperature_is_that_of_a_room() -> None:
    assert pytest.approx(1.987204e-3 * 298.15, rel=1e-5) == Boltzmann().temperature
    assert "temperature=0.592485, learnable=False" in repr(Boltzmann())
    assert repr(Min(scale=3.0)) == "Min(scale=3, normalize=False)"


# -- rules ----------------------------------------------------------------------------------------------------------


@every_combination
@given(predictions=predictions_of_a_group, seed=st.integers(0, 99))
def test_the_order_of_poses_does_not_matter(name: str, predictions: Tensor, seed: int) -> None:
    order = torch.randperm(len(predictions), generator=torch.Generator().manual_seed(seed))
    combination = BUILT_IN[name]()
    close(combination(predictions[order]), combination(predictions))


@every_combination
@given(predictions=predictions_of_a_group, shift=st.floats(-100, 100))
def test_a_shift_of_all_shifts_the_result(name: str, predictions: Tensor, shift: float) -> None:
    combination = BUILT_IN[name]()
    close(combination(predictions + shift), combination(predictions) + shift)


@every_combination
@given(number=st.floats(-1e4, 1e4))
def test_one_pose_is_its_own_combination(name: str, number: float) -> None:
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
def test_coefficients_add_up_to_one(name: str, predictions: Tensor) -> None:
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
def test_a_better_pose_never_makes_a_worse_group(name: str, predictions: Tensor, pose: int, rise: float) -> None:
    combination = BUILT_IN[name]()
    raised = predictions.clone()
    raised[pose % len(predictions)] += rise
    assert combination(raised) >= combination(predictions) - 1e-10


@pytest.mark.parametrize("normalize", [False, True])
@given(predictions=predictions_of_a_group, scale=st.floats(0.1, 2000))
def test_minimum_and_maximum_mirror_each_other(normalize: bool, predictions: Tensor, scale: float) -> None:
    close(Min(scale, normalize)(predictions), -Max(scale, normalize)(-predictions))


@given(predictions=predictions_of_a_group)
def test_limits(predictions: Tensor) -> None:
    close(Boltzmann(1e9)(predictions), predictions.mean(), 1e-5)
    close(Boltzmann(1e-6)(predictions), predictions.min(), 1e-4)
    close(Max(1e6)(predictions), predictions.max(), 1e-4)
    close(Min(1e-6, normalize=True)(predictions), predictions.mean(), 1e-2)


# -- weights of the poses -------------------------------------------------------------------------------------------


@every_combination
@given(predictions=predictions_of_a_group, data=st.data())
def test_a_mask_leaves_poses_out(name: str, predictions: Tensor, data: Any) -> None:
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(predictions), max_size=len(predictions))))
    mask[data.draw(st.integers(0, len(mask) - 1))] = True
    combination = BUILT_IN[name]()
    for weights in (mask, mask.double(), mask.float(), mask.long()):
        close(combination(predictions, weights=weights), combination(predictions[mask]))


@every_combination
@given(predictions=predictions_of_a_group, data=st.data())
def test_whole_weights_repeat_poses(name: str, predictions: Tensor, data: Any) -> None:
    counts = data.draw(st.lists(st.integers(1, 4), min_size=len(predictions), max_size=len(predictions)))
    repeated = predictions.repeat_interleave(torch.tensor(counts))
    combination = BUILT_IN[name]()
    close(combination(predictions, weights=torch.tensor(counts)), combination(repeated))


@pytest.mark.parametrize("name", INDEPENDENT_OF_COUNT)
@given(predictions=predictions_of_a_group, factor=st.floats(1e-3, 1e3))
def test_the_sum_of_the_weights_does_not_matter(name: str, predictions: Tensor, factor: float) -> None:
    weights = torch.linspace(0.5, 2, len(predictions), dtype=torch.float64)
    combination = BUILT_IN[name]()
    close(combination(predictions, weights=factor * weights), combination(predictions, weights=weights))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(4), r"shape \(3,\), one for each pose, got \(4,\)"),
        (torch.ones(3, 1), r"shape \(3,\), one for each pose, got \(3, 1\)"),
        (torch.tensor(1.0), r"got \(\)"),
        (torch.tensor([1.0, -1.0, 1.0]), "not be negative or NaN"),
        (torch.tensor([1.0, math.nan, 1.0]), "not be negative or NaN"),
    ],
    ids=["too many", "too many axes", "number", "negative", "nan"],
)
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@every_combination
def test_bad_weights(name: str, accumulator: str, weights: Tensor, message: str, double: Place) -> None:
    with pytest.raises(CombinationError, match=message):
        BUILT_IN[name]()(double.randn(3), weights=weights)
    specimen = build("plain_mlp", double)
    scorer = MultiPose(specimen.model, BUILT_IN[name](), accumulator=accumulator)
    with pytest.raises(CombinationError, match=r"weights (must have shape|of poses must not)"):
        scorer(specimen.make_poses(3), weights=weights)


@pytest.mark.parametrize("kind", ["mask", "numbers", "learnable"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@every_combination
def test_weights_in_a_group(name: str, accumulator: str, kind: str, double: Place) -> None:
    def trained(of_group: bool) -> Any:
        torch.manual_seed(7)
        model, combination = mlp(4, 6, 1).to(double.device, double.dtype), BUILT_IN[name]().to(double.device)
        poses, weights = double.randn(6, 4), double.randn(6).exp()
        if kind == "mask":
            weights = weights > 1
            assert 0 < weights.sum() < 6
        elif kind == "learnable":
            weights.requires_grad_()
        if of_group:
            prediction = MultiPose(model, combination, accumulator=accumulator, chunk_size=2)(poses, weights=weights)
        else:
            rows = model(poses)
            prediction = MultiPosePrediction(combination(rows, weights=weights), rows)
        of_both(prediction).backward()
        leaves = {**dict(model.named_parameters()), **dict(combination.named_parameters())}
        return gradients_of({**leaves, "weights": weights} if kind == "learnable" else leaves)

    assert_same_gradients(trained(of_group=True), trained(of_group=False))


# -- the temperature ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, -3.0, 2.0**16])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_learnable_temperature(accumulator: str, scale: float, double: Place) -> None:
    specimen = build("plain_mlp", double)
    combination = Boltzmann(0.9, learnable=True).to(double.device, double.dtype)
    combined, predictions = MultiPose(specimen.model, combination, accumulator=accumulator)(specimen.make_poses(6))
    (scale * combined.sum()).backward()
    # With h = sum w_i y_i and w_i ~ exp(-y_i/T): dh/dT = (<y^2> - h^2) / T^2, and dT/d ln T = T.
    weights = torch.softmax(-predictions.detach() / combination.temperature.detach(), 0)
    variance = (weights * (predictions.detach() - combined.detach()).square()).sum()
    assert combination.log_temperature.grad is not None
    close(combination.log_temperature.grad, scale * variance / combination.temperature.detach(), 1e-9)


def test_a_learnable_temperature_stays_positive(double: Place) -> None:
    specimen = build("plain_mlp", double)
    combination = Boltzmann(0.5, learnable=True)
    scorer = MultiPose(specimen.model, combination)
    optimizer = torch.optim.SGD(combination.parameters(), lr=1e3)
    before = combination.temperature.item()
    for _ in range(3):
        scorer(specimen.make_poses(5)).combined.sum().backward()
        optimizer.step()
    assert 0 < combination.temperature.item() != before
    assert repr(Boltzmann(0.5, learnable=True)) == "Boltzmann(temperature=0.5, learnable=True)"


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


# -- numbers at the edge --------------------------------------------------------------------------------------------


EDGES: dict[str, list[float]] = {
    "large": [1e30, -1e30, 0.0],
    "largest": [3e38, 3e38, -3e38],
    "far and alike": [-1e4, -1e4 + 0.25, -1e4 + 0.5],
    "tiny": [1e-38, -1e-38, 0.0],
    "denormal": [1e-44, 0.0, -1e-44],
    "one": [3.0],
    "rising": [50.0 * i for i in range(20)],
    "falling": [-50.0 * i for i in range(20)],
}


@pytest.mark.parametrize("edge", EDGES)
@every_combination
def test_extreme_predictions_stay_finite(name: str, edge: str, single: Place) -> None:
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
def test_the_dtype_is_kept(name: str, dtype: torch.dtype, device: torch.device) -> None:
    predictions = torch.tensor([1.0, 2.0, 2.5], dtype=dtype, device=device)
    combined = BUILT_IN[name]().to(device)(predictions, weights=torch.ones(3, device=device))
    assert (combined.dtype, combined.device) == (dtype, predictions.device)
    close(combined.double(), BUILT_IN[name]().to(device)(predictions.double()), 10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", ["mean", "min", "boltzmann"])
def test_a_group_combines_in_float32_or_wider(
    name: str, accumulator: str, dtype: torch.dtype, device: torch.device
) -> None:
    specimen = build("plain_mlp", Place(device, dtype))
    scorer = MultiPose(specimen.model, name, accumulator=accumulator)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        combined, predictions = scorer(specimen.make_poses(3))
    assert (combined.dtype, predictions.dtype) == (wide, dtype)
    combined, predictions = scorer(specimen.make_poses(3))
    assert (combined.dtype, predictions.dtype) == (wide, dtype)
    (combined.sum() + predictions.sum()).backward()
    assert all(parameter.grad is not None for parameter in specimen.model.parameters())
    assert {parameter.grad.dtype for parameter in specimen.model.parameters() if parameter.grad is not None} == {dtype}


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("far", [100.0, 3e4])
def test_a_sharp_maximum_of_half_precision(scale: float, far: float, device: torch.device) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        predictions = torch.tensor([far, -far, far / 2], dtype=dtype, device=device, requires_grad=True)
        combined = Max(scale)(predictions)
        combined.backward()
        assert combined.item() == predictions[0].item()
        assert predictions.grad is not None
        assert predictions.grad.tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-20)


# -- which poses made the prediction --------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("model", ["scalar_output", "plain_mlp", "vector_output"])
@every_combination
def test_weights_of_a_prediction(name: str, model: str, grad_mode: Any, double: Place) -> None:
    specimen = build(model, double)
    scorer = MultiPose(specimen.model, BUILT_IN[name]().to(double.device))
    with grad_mode():
        prediction = scorer(specimen.make_poses(6))
        weights = prediction.coefficients()
    assert weights.shape == prediction.per_pose.shape
    assert not weights.requires_grad
    close(weights, CLOSED_FORMS[name](prediction.per_pose.detach()), 1e-6 if "learnable" in name else 1e-11)
    close(weights.sum(0), torch.ones_like(prediction.combined), 1e-9)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_weights_of_a_prediction_disturb_nothing(accumulator: str, double: Place) -> None:
    def trained(*, look: bool) -> Any:
        specimen = build("plain_mlp", double)
        combination = Boltzmann(0.9, learnable=True)
        prediction = MultiPose(specimen.model, combination, accumulator=accumulator)(specimen.make_poses(5))
        if look:
            assert prediction.coefficients().shape == (5, 1)
        of_both(prediction).backward()
        if look:
            assert torch.equal(prediction.coefficients(), prediction.coefficients())
        return gradients_of({**dict(specimen.model.named_parameters()), **dict(combination.named_parameters())})

    assert_same_gradients(trained(look=True), trained(look=False), tolerance=0.0)


def test_weights_of_a_prediction_know_the_arguments(double: Place) -> None:
    specimen = build("plain_mlp", double)
    mask = torch.tensor([True, False, True, True], device=double.device)
    prediction = MultiPose(specimen.model, "boltzmann")(specimen.make_poses(4), weights=mask)
    assert prediction.coefficients()[1].item() == 0
    close(prediction.coefficients()[mask], CLOSED_FORMS["boltzmann"](prediction.per_pose[mask].detach()))


def test_weights_of_a_prediction_that_was_made_anew(double: Place) -> None:
    prediction = MultiPose(build("plain_mlp", double).model, "boltzmann")(build("plain_mlp", double).make_poses(4))
    for twin in (tree_map(torch.clone, prediction), prediction._replace(combined=prediction.combined.clone())):
        assert isinstance(twin, MultiPosePrediction)
        assert twin.combined is not prediction.combined
        assert torch.equal(twin.coefficients(), prediction.coefficients())


def test_a_prediction_is_a_named_tuple_to_who_asks(double: Place) -> None:
    combined, poses = prediction = MultiPosePrediction(double.randn(1), double.randn(3, 1))
    assert prediction._asdict() == {"combined": combined, "poses": poses}
    assert type(prediction)(*prediction)._fields == ("combined", "poses")
    assert repr(prediction) == f"MultiPosePrediction(combined={combined!r}, poses={poses!r})"
    match prediction:
        case MultiPosePrediction(first, second):
            assert (first, second) == (combined, poses)


@pytest.mark.parametrize("within", [True, False], ids=["read within", "read outside"])
def test_weights_of_a_prediction_whose_arguments_were_made_in_inference_mode(within: bool, double: Place) -> None:
    specimen = build("plain_mlp", double)
    scorer = MultiPose(specimen.model, "boltzmann", nonfinite="drop")
    with torch.inference_mode():
        prediction = scorer(specimen.make_poses(4), weights=torch.tensor([1.0, 0.0, 2.0, 1.0], device=double.device))
        weights = prediction.coefficients() if within else None
    weights = prediction.coefficients() if weights is None else weights
    assert weights[1].item() == 0
    close(weights.sum(0), torch.ones_like(prediction.combined), 1e-9)
    assert not weights.is_inference()


def test_weights_of_a_prediction_that_was_taken_apart_and_rebuilt(single: Place) -> None:
    """Accelerate does so in mixed precision, Lightning when it collects predictions."""
    poses = [single.randn(3).bfloat16() for _ in range(4)]
    prediction = MultiPose(torch.nn.Linear(3, 1).to(single.device).bfloat16(), "boltzmann")(poses)
    assert [part.dtype for part in prediction] == [torch.float32, torch.bfloat16]
    rebuilt = MultiPosePrediction(*(part.float() for part in prediction))
    assert torch.equal(rebuilt.coefficients().bfloat16(), prediction.coefficients())
    with pytest.raises(AttributeError, match="lost its combination"):
        _ = MultiPosePrediction(*(part.clone() for part in prediction)).coefficients()


def test_weights_of_a_prediction_that_has_lost_its_combination(double: Place) -> None:
    with pytest.raises(AttributeError, match="lost its combination"):
        _ = MultiPosePrediction(double.randn(1), double.randn(3, 1)).coefficients()


@pytest.mark.parametrize("combination", [Mean(), Min(), Max(normalize=True), Boltzmann()], ids=repr)
def test_a_mask_that_leaves_nothing_is_refused(combination: gradhooks.Combination) -> None:
    with pytest.raises(gradhooks.errors.CombinationError, match="all 3 weights are 0"):
        combination(torch.ones(3), weights=torch.zeros(3))
