"""Changes between the first run and the second are refused, or have no effect."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_state import untouched
from model_zoo import Place, Specimen, build, mlp
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    assert_same_gradients,
    gradients_of,
    leaves_of,
    of_both,
    train_by_full_graph,
    train_by_group,
)

from gradhooks import MultiPose
from gradhooks.errors import PosesError, ReplayError


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", ["plain_mlp", "tied_weights", "shared_encoder_output", "vector_output"])
def test_a_parameter_that_changed_between(name: str, accumulator: str, double: Place) -> None:
    specimen = build(name, double)
    optimizer = torch.optim.SGD(specimen.model.parameters(), lr=0.1)
    prediction = MultiPose(specimen.model, "boltzmann", accumulator=accumulator)(specimen.make_poses(4))
    for parameter in specimen.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with untouched(specimen.model), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        of_both(prediction).backward()


@pytest.mark.parametrize("name", ["plain_mlp", "vector_output"])
def test_a_pose_that_changed_between_is_found_by_the_second_run(name: str, double: Place) -> None:
    specimen = build(name, double)
    poses = specimen.make_poses(4)
    prediction = MultiPose(specimen.model, "boltzmann", accumulator="recompute")(poses)
    poses[2] += 1
    with untouched(specimen.model), pytest.raises(ReplayError, match="pose 2 of 4: its second run differs"):
        of_both(prediction).backward()


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
        self.hidden = random.Random(3)  # noqa: S311  # no secret

    def forward(self, pose: Tensor) -> Tensor:
        return self.net(pose) * self.hidden.random()


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_model_that_changes_its_pose(accumulator: str, double: Place) -> None:
    model = ChangesPose().to(double.device, double.dtype)
    poses = list(double.randn(4, 4))
    with untouched(model), pytest.raises(PosesError, match=r"pose 0: the model changed .* in place"):
        of_both(MultiPose(model, "boltzmann", accumulator=accumulator)(poses)).backward()


def test_a_model_that_cannot_be_repeated(double: Place) -> None:
    model = HiddenRandomness().to(double.device, double.dtype)
    prediction = MultiPose(model, "boltzmann", accumulator="recompute")(list(double.randn(4, 4)))
    with untouched(model), pytest.raises(ReplayError, match="second run differs"):
        of_both(prediction).backward()


@pytest.mark.parametrize("accumulator", ["store", "stream"])
def test_a_model_that_cannot_be_repeated_works_if_every_pose_runs_once(accumulator: str, double: Place) -> None:
    inputs = double.randn(4, 4)

    def trained(train: Callable[..., Any], **options: Any) -> Any:
        torch.manual_seed(5)
        specimen = Specimen(
            HiddenRandomness().to(double.device, double.dtype), lambda count: [row.clone() for row in inputs[:count]]
        )
        return train(specimen, COMBINATIONS["boltzmann"], lambda p: p.combined.sum(), 4, **options).gradients

    assert_same_gradients(trained(train_by_group, accumulator=accumulator), trained(train_by_full_graph))


@pytest.mark.parametrize("accumulator", ["recompute", "auto"])
def test_a_training_flag_that_changed_between(accumulator: str, double: Place) -> None:
    # It does not matter to the full graph. The second run uses the flags of the first.
    specimen = build("dropout", double)
    torch.manual_seed(3)
    prediction = MultiPose(specimen.model, "boltzmann", accumulator=accumulator)(specimen.make_poses(4))
    specimen.model.eval()
    of_both(prediction).backward()
    assert not any(module.training for module in specimen.model.modules())
    expected = train_by_full_graph(build("dropout", double), COMBINATIONS["boltzmann"], of_both, 4)
    assert_same_gradients(gradients_of(leaves_of(specimen, None)), expected.gradients)
