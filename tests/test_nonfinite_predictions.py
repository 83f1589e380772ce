"""Predictions that are NaN or infinite propagate, are dropped, or raise, as `nonfinite=` says."""

import copy

import pytest
import torch
from small_model import assert_gradients_close, random_poses, small_mlp
from torch import Tensor, nn
from training_reference import ACCUMULATORS

import gradhooks
from gradhooks.testing import full_graph


class SometimesNonFinite(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.inner, self.value = small_mlp(), value

    def forward(self, pose: Tensor) -> Tensor:
        prediction: Tensor = self.inner(pose)
        return prediction * self.value if pose[0] == 0 else prediction


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("combination", ["mean", "min", "max", "boltzmann"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_dropped_poses_do_not_change_the_result_of_the_rest(accumulator: str, combination: str, value: float) -> None:
    model, poses = SometimesNonFinite(value), random_poses()
    poses[2][0] = 0
    rest = [pose for index, pose in enumerate(poses) if index != 2]
    reference = copy.deepcopy(model)
    expected = full_graph(reference, rest, gradhooks.registry.combinations.create(combination))
    expected.combined.sum().backward()
    prediction = gradhooks.MultiPose(model, combination, accumulator=accumulator, nonfinite="drop")(poses)
    prediction.combined.sum().backward()
    torch.testing.assert_close(prediction.combined, expected.combined)
    assert_gradients_close(model, reference)
    assert prediction.coefficients()[2] == 0
    assert prediction.per_pose.shape == (6, 1)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_non_finite_predictions_raise_on_request(accumulator: str) -> None:
    model, poses = SometimesNonFinite(float("nan")), random_poses()
    poses[4][0] = 0
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, nonfinite="raise")
    with pytest.raises(gradhooks.errors.PredictionError, match="pose 4: its prediction is not finite"):
        scorer(poses)
    with torch.no_grad(), pytest.raises(gradhooks.errors.PredictionError, match="pose 4"):
        scorer(poses)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_non_finite_predictions_propagate_by_default(accumulator: str) -> None:
    model, poses = SometimesNonFinite(float("nan")), random_poses()
    poses[4][0] = 0
    prediction = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator)(poses)
    prediction.combined.sum().backward()
    assert prediction.combined.isnan().all()
    assert all(leaf.grad is not None and leaf.grad.isnan().any() for leaf in model.parameters())


def test_a_group_with_all_poses_dropped_is_refused() -> None:
    poses = random_poses()
    for pose in poses:
        pose[0] = 0
    with pytest.raises(gradhooks.errors.PredictionError, match="none of the 6 predictions"):
        gradhooks.MultiPose(SometimesNonFinite(float("nan")), nonfinite="drop")(poses)
