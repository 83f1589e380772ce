"""Gradients flow through the poses into the tensors from which they are computed."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from model_zoo import ModelCase, TensorFactory, build, mlp
from model_zoo.derivatives import EnergyAndForces, set_requires_grad
from model_zoo.graphs import import_torch_geometric
from seeding import manual_seed
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    CONCRETE_ACCUMULATORS,
    Gradients,
    assert_same_gradients,
    case_label,
    gradients_of,
    loss_on_both,
    loss_on_combined,
)

import gradhooks
from gradhooks.testing import full_graph

COUNT = 5
TRAINED_COMBINATIONS = ["min", "boltzmann learnable"]


class Complex(NamedTuple):
    pocket: Tensor
    ligand: Tensor


@dataclass
class Record:
    pocket: Tensor
    ligand: Tensor
    name: str = "a"


@dataclass(frozen=True)
class FrozenRecord:
    parts: dict[str, Any]
    name: str = "a"


def data(pocket: Tensor, ligand: Tensor) -> Any:
    return import_torch_geometric()[0].Data(x=pocket, pos=ligand, name="a", number=3)


def hetero_data(pocket: Tensor, ligand: Tensor) -> Any:
    graph = import_torch_geometric()[0].HeteroData()
    graph["pocket"].x, graph["ligand"].x = pocket, ligand
    return graph


class Wrapping(NamedTuple):
    """Makes a pose from a pocket and a ligand, and returns both from a pose."""

    wrap: Callable[[Tensor, Tensor], Any]
    unwrap: Callable[[Any], tuple[Tensor, Tensor]]


WRAPPINGS: dict[str, Wrapping] = {
    "tuple": Wrapping(lambda p, x: (p, x), lambda pose: (pose[0], pose[1])),
    "list": Wrapping(lambda p, x: [p, x], lambda pose: (pose[0], pose[1])),
    "dict": Wrapping(lambda p, x: {"pocket": p, "ligand": x}, lambda pose: (pose["pocket"], pose["ligand"])),
    "ordered dict": Wrapping(lambda p, x: OrderedDict(p=p, x=x, n=None), lambda pose: (pose["p"], pose["x"])),
    "nested": Wrapping(
        lambda p, x: {"complex": ({"p": p, "charge": 1}, [x, "a"])},
        lambda pose: (pose["complex"][0]["p"], pose["complex"][1][0]),
    ),
    "namedtuple": Wrapping(Complex, lambda pose: (pose.pocket, pose.ligand)),
    "dataclass": Wrapping(Record, lambda pose: (pose.pocket, pose.ligand)),
    "frozen dataclass": Wrapping(
        lambda p, x: FrozenRecord({"both": Complex(p, x)}), lambda pose: tuple(pose.parts["both"])
    ),
    "data": Wrapping(data, lambda pose: (pose.x, pose.pos)),
    "hetero data": Wrapping(hetero_data, lambda pose: (pose["pocket"].x, pose["ligand"].x)),
    "data in tuple": Wrapping(lambda p, x: (data(p, x), "a"), lambda pose: (pose[0].x, pose[0].pos)),
}


class Pair(nn.Module):
    """An encoder that all poses share, and a model that scores its output with a ligand."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = mlp(5, 6, 4)
        self.scorer = mlp(8, 6, 1)


def train(
    factory: TensorFactory,
    combination_name: str,
    wrapping: Wrapping,
    accumulator: str | None,
    *,
    encoded: bool = True,
    leaves: bool = True,
    loss: Any = loss_on_both,
) -> tuple[Gradients, list[Tensor]]:
    """Train a group, or the full graph if `accumulator` is None.

    Returns:
        The gradients of all leaves, and those that a hook on the encoder's output received.
    """
    manual_seed(7)
    modules = Pair().to(factory.device, factory.dtype)
    pocket = factory.randn(5)
    ligands = [factory.randn(4).requires_grad_(leaves) for _ in range(COUNT)]
    combination = COMBINATIONS[combination_name]()
    encoding = modules.encoder(pocket) if encoded else pocket[:4]
    encoding_gradients: list[Tensor] = []
    if encoded:
        encoding.register_hook(encoding_gradients.append)

    def call(scorer: nn.Module, pose: Any) -> Tensor:
        return scorer(torch.cat(wrapping.unwrap(pose)))

    poses = [wrapping.wrap(encoding, ligand) for ligand in ligands]
    if accumulator is None:
        loss(full_graph(modules.scorer, poses, combination, call=call)).backward()
    else:
        loss(gradhooks.MultiPose(modules.scorer, combination, accumulator=accumulator, call=call)(poses)).backward()
    everything: dict[str, Tensor] = {**dict(modules.named_parameters())}
    everything.update({f"ligand {i}": ligand for i, ligand in enumerate(ligands)})
    everything.update(dict(combination.named_parameters()))
    return gradients_of(everything), encoding_gradients


@pytest.mark.parametrize("combination", TRAINED_COMBINATIONS)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_shared_encoding_and_a_leaf_for_each_pose(wrapping: str, combination: str, double: TensorFactory) -> None:
    expected, _ = train(double, combination, WRAPPINGS[wrapping], None)
    for accumulator in CONCRETE_ACCUMULATORS:
        with case_label(accumulator):
            result, encoding_gradients = train(double, combination, WRAPPINGS[wrapping], accumulator)
            assert_same_gradients(result, expected)
            assert len(encoding_gradients) == 1


