"""Where a promise cannot be kept there is an error that names the cause, and nothing is lost."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from model_state import unchanged
from model_zoo import ModelCase, TensorFactory, build, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
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

import gradhooks
from gradhooks import MultiPose
from gradhooks.errors import (
    CombinationError,
    HigherOrderError,
    PosesError,
    PredictionError,
    ReplayError,
    UnregisteredTensorError,
)


def assert_still_exact(case: ModelCase, fresh: ModelCase, accumulator: str) -> None:
    """The next group of the same model is right."""
    found = train_multi_pose(case, COMBINATIONS["boltzmann"], loss_on_both, 4, accumulator)
    expected = train_full_graph(fresh, COMBINATIONS["boltzmann"], loss_on_both, 4)
    assert_same_gradients(found.gradients, expected.gradients)


# -- derivatives of the gradient ------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_create_graph_is_refused_and_a_plain_backward_still_works(accumulator: str, double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    prediction = MultiPose(case.model, "boltzmann", accumulator=accumulator)(case.make_poses(5))
    loss = loss_on_both(prediction)
    parameters = list(case.model.parameters())
    with unchanged(case.model):
        with pytest.raises(HigherOrderError, match="create_graph"):
            loss.backward(create_graph=True)
        with pytest.raises(HigherOrderError, match="create_graph"):
            torch.autograd.grad(loss, parameters, create_graph=True)
    loss.backward()
    expected = train_full_graph(build("plain_mlp", double), COMBINATIONS["boltzmann"], loss_on_both, 5)
    assert_same_gradients(gradients_of(trained_leaves(case, None)), expected.gradients)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_second_backward_needs_retain_graph(accumulator: str, double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    combined, _ = MultiPose(case.model, "boltzmann", accumulator=accumulator)(case.make_poses(5))
    combined.sum().backward(retain_graph=True)
    combined.sum().backward()
    with unchanged(case.model), pytest.raises(RuntimeError, match="second time"):
        combined.sum().backward()


# -- groups that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nothing",
    [list, tuple, lambda: iter(()), dict, lambda: torch.zeros(0, 4), lambda: {"pose": torch.zeros(0, 4)}],
    ids=["list", "tuple", "generator", "dict", "tensor", "mapping of tensors"],
)
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_an_empty_group(nothing: Callable[[], Any], accumulator: str, double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    with unchanged(case.model), pytest.raises(PosesError, match="group is empty"):
        MultiPose(case.model, "mean", accumulator=accumulator)(nothing())
    with torch.no_grad(), pytest.raises(PosesError, match="group is empty"):
        MultiPose(case.model, "mean", accumulator=accumulator)(nothing())
    assert_still_exact(case, build("plain_mlp", double), accumulator)


@dataclass
class Lonely:
    stores: tuple[Any, ...] = ()


@pytest.mark.parametrize(
    ("poses", "message"),
    [
        (3.0, "must be an iterable of poses"),
        ("CCO", "must be an iterable of poses"),
        (Lonely(), "to_data_list"),
        (torch.tensor(1.0), "axis 0"),
        ({"x": torch.zeros(3, 4), "charge": 1.0}, "'charge'"),
        ({"x": torch.zeros(3, 4), "y": torch.zeros(2, 4)}, "agree in the length"),
    ],
    ids=["number", "string", "graph", "scalar", "mapping of other things", "ragged mapping"],
)
def test_what_is_no_group(poses: Any, message: str, single: TensorFactory) -> None:
    case = build("plain_mlp", single)
    with unchanged(case.model), pytest.raises(PosesError, match=message):
        MultiPose(case.model)(poses)


@pytest.mark.parametrize("size", [2, "auto"])
def test_chunks_of_a_list_need_collate(size: Any, single: TensorFactory) -> None:
    case = build("plain_mlp", single)
    with unchanged(case.model), pytest.raises(PosesError, match="collate"):
        MultiPose(case.model, chunk_size=size)(case.make_poses(3))


# -- predictions that are none --------------------------------------------------------------------------------------


class Answering(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)
        self.answer = answer

    def forward(self, pose: Tensor) -> Any:
        return self.answer(self.net(pose))


@torch.no_grad()
def _without_graph(prediction: Tensor) -> Tensor:
    return prediction * 2


@pytest.mark.parametrize("answer", [Tensor.detach, _without_graph], ids=["detach", "no_grad"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_prediction_that_does_not_require_grad(
    answer: Callable[[Tensor], Tensor], accumulator: str, double: TensorFactory
) -> None:
    model = Answering(answer).to(double.device, double.dtype)
    poses = list(double.randn(3, 4))
    with unchanged(model), pytest.raises(PredictionError, match=r"no prediction of the 3 poses requires grad"):
        MultiPose(model, accumulator=accumulator)(poses)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda y: {"energy": y, "forces": y}, "'energy', 'forces'"),
        (lambda y: (y, y), "tuple of 2"),
        (lambda _: None, "NoneType"),
        (lambda y: y.item(), "float"),
        (lambda y: y.long(), "int64"),
        (lambda y: y.to(torch.complex128), "complex128"),
    ],
    ids=["mapping", "tuple", "none", "number", "integers", "complex"],
)
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_an_output_that_is_no_prediction(
    answer: Callable[[Tensor], Any], message: str, accumulator: str, double: TensorFactory
) -> None:
    model = Answering(answer).to(double.device, double.dtype)
    poses = list(double.randn(3, 4))
    with unchanged(model), pytest.raises(PredictionError, match=message):
        MultiPose(model, accumulator=accumulator)(poses)
    with torch.no_grad(), pytest.raises(PredictionError, match=message):
        MultiPose(model, accumulator=accumulator)(poses)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_predictions_of_different_shapes(accumulator: str, double: TensorFactory) -> None:
    model = mlp(4, 6, 1).to(double.device, double.dtype)
    poses = [double.randn(4), double.randn(1, 4), double.randn(2, 4)]
    with unchanged(model), pytest.raises(PredictionError, match=r"pose 1: .* shape \(1, 1\), that of pose 0 \(1,\)"):
        MultiPose(model, accumulator=accumulator)(poses)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_batch_without_a_row_for_each_pose(accumulator: str, double: TensorFactory) -> None:
    model = Answering(Tensor.sum).to(double.device, double.dtype)
    poses = double.randn(6, 4)
    with unchanged(model), pytest.raises(PredictionError, match="3 rows"):
        MultiPose(model, accumulator=accumulator, chunk_size=3)(poses)


# -- leaves that cannot be intercepted ------------------------------------------------------------------------------


class Stranger(nn.Module):
    """Uses something that trains and that is not registered, from the pose of that number on."""

    def __init__(self, stranger: Tensor, kept: str, first: int = 0, *, hidden: bool = False) -> None:
        super().__init__()
        self.net = mlp(4, 6, 4)
        self.first = first
        self.hidden = hidden
        if kept == "closure":
            self.fetch = lambda: stranger
        elif kept == "list":
            self.plain = [stranger]
            self.fetch = lambda: self.plain[0]
        else:
            self.__dict__["attribute"] = stranger
            self.fetch = lambda: self.__dict__["attribute"]

    def forward(self, pose: Tensor, number: int) -> Tensor:
        features = self.net(pose)
        if number < self.first:
            return features.sum()
        if self.hidden:
            return checkpoint(lambda value: (value * self.fetch()).sum(), features, use_reentrant=True)
        return (features * self.fetch()).sum()


@pytest.fixture(params=[True, False], ids=["parameter", "tensor"])
def stranger(request: pytest.FixtureRequest, double: TensorFactory) -> Iterator[Tensor]:
    leaf: Tensor = nn.Parameter(double.randn(4)) if request.param else double.randn(4).requires_grad_()
    yield leaf
    assert leaf.grad is None, "its gradient was touched"


@pytest.mark.parametrize("first", [0, 1, 3], ids=["from the first pose", "from the second", "from the last"])
@pytest.mark.parametrize("kept", ["closure", "list", "attribute"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_an_unregistered_leaf(kept: str, first: int, accumulator: str, stranger: Tensor, double: TensorFactory) -> None:
    model = Stranger(stranger, kept, first).to(double.device, double.dtype)
    poses = [(double.randn(4), number) for number in range(4)]
    with unchanged(model), pytest.raises(UnregisteredTensorError, match=r"of shape \(4,\).*[Rr]egister"):
        _train(model, poses, accumulator)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_an_unregistered_leaf_in_a_reentrant_checkpoint(
    accumulator: str, stranger: Tensor, double: TensorFactory
) -> None:
    model = Stranger(stranger, "closure", hidden=True).to(double.device, double.dtype)
    poses = [(double.randn(4), number) for number in range(4)]
    with unchanged(model), pytest.raises(UnregisteredTensorError, match=r"of shape \(4,\)"):
        _train(model, poses, accumulator)


def _train(model: nn.Module, poses: Any, accumulator: str) -> None:
    loss_on_both(MultiPose(model, "boltzmann", accumulator=accumulator)(poses)).backward()


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_another_module_in_call(accumulator: str, double: TensorFactory) -> None:
    model, readout = (mlp(*widths).to(double.device, double.dtype) for widths in ((4, 6), (6, 1)))
    scorer = MultiPose(model, accumulator=accumulator, call=lambda model, pose: readout(model(pose)))
    poses = list(double.randn(3, 4))
    with unchanged(model), unchanged(readout), pytest.raises(UnregisteredTensorError, match=r"\(1, 6\)"):
        scorer(poses)


class Opaque:
    """A pose of a type that nobody can look into."""

    __slots__ = ("positions",)

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions


@pytest.mark.parametrize("place", [0, 2], ids=["the first pose", "the last pose"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_leaf_in_an_opaque_pose(place: int, accumulator: str, double: TensorFactory) -> None:
    model = mlp(4, 6, 1).to(double.device, double.dtype)
    poses = [Opaque(double.randn(4)) for _ in range(3)]
    poses[place].positions.requires_grad_()
    scorer = MultiPose(model, "boltzmann", accumulator=accumulator, call=lambda model, pose: model(pose.positions))
    with unchanged(model), pytest.raises(UnregisteredTensorError, match=r"of shape \(4,\)"):
        loss_on_both(scorer(poses)).backward()
    assert poses[place].positions.grad is None


class CallsBackward(nn.Module):
    """Takes forces by `backward`, which adds to the gradients of its parameters."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)
        self.first = first

    def forward(self, pose: Tensor, number: int) -> Tensor:
        if number < self.first:
            return self.net(pose)
        with torch.enable_grad():
            pose = pose.detach().requires_grad_()
            energy = self.net(pose)
            energy.sum().backward(retain_graph=True)
        assert pose.grad is not None
        return energy + pose.grad.square().sum()


