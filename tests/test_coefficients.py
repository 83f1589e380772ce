"""The coefficients of a prediction, `d combined / d pose prediction`, and the prediction as a named tuple."""

from typing import Any

import pytest
import torch
from built_in_combinations import BUILT_IN, CLOSED_FORMS, close, every_combination
from model_zoo import TensorFactory, build
from torch import Tensor
from torch.utils._pytree import tree_map
from training_reference import ACCUMULATORS, assert_same_gradients, gradients_of, loss_on_both

from gradhooks import MultiPose, MultiPosePrediction
from gradhooks.combinations import Boltzmann


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@every_combination
def test_coefficients_of_a_prediction(name: str, grad_mode: Any, double: TensorFactory) -> None:
    for model in ("scalar_output", "plain_mlp", "vector_output"):
        case = build(model, double)
        scorer = MultiPose(case.model, BUILT_IN[name]().to(double.device))
        with grad_mode():
            prediction = scorer(case.make_poses(6))
            coefficients = prediction.coefficients()
        assert_closed_form(name, prediction, coefficients)


def assert_closed_form(name: str, prediction: MultiPosePrediction, coefficients: Tensor) -> None:
    assert coefficients.shape == prediction.per_pose.shape
    assert not coefficients.requires_grad
    close(coefficients, CLOSED_FORMS[name](prediction.per_pose.detach()), 1e-6 if "learnable" in name else 1e-11)
    close(coefficients.sum(0), torch.ones_like(prediction.combined), 1e-9)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_reading_coefficients_does_not_change_the_gradients(accumulator: str, double: TensorFactory) -> None:
    def trained(*, read: bool) -> Any:
        case = build("plain_mlp", double)
        combination = Boltzmann(0.9, learnable=True)
        prediction = MultiPose(case.model, combination, accumulator=accumulator)(case.make_poses(5))
        if read:
            assert prediction.coefficients().shape == (5, 1)
        loss_on_both(prediction).backward()
        if read:
            assert torch.equal(prediction.coefficients(), prediction.coefficients())
        return gradients_of({**dict(case.model.named_parameters()), **dict(combination.named_parameters())})

    assert_same_gradients(trained(read=True), trained(read=False), tolerance=0.0)


def test_coefficients_depend_on_the_arguments_of_the_call(double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    mask = torch.tensor([True, False, True, True], device=double.device)
    prediction = MultiPose(case.model, "boltzmann")(case.make_poses(4), weights=mask)
    assert prediction.coefficients()[1].item() == 0
    close(prediction.coefficients()[mask], CLOSED_FORMS["boltzmann"](prediction.per_pose[mask].detach()))


def test_coefficients_of_a_rebuilt_prediction(double: TensorFactory) -> None:
    prediction = MultiPose(build("plain_mlp", double).model, "boltzmann")(build("plain_mlp", double).make_poses(4))
    for twin in (tree_map(torch.clone, prediction), prediction._replace(combined=prediction.combined.clone())):
        assert isinstance(twin, MultiPosePrediction)
        assert twin.combined is not prediction.combined
        assert torch.equal(twin.coefficients(), prediction.coefficients())


def test_prediction_behaves_like_a_named_tuple(double: TensorFactory) -> None:
    combined, per_pose = prediction = MultiPosePrediction(double.randn(1), double.randn(3, 1))
    assert prediction._asdict() == {"combined": combined, "per_pose": per_pose}
    assert type(prediction)(*prediction)._fields == ("combined", "per_pose")
    assert repr(prediction) == f"MultiPosePrediction(combined={combined!r}, per_pose={per_pose!r})"
    match prediction:
        case MultiPosePrediction(first, second):
            assert (first, second) == (combined, per_pose)


@pytest.mark.parametrize("within", [True, False], ids=["read within", "read outside"])
def test_coefficients_with_arguments_created_in_inference_mode(within: bool, double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    scorer = MultiPose(case.model, "boltzmann", nonfinite="drop")
    with torch.inference_mode():
        prediction = scorer(case.make_poses(4), weights=torch.tensor([1.0, 0.0, 2.0, 1.0], device=double.device))
        coefficients = prediction.coefficients() if within else None
    coefficients = prediction.coefficients() if coefficients is None else coefficients
    assert coefficients[1].item() == 0
    close(coefficients.sum(0), torch.ones_like(prediction.combined), 1e-9)
    assert not coefficients.is_inference()


def test_coefficients_of_a_prediction_rebuilt_from_its_fields(single: TensorFactory) -> None:
    """Accelerate rebuilds predictions in mixed precision, Lightning when it collects them."""
    poses = [single.randn(3).bfloat16() for _ in range(4)]
    prediction = MultiPose(torch.nn.Linear(3, 1).to(single.device).bfloat16(), "boltzmann")(poses)
    assert [part.dtype for part in prediction] == [torch.float32, torch.bfloat16]
    rebuilt = MultiPosePrediction(*(part.float() for part in prediction))
    assert torch.equal(rebuilt.coefficients().bfloat16(), prediction.coefficients())
    with pytest.raises(AttributeError, match="lost its combination"):
        _ = MultiPosePrediction(*(part.clone() for part in prediction)).coefficients()


def test_coefficients_of_a_prediction_without_its_combination(double: TensorFactory) -> None:
    with pytest.raises(AttributeError, match="lost its combination"):
        _ = MultiPosePrediction(double.randn(1), double.randn(3, 1)).coefficients()