@pytest.mark.parametrize("combination", TRAINED_COMBINATIONS)
@pytest.mark.parametrize("loss", [loss_on_combined, loss_on_both], ids=["combined", "both"])
@pytest.mark.parametrize("trained", ["encoding", "leaves", "neither"])
def test_an_encoding_or_leaves_alone(trained: str, loss: Any, combination: str, double: TensorFactory) -> None:
    options: dict[str, Any] = {"encoded": trained == "encoding", "leaves": trained == "leaves", "loss": loss}
    expected, _ = train(double, combination, WRAPPINGS["nested"], None, **options)
    for accumulator in ACCUMULATORS:
        with case_label(accumulator):
            result, encoding_gradients = train(double, combination, WRAPPINGS["nested"], accumulator, **options)
            assert_same_gradients(result, expected)
            assert len(encoding_gradients) == (trained == "encoding")


@pytest.mark.parametrize("accumulator", CONCRETE_ACCUMULATORS)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_poses_are_not_changed(wrapping: str, accumulator: str, double: TensorFactory) -> None:
    scorer = mlp(8, 6, 1).to(double.device, double.dtype)
    pocket, ligand = double.randn(4).requires_grad_(), double.randn(4)
    wrap, unwrap = WRAPPINGS[wrapping]
    pose = wrap(pocket, ligand)
    multi_pose = gradhooks.MultiPose(
        scorer, accumulator=accumulator, call=lambda model, pose: model(torch.cat(unwrap(pose)))
    )
    multi_pose([pose, pose]).combined.sum().backward()
    assert [id(tensor) for tensor in unwrap(pose)] == [id(pocket), id(ligand)]
    assert pocket.grad is not None


# -- models without parameters --------------------------------------------------------------------------------------


class Distance(nn.Module):
    def forward(self, positions: Tensor, centre: Tensor) -> Tensor:
        return (positions - centre).square().sum()


@pytest.mark.parametrize("combination", ["min", "boltzmann"])
def test_a_model_without_parameters(combination: str, double: TensorFactory) -> None:
    def train_inputs(accumulator: str | None) -> Gradients:
        manual_seed(7)
        centre = double.randn(3).requires_grad_()
        positions = [double.randn(2, 3).requires_grad_() for _ in range(COUNT)]
        poses = [(each, centre) for each in positions]
        if accumulator is None:
            loss_on_both(full_graph(Distance(), poses, COMBINATIONS[combination]())).backward()
        else:
            loss_on_both(gradhooks.MultiPose(Distance(), combination, accumulator=accumulator)(poses)).backward()
        return gradients_of({"centre": centre, **{f"{i}": each for i, each in enumerate(positions)}})

    expected = train_inputs(None)
    for accumulator in ACCUMULATORS:
        with case_label(accumulator):
            assert_same_gradients(train_inputs(accumulator), expected)


# -- models that call requires_grad_() on their poses ---------------------------------------------------------------


def force_model(factory: TensorFactory) -> ModelCase:
    manual_seed(7)
    model = EnergyAndForces(set_requires_grad).to(factory.device, factory.dtype)
    poses = [factory.randn(2, 3) for _ in range(COUNT)]
    return ModelCase(model, lambda count: poses[:count])


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("combination", TRAINED_COMBINATIONS)
def test_a_force_model_that_marks_its_poses(combination: str, accumulator: str, double: TensorFactory) -> None:
    case, plain = force_model(double), force_model(double)
    scorer = gradhooks.MultiPose(case.model, COMBINATIONS[combination](), accumulator=accumulator)
    plain_combination = COMBINATIONS[combination]()
    for _ in range(3):  # from the second group on, the poses already require grad
        loss_on_both(scorer(case.make_poses(COUNT))).backward()
        loss_on_both(full_graph(plain.model, plain.make_poses(COUNT), plain_combination)).backward()
        result, expected = (dict(module.named_parameters()) for module in (case.model, plain.model))
        result |= {"temperature": scorer.combination.log_temperature} if combination != "min" else {}
        expected |= {"temperature": plain_combination.log_temperature} if combination != "min" else {}
        assert_same_gradients(gradients_of(result), gradients_of(expected))


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_poses_that_the_model_marks_receive_no_gradient(accumulator: str, double: TensorFactory) -> None:
    case = force_model(double)
    poses = case.make_poses(COUNT)
    loss_on_both(gradhooks.MultiPose(case.model, "boltzmann", accumulator=accumulator, memory=0)(poses)).backward()
    assert [pose.grad for pose in poses] == [None] * COUNT


def test_a_frozen_force_model_predicts(double: TensorFactory) -> None:
    case = build("forces_by_a_copy_of_the_pose", double)
    case.model.requires_grad_(False)
    poses = case.make_poses(3)
    prediction = gradhooks.MultiPose(case.model, call=case.call, memory=0)(poses)
    expected = full_graph(case.model, poses, gradhooks.combinations.Mean(), call=case.call)
    assert not prediction.combined.requires_grad
    torch.testing.assert_close(prediction.combined, expected.combined.detach())