@pytest.mark.parametrize("first", [0, 2], ids=["from the first pose", "from the last"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_model_that_calls_backward(first: int, accumulator: str, double: TensorFactory) -> None:
    model = CallsBackward(first).to(double.device, double.dtype)
    poses = [(double.randn(4), number) for number in range(3)]
    with unchanged(model), pytest.raises(PredictionError, match=r"calls backward\(\)"):
        _train(model, poses, accumulator)


# -- changes between forward and backward ---------------------------------------------------------------------------


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


class Changing(nn.Module):
    """Changes the pose that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)

    def forward(self, pose: Tensor) -> Tensor:
        return self.net(pose.mul_(2))


class Drawing(nn.Module):
    """Draws from where nobody can put it back."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)
        self.hidden = random.Random(3)  # noqa: S311  # no secret

    def forward(self, pose: Tensor) -> Tensor:
        return self.net(pose) * self.hidden.random()


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_model_that_changes_its_pose(accumulator: str, double: TensorFactory) -> None:
    model = Changing().to(double.device, double.dtype)
    poses = list(double.randn(4, 4))
    with unchanged(model), pytest.raises(PosesError, match=r"pose 0: the model changed .* in place"):
        _train(model, poses, accumulator)


def test_a_model_that_cannot_be_repeated(double: TensorFactory) -> None:
    model = Drawing().to(double.device, double.dtype)
    prediction = MultiPose(model, "boltzmann", accumulator="recompute")(list(double.randn(4, 4)))
    with unchanged(model), pytest.raises(ReplayError, match="second run differs"):
        loss_on_both(prediction).backward()


@pytest.mark.parametrize("accumulator", ["store", "stream"])
def test_it_need_not_be_repeated_where_every_pose_runs_once(accumulator: str, double: TensorFactory) -> None:
    inputs = double.randn(4, 4)

    def trained(train: Callable[..., Any], **options: Any) -> Any:
        torch.manual_seed(5)
        case = ModelCase(
            Drawing().to(double.device, double.dtype), lambda count: [row.clone() for row in inputs[:count]]
        )
        return train(case, COMBINATIONS["boltzmann"], lambda p: p.combined.sum(), 4, **options).gradients

    assert_same_gradients(trained(train_multi_pose, accumulator=accumulator), trained(train_full_graph))


@pytest.mark.parametrize("accumulator", ["recompute", "auto"])
def test_a_training_flag_that_changed_between(accumulator: str, double: TensorFactory) -> None:
    # The full graph does not mind; a second run must either happen in the old mode or be refused.
    case = build("dropout", double)
    torch.manual_seed(3)
    prediction = MultiPose(case.model, "boltzmann", accumulator=accumulator)(case.make_poses(4))
    case.model.eval()
    loss_on_both(prediction).backward()
    assert not any(module.training for module in case.model.modules())
    expected = train_full_graph(build("dropout", double), COMBINATIONS["boltzmann"], loss_on_both, 4)
    assert_same_gradients(gradients_of(trained_leaves(case, None)), expected.gradients)


# -- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fault", "message"),
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
        "no chunk",
        "negative chunk",
        "tolerance too large",
        "tolerance too small",
    ],
)
def test_arguments(options: dict[str, Any], fault: type[Exception], message: str) -> None:
    with pytest.raises(fault, match=message):
        MultiPose(**{"model": nn.Linear(1, 1), **options})


@pytest.mark.parametrize("number", [0.0, -1.0, float("nan"), float("inf")])
def test_arguments_of_combinations(number: float) -> None:
    with pytest.raises(CombinationError, match="Min: scale must be positive"):
        gradhooks.combinations.Min(scale=number)
    with pytest.raises(CombinationError, match="Boltzmann: temperature must be positive"):
        gradhooks.combinations.Boltzmann(temperature=number)


class Clipped(gradhooks.GradientCombination):
    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.mean(0)


def test_gradients_of_poses_that_predict_several_numbers() -> None:
    model = mlp(4, 6, 3)
    with unchanged(model), pytest.raises(CombinationError, match=r"pose 0 has shape \(3,\).*call="):
        MultiPose(model, Clipped())([torch.zeros(4)])
