"""A leaf whose gradient cannot be intercepted is refused, and its gradient is not changed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from model_state import unchanged
from model_zoo import TensorFactory, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training_reference import ACCUMULATORS, CONCRETE_ACCUMULATORS, loss_on_both

from gradhooks import MultiPose
from gradhooks.errors import PredictionError, UnregisteredTensorError


class UsesUnregistered(nn.Module):
    """Uses a leaf that is not registered, from the pose with index `first` on."""

    def __init__(self, unregistered: Tensor, storage: str, first: int = 0, *, in_checkpoint: bool = False) -> None:
        super().__init__()
        self.net = mlp(4, 6, 4)
        self.first = first
        self.in_checkpoint = in_checkpoint
        if storage == "closure":
            self.fetch = lambda: unregistered
        elif storage == "list":
            self.plain = [unregistered]
            self.fetch = lambda: self.plain[0]
        else:
            self.__dict__["attribute"] = unregistered
            self.fetch = lambda: self.__dict__["attribute"]

    def forward(self, pose: Tensor, index: int) -> Tensor:
        features = self.net(pose)
        if index < self.first:
            return features.sum()
        if self.in_checkpoint:
            return checkpoint(lambda value: (value * self.fetch()).sum(), features, use_reentrant=True)
        return (features * self.fetch()).sum()


@pytest.fixture(params=[True, False], ids=["parameter", "tensor"])
def unregistered(request: pytest.FixtureRequest, double: TensorFactory) -> Iterator[Tensor]:
    leaf: Tensor = nn.Parameter(double.randn(4)) if request.param else double.randn(4).requires_grad_()
    yield leaf
    assert leaf.grad is None, "its gradient was changed"


@pytest.mark.parametrize("storage", ["closure", "list", "attribute"])
@pytest.mark.parametrize("accumulator", CONCRETE_ACCUMULATORS)
def test_an_unregistered_leaf(storage: str, accumulator: str, unregistered: Tensor, double: TensorFactory) -> None:
    poses = [(double.randn(4), index) for index in range(4)]
    for first in (0, 1, 3):
        model = UsesUnregistered(unregistered, storage, first).to(double.device, double.dtype)
        with unchanged(model), pytest.raises(UnregisteredTensorError, match=r"of shape \(4,\).*[Rr]egister"):
            train(model, poses, accumulator)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_an_unregistered_leaf_in_a_reentrant_checkpoint(
    accumulator: str, unregistered: Tensor, double: TensorFactory
) -> None:
    model = UsesUnregistered(unregistered, "closure", in_checkpoint=True).to(double.device, double.dtype)
    poses = [(double.randn(4), index) for index in range(4)]
    with unchanged(model), pytest.raises(UnregisteredTensorError, match=r"of shape \(4,\)"):
        train(model, poses, accumulator)


def train(model: nn.Module, poses: Any, accumulator: str) -> None:
    loss_on_both(MultiPose(model, "boltzmann", accumulator=accumulator, memory=0)(poses)).backward()


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_parameter_of_another_module_in_call(accumulator: str, double: TensorFactory) -> None:
    model, readout = (mlp(*widths).to(double.device, double.dtype) for widths in ((4, 6), (6, 1)))
    scorer = MultiPose(model, accumulator=accumulator, memory=0, call=lambda model, pose: readout(model(pose)))
    poses = list(double.randn(3, 4))
    with unchanged(model), unchanged(readout), pytest.raises(UnregisteredTensorError, match=r"\(1, 6\)"):
        scorer(poses)


class Opaque:
    """A pose without `__dict__`, whose tensors cannot be listed."""

    __slots__ = ("positions",)

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions


@pytest.mark.parametrize("index", [0, 2], ids=["the first pose", "the last pose"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_leaf_in_an_opaque_pose(index: int, accumulator: str, double: TensorFactory) -> None:
    model = mlp(4, 6, 1).to(double.device, double.dtype)
    poses = [Opaque(double.randn(4)) for _ in range(3)]
    poses[index].positions.requires_grad_()
    scorer = MultiPose(
        model, "boltzmann", accumulator=accumulator, memory=0, call=lambda model, pose: model(pose.positions)
    )
    with unchanged(model), pytest.raises(UnregisteredTensorError, match=r"of shape \(4,\)"):
        loss_on_both(scorer(poses)).backward()
    assert poses[index].positions.grad is None


class CallsBackward(nn.Module):
    """Computes forces with `backward`, which adds to the gradients of its parameters."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)
        self.first = first

    def forward(self, pose: Tensor, index: int) -> Tensor:
        if index < self.first:
            return self.net(pose)
        with torch.enable_grad():
            pose = pose.detach().requires_grad_()
            energy = self.net(pose)
            energy.sum().backward(retain_graph=True)
        assert pose.grad is not None
        return energy + pose.grad.square().sum()


class CallsBackwardBetween(nn.Sequential):
    """Calls `backward` on a part that is neither the first nor the last."""

    def forward(self, pose: Tensor, index: int) -> Tensor:
        first, second, third = self
        features = first(pose)
        with torch.enable_grad():
            second(features.detach()).sum().backward()
        return third(second(features)).sum() + index


def test_a_model_that_calls_backward_on_a_part(double: TensorFactory) -> None:
    model = CallsBackwardBetween(*(nn.Linear(4, 4) for _ in range(3))).to(double.device, double.dtype)
    poses = [(double.randn(4), index) for index in range(3)]
    for accumulator in CONCRETE_ACCUMULATORS:
        with unchanged(model), pytest.raises(PredictionError, match=r"calls backward\(\)"):
            train(model, poses, accumulator)


@pytest.mark.parametrize("first", [0, 2], ids=["from the first pose", "from the last"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_model_that_calls_backward(first: int, accumulator: str, double: TensorFactory) -> None:
    model = CallsBackward(first).to(double.device, double.dtype)
    poses = [(double.randn(4), index) for index in range(3)]
    with unchanged(model), pytest.raises(PredictionError, match=r"calls backward\(\)"):
        train(model, poses, accumulator)
