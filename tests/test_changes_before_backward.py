"""Changes between the first run and the second are refused, or have no effect."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_state import unchanged
from model_zoo import ModelCase, TensorFactory, build, mlp
from seeding import manual_seed
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    assert_same_gradients,
    gradients_of,
    loss_on_both,
    train_full_graph,
    train_multi_pose,
    trained_leaves,
)

from gradhooks import MultiPose
from gradhooks.errors import PosesError, ReplayError


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", ["plain_mlp", "tied_weights", "shared_encoder_output", "vector_output"])
def test_a_parameter_that_changed_between(name: str, accumulator: str, double: TensorFactory) -> None:
    case = build(name, double)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    prediction = MultiPose(case.model, "boltzmann", accumulator=accumulator)(case.make_poses(4))
    for parameter in case.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with unchanged(case.model), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_on_both(prediction).backward()


@pytest.mark.parametrize("name", ["plain_mlp", "vector_output"])
def test_a_pose_that_changed_between_is_found_by_the_second_run(name: str, double: TensorFactory) -> None:
    case = build(name, double)
    poses = case.make_poses(4)
    prediction = MultiPose(case.model, "boltzmann", accumulator="recompute")(poses)
    poses[2] += 1
    with unchanged(case.model), pytest.raises(ReplayError, match="pose 2 of 4: its second run differs"):
        loss_on_both(prediction).backward()


class ChangesPose(nn.Module):
    """Changes its pose in place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)

    def forward(self, pose: Tensor) -> Tensor:
        return self.net(pose.mul_(2))


class HiddenRandomness(nn.Module):
    """Draws random numbers from a generator that gradhooks does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)
        self.draw = random.Random(3).random  # noqa: S311  # no secret

    def forward(self, pose: Tensor) -> Tensor:
        return self.net(pose) * self.draw()


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_model_that_changes_its_pose(accumulator: str, double: TensorFactory) -> None:
    model = ChangesPose().to(double.device, double.dtype)
    poses = list(double.randn(4, 4))
    with unchanged(model), pytest.raises(PosesError, match=r"pose 0: the model changed .* in place"):
        loss_on_both(MultiPose(model, "boltzmann", accumulator=accumulator, memory=0)(poses)).backward()


def test_a_model_that_cannot_be_repeated(double: TensorFactory) -> None:
    model = HiddenRandomness().to(double.device, double.dtype)
    prediction = MultiPose(model, "boltzmann", accumulator="recompute", audit=False)(list(double.randn(4, 4)))
    with unchanged(model), pytest.raises(ReplayError, match="second run differs"):
        loss_on_both(prediction).backward()


@pytest.mark.parametrize("accumulator", ["store", "stream"])
def test_a_model_that_cannot_be_repeated_works_if_every_pose_runs_once(accumulator: str, double: TensorFactory) -> None:
    inputs = double.randn(4, 4)

    def trained(train: Callable[..., Any], **options: Any) -> Any:
        manual_seed(5)
        case = ModelCase(
            HiddenRandomness().to(double.device, double.dtype), lambda count: [row.clone() for row in inputs[:count]]
        )
        return train(case, COMBINATIONS["boltzmann"], lambda p: p.combined.sum(), 4, **options).gradients

    assert_same_gradients(trained(train_multi_pose, accumulator=accumulator, audit=False), trained(train_full_graph))


@pytest.mark.parametrize("accumulator", ["recompute", "auto"])
def test_a_training_flag_that_changed_between(accumulator: str, double: TensorFactory) -> None:
    # It does not matter to the full graph. The second run uses the flags of the first.
    case = build("dropout", double)
    manual_seed(3)
    prediction = MultiPose(case.model, "boltzmann", accumulator=accumulator)(case.make_poses(4))
    case.model.eval()
    loss_on_both(prediction).backward()
    assert not any(module.training for module in case.model.modules())
    expected = train_full_graph(build("dropout", double), COMBINATIONS["boltzmann"], loss_on_both, 4)
    assert_same_gradients(gradients_of(trained_leaves(case, None)), expected.gradients)
