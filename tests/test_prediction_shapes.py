"""Predictions of any shape are combined; outputs that are not tensors need `call=`."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from model_state import unchanged
from model_zoo import ModelCase, TensorFactory, mlp
from seeding import manual_seed
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    CONCRETE_ACCUMULATORS,
    assert_same_gradients,
    case_label,
    loss_on_both,
    train_full_graph,
    train_multi_pose,
)

from gradhooks import MultiPose
from gradhooks.errors import PredictionError

COUNT = 5
SHAPES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "()": ((), lambda y: y[..., 0]),
    "(1,)": ((1,), lambda y: y[..., :1]),
    "(1, 1)": ((1, 1), lambda y: y[..., :1, None]),
    "(3,)": ((3,), lambda y: y),
    "(3, 1)": ((3, 1), lambda y: y[..., None]),
    "(1, 3)": ((1, 3), lambda y: y[..., None, :]),
}


class Shaping(nn.Module):
    def __init__(self, shape: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net = mlp(4, 6, 3)
        self.shape = shape

    def forward(self, pose: Tensor) -> Any:
        return self.shape(self.net(pose))


def shaping_case(factory: TensorFactory, shape: Callable[[Tensor], Any]) -> ModelCase:
    manual_seed(7)
    model = Shaping(shape).to(factory.device, factory.dtype)
    poses = factory.randn(COUNT, 4)
    return ModelCase(model, lambda count: list(poses[:count]))


@pytest.mark.parametrize("combination", ["mean", "boltzmann learnable"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape: str, combination: str, double: TensorFactory) -> None:
    expected_shape, change = SHAPES[shape]
    make_combination = COMBINATIONS[combination]
    expected = train_full_graph(shaping_case(double, change), make_combination, loss_on_both, COUNT)
    options: dict[str, Any]
    for accumulator in CONCRETE_ACCUMULATORS:
        for options in ({}, {"chunk_size": 2, "collate": torch.stack}):
            case = shaping_case(double, change)
            result = train_multi_pose(case, make_combination, loss_on_both, COUNT, accumulator, **options)
            combined, per_pose = result.prediction
            assert (combined.shape, per_pose.shape) == (expected_shape, (COUNT, *expected_shape))
            with case_label(accumulator, options):
                torch.testing.assert_close(result.prediction, expected.prediction, rtol=1e-12, atol=1e-12)
                assert_same_gradients(result.gradients, expected.gradients)


class ModelOutput(OrderedDict[str, Any]):
    """A mapping with attributes, as models of transformers return it."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@dataclass
class Output:
    logits: Tensor


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "dict": (lambda y: {"logits": y, "hidden": y}, r"dict with keys 'logits', 'hidden'"),
    "model output": (lambda y: ModelOutput(logits=y, loss=None), r"ModelOutput with keys 'logits', 'loss'"),
    "tuple": (lambda y: (y, y), r"tuple of 2"),
    "list": (lambda y: [y], r"list of 1"),
    "dataclass": (Output, r"one Output"),
    "none": (lambda _: None, r"one NoneType"),
}


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_error_describes_the_output(output: str, accumulator: str, double: TensorFactory) -> None:
    answer, message = OUTPUTS[output]
    case = shaping_case(double, answer)
    with unchanged(case.model), pytest.raises(PredictionError, match=rf"pose 0: .* {message}, .*call="):
        MultiPose(case.model, accumulator=accumulator)(case.make_poses(2))


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_call_chooses_the_prediction(accumulator: str, double: TensorFactory) -> None:
    case = shaping_case(double, OUTPUTS["model output"][0])
    case.call = lambda model, pose: model(pose).logits
    result = train_multi_pose(case, COMBINATIONS["boltzmann"], loss_on_both, COUNT, accumulator)
    expected = train_full_graph(shaping_case(double, lambda y: y), COMBINATIONS["boltzmann"], loss_on_both, COUNT)
    assert_same_gradients(result.gradients, expected.gradients)


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_later_pose_of_another_shape(accumulator: str, chunk_size: int, double: TensorFactory) -> None:
    model = Shaping(lambda y: y if y.sum() > -1e6 else y[..., :2]).to(double.device, double.dtype)
    poses = double.randn(4, 4)
    poses[2:] = -1e9
    model.net = nn.Linear(4, 3).to(double.device, double.dtype)
    nn.init.ones_(model.net.weight)
    with unchanged(model), pytest.raises(PredictionError, match=r"pose 2: .* shape \(2,\), that of pose 0 \(3,\)"):
        MultiPose(model, accumulator=accumulator, chunk_size=chunk_size)(poses)
