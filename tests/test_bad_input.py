"""Input that cannot be served is refused with an error that names the cause, and nothing changes."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from model_state import unchanged
from model_zoo import TensorFactory, build, mlp
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS,
    ACCUMULATORS_AND_PLAIN,
    COMBINATIONS,
    CONCRETE_ACCUMULATORS,
    Gradients,
    assert_same_gradients,
    gradients_of,
    loss_on_both,
    options_of,
    train_full_graph,
    train_multi_pose,
    trained_leaves,
)

import gradhooks
from gradhooks import MultiPose
from gradhooks.errors import CombinationError, HigherOrderError, PosesError, PredictionError


@functools.cache
def full_graph_gradients(name: str, count: int, factory: TensorFactory) -> Gradients:
    return train_full_graph(build(name, factory), COMBINATIONS["boltzmann"], loss_on_both, count).gradients


# -- derivatives of the gradient ------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_create_graph_is_refused_and_a_plain_backward_still_works(accumulator: str, double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    prediction = MultiPose(case.model, "boltzmann", **options_of(accumulator))(case.make_poses(5))
    loss = loss_on_both(prediction)
    parameters = list(case.model.parameters())
    with unchanged(case.model):
        with pytest.raises(HigherOrderError, match="create_graph"):
            loss.backward(create_graph=True)
        with pytest.raises(HigherOrderError, match="create_graph"):
            torch.autograd.grad(loss, parameters, create_graph=True)
    loss.backward()
    assert_same_gradients(gradients_of(trained_leaves(case, None)), full_graph_gradients("plain_mlp", 5, double))


@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
def test_a_second_backward_needs_retain_graph(accumulator: str, double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    combined, _ = MultiPose(case.model, "boltzmann", **options_of(accumulator))(case.make_poses(5))
    combined.sum().backward(retain_graph=True)
    combined.sum().backward()
    with unchanged(case.model), pytest.raises(RuntimeError, match="second time"):
        combined.sum().backward()


# -- groups ---------------------------------------------------------------------------------------------------------


EMPTY: dict[str, Callable[[], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda: iter(()),
    "dict": dict,
    "tensor": lambda: torch.zeros(0, 4),
    "mapping of tensors": lambda: {"pose": torch.zeros(0, 4)},
}


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_an_empty_group(accumulator: str, double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    scorer = MultiPose(case.model, "mean", accumulator=accumulator)
    for make_empty in EMPTY.values():
        with unchanged(case.model), pytest.raises(PosesError, match="there are no poses"):
            scorer(make_empty())
        with torch.no_grad(), pytest.raises(PosesError, match="there are no poses"):
            scorer(make_empty())
    result = train_multi_pose(case, COMBINATIONS["boltzmann"], loss_on_both, 4, accumulator)
    assert_same_gradients(result.gradients, full_graph_gradients("plain_mlp", 4, double))


@dataclass
class GraphBatch:
    stores: tuple[Any, ...] = ()


@pytest.mark.parametrize(
    ("poses", "message"),
    [
        (3.0, "must be an iterable of poses"),
        ("CCO", "must be an iterable of poses"),
        (GraphBatch(), "to_data_list"),
        (torch.tensor(1.0), "axis 0"),
        ({"x": torch.zeros(3, 4), "charge": 1.0}, "'charge'"),
        ({"x": torch.zeros(3, 4), "y": torch.zeros(2, 4)}, "agree in the length"),
    ],
    ids=["number", "string", "graph", "scalar", "mapping with a number", "mapping with different lengths"],
)
def test_something_that_is_not_a_group(poses: Any, message: str, single: TensorFactory) -> None:
    case = build("plain_mlp", single)
    with unchanged(case.model), pytest.raises(PosesError, match=message):
        MultiPose(case.model)(poses)


# -- outputs that are not predictions -------------------------------------------------------------------------------


class PostProcessed(nn.Module):
    def __init__(self, process: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)
        self.process = process

    def forward(self, pose: Tensor) -> Any:
        return self.process(self.net(pose))


@torch.no_grad()
def _without_graph(prediction: Tensor) -> Tensor:
    return prediction * 2


@pytest.mark.parametrize("process", [Tensor.detach, _without_graph], ids=["detach", "no_grad"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
def test_a_prediction_that_does_not_require_grad(
    process: Callable[[Tensor], Tensor], accumulator: str, double: TensorFactory
) -> None:
    model = PostProcessed(process).to(double.device, double.dtype)
    poses = list(double.randn(3, 4))
    with unchanged(model), pytest.raises(PredictionError, match=r"no prediction of the 3 poses requires grad"):
        MultiPose(model, **options_of(accumulator))(poses)


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "mapping": (lambda y: {"energy": y, "forces": y}, "'energy', 'forces'"),
    "tuple": (lambda y: (y, y), "tuple of 2"),
    "None": (lambda _: None, "NoneType"),
    "number": (lambda y: y.item(), "float"),
    "integers": (lambda y: y.long(), "int64"),
    "complex": (lambda y: y.to(torch.complex128), "complex128"),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_that_is_not_a_prediction(output: str, double: TensorFactory) -> None:
    process, message = OUTPUTS[output]
    model = PostProcessed(process).to(double.device, double.dtype)
    poses = list(double.randn(3, 4))
    for accumulator in CONCRETE_ACCUMULATORS:
        with unchanged(model), pytest.raises(PredictionError, match=message):
            MultiPose(model, accumulator=accumulator)(poses)
        with torch.no_grad(), pytest.raises(PredictionError, match=message):
            MultiPose(model, accumulator=accumulator)(poses)


@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
def test_predictions_of_different_shapes(accumulator: str, double: TensorFactory) -> None:
    model = mlp(4, 6, 1).to(double.device, double.dtype)
    poses = [double.randn(4), double.randn(1, 4), double.randn(2, 4)]
    with unchanged(model), pytest.raises(PredictionError, match=r"pose 1: .* shape \(1, 1\), that of pose 0 \(1,\)"):
        MultiPose(model, **options_of(accumulator))(poses)


@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
def test_a_chunk_without_a_row_for_each_pose(accumulator: str, double: TensorFactory) -> None:
    model = PostProcessed(Tensor.sum).to(double.device, double.dtype)
    poses = double.randn(6, 4)
    with unchanged(model), pytest.raises(PredictionError, match="3 rows"):
        MultiPose(model, chunk_size=3, **options_of(accumulator))(poses)


# -- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": torch.tanh}, TypeError, "instance of torch.nn.Module"),
        ({"model": nn.Linear}, TypeError, "instance of torch.nn.Module"),
        ({"combination": gradhooks.combinations.Mean}, TypeError, "an instance, not a class"),
        ({"combination": 3}, TypeError, "combination must be a name or an object"),
        ({"accumulator": gradhooks.accumulators.Stream}, TypeError, "an instance, not a class"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"chunk_size": -1}, ValueError, "chunk_size must be at least 1"),
        ({"tolerance": 1.0}, ValueError, "tolerance must be in"),
        ({"tolerance": -0.1}, ValueError, "tolerance must be in"),
    ],
    ids=[
        "function as model",
        "class as model",
        "class as combination",
        "number as combination",
        "class as accumulator",
        "chunk size 0",
        "negative chunk size",
        "tolerance too large",
        "tolerance too small",
    ],
)
def test_arguments_of_multi_pose(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MultiPose(**{"model": nn.Linear(1, 1), **options})


@pytest.mark.parametrize("number", [0.0, -1.0, float("nan"), float("inf")])
def test_arguments_of_combinations(number: float) -> None:
    with pytest.raises(CombinationError, match="Min: scale must be positive"):
        gradhooks.combinations.Min(scale=number)
    with pytest.raises(CombinationError, match="Boltzmann: temperature must be positive"):
        gradhooks.combinations.Boltzmann(temperature=number)


class GradientMean(gradhooks.GradientCombination):
    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.mean(0)


def test_combine_gradients_needs_scalar_predictions() -> None:
    model = mlp(4, 6, 3)
    with unchanged(model), pytest.raises(CombinationError, match=r"pose 0 has shape \(3,\).*call="):
        MultiPose(model, GradientMean())([torch.zeros(4)])
