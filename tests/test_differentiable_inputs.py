"""Gradients flow through the poses into whatever made them."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from model_zoo import Place, Specimen, build, mlp
from model_zoo.derivatives import EnergyAndForces, _marked_pose
from model_zoo.graphs import geometric
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    Gradients,
    assert_same_gradients,
    gradients_of,
    of_both,
    of_combined,
)

import gradhooks
from gradhooks.testing import full_graph

COUNT = 5
COMBINED_BY = ["min", "boltzmann learnable"]


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
    return geometric()[0].Data(x=pocket, pos=ligand, name="a", number=3)


def hetero_data(pocket: Tensor, ligand: Tensor) -> Any:
    graph = geometric()[0].HeteroData()
    graph["pocket"].x, graph["ligand"].x = pocket, ligand
    return graph


class Wrapping(NamedTuple):
    """How pocket and ligand become a pose, and how they are found in it."""

    wrap: Callable[[Tensor, Tensor], Any]
    find: Callable[[Any], tuple[Tensor, Tensor]]


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
    """A shared encoder, and a model that scores its output with a ligand."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = mlp(5, 6, 4)
        self.scorer = mlp(8, 6, 1)


def trained(
    place: Place,
    combination: str,
    wrapping: Wrapping,
    accumulator: str | None,
    *,
    encoded: bool = True,
    leaves: bool = True,
    loss: Any = of_both,
) -> tuple[Gradients, list[Tensor]]:
    """What a group, or with no accumulator the full graph, leaves everywhere, and what came back to the pocket."""
    torch.manual_seed(7)
    modules = Pair().to(place.device, place.dtype)
    pocket = place.randn(5)
    ligands = [place.randn(4).requires_grad_(leaves) for _ in range(COUNT)]
    made = COMBINATIONS[combination]()
    encoding = modules.encoder(pocket) if encoded else pocket[:4]
    came_back: list[Tensor] = []
    if encoded:
        encoding.register_hook(came_back.append)

    def call(scorer: nn.Module, pose: Any) -> Tensor:
        return scorer(torch.cat(wrapping.find(pose)))

    poses = [wrapping.wrap(encoding, ligand) for ligand in ligands]
    if accumulator is None:
        loss(full_graph(modules.scorer, poses, made, call=call)).backward()
    else:
        loss(gradhooks.MultiPose(modules.scorer, made, accumulator=accumulator, call=call)(poses)).backward()
    everything: dict[str, Tensor] = {**dict(modules.named_parameters())}
    everything.update({f"ligand {i}": ligand for i, ligand in enumerate(ligands)})
    everything.update(dict(made.named_parameters()))
    return gradients_of(everything), came_back


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("combination", COMBINED_BY)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_shared_encoding_and_a_leaf_for_each_pose(
    wrapping: str, combination: str, accumulator: str, double: Place
) -> None:
    found, came_back = trained(double, combination, WRAPPINGS[wrapping], accumulator)
    expected, _ = trained(double, combination, WRAPPINGS[wrapping], None)
    assert_same_gradients(found, expected)
    assert len(came_back) == 1


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("combination", COMBINED_BY)
@pytest.mark.parametrize("loss", [of_combined, of_both], ids=["combined", "both"])
@pytest.mark.parametrize("which", ["encoding", "leaves", "neither"])
def test_one_of_them(which: str, loss: Any, combination: str, accumulator: str, double: Place) -> None:
    options: dict[str, Any] = {"encoded": which == "encoding", "leaves": which == "leaves", "loss": loss}
    found, came_back = trained(double, combination, WRAPPINGS["nested"], accumulator, **options)
    expected, _ = trained(double, combination, WRAPPINGS["nested"], None, **options)
    assert_same_gradients(found, expected)
    assert len(came_back) == (which == "encoding")


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_poses_are_not_changed(wrapping: str, accumulator: str, double: Place) -> None:
    scorer = mlp(8, 6, 1).to(double.device, double.dtype)
    pocket, ligand = double.randn(4).requires_grad_(), double.randn(4)
    wrap, find = WRAPPINGS[wrapping]
    pose = wrap(pocket, ligand)
    multi_pose = gradhooks.MultiPose(
        scorer, accumulator=accumulator, call=lambda model, pose: model(torch.cat(find(pose)))
    )
    multi_pose([pose, pose]).combined.sum().backward()
    assert [id(tensor) for tensor in find(pose)] == [id(pocket), id(ligand)]
    assert pocket.grad is not None


# -- stacks ---------------------------------------------------------------------------------------------------------


class Scorer(nn.Module):
    """Takes one pose or a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(8, 6, 1)

    def forward(self, pocket: Tensor, ligand: Tensor) -> Tensor:
        return self.net(torch.cat([pocket, ligand], -1))


STACKED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "mapping": lambda pockets, ligands: {"pocket": pockets, "ligand": ligands},
    "mapping, one part of it": lambda pockets, ligands: {"pocket": pockets, "ligand": ligands.detach()},
    "mapping, one tensor under two names": lambda pockets, _: {"pocket": pockets, "ligand": pockets},
    "ordered mapping": lambda pockets, ligands: OrderedDict(ligand=ligands, pocket=pockets),
    "tensor": lambda pockets, ligands: torch.cat([pockets, ligands], 1),
}


@pytest.mark.parametrize("size", [1, 2, 3, COUNT + 1])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("stacked", STACKED)
def test_stacks_that_require_grad(stacked: str, accumulator: str, size: int, double: Place) -> None:
    gradients = []
    for of_group in (True, False):
        torch.manual_seed(7)
        encoder, scorer = (module.to(double.device, double.dtype) for module in (mlp(5, 6, 4), Scorer()))
        leaf, ligands = double.randn(COUNT, 5).requires_grad_(), double.randn(COUNT, 4).requires_grad_()
        pockets = encoder(leaf)
        came_back: list[Tensor] = []
        pockets.register_hook(came_back.append)
        stack = STACKED[stacked](pockets, ligands)
        made = COMBINATIONS["boltzmann learnable"]()
        model = scorer.net if isinstance(stack, Tensor) else scorer
        if of_group:
            group_scorer = gradhooks.MultiPose(model, made, accumulator=accumulator, chunk_size=size)
            of_both(group_scorer(stack)).backward()
        else:
            rows = model(stack) if isinstance(stack, Tensor) else model(**stack)
            of_both(gradhooks.MultiPosePrediction(made(rows), rows)).backward()
        everything = {**dict(encoder.named_parameters()), **dict(scorer.named_parameters(prefix="scorer"))}
        gradients.append(
            gradients_of({**everything, "leaf": leaf, "ligands": ligands, **dict(made.named_parameters())})
        )
        assert len(came_back) == 1
    assert_same_gradients(*gradients)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_batches_that_are_collated_of_poses_that_require_grad(accumulator: str, double: Place) -> None:
    gradients = []
    for chunk_size in (None, 1, 2, COUNT):
        torch.manual_seed(7)
        modules = Pair().to(double.device, double.dtype)
        encoding = modules.encoder(double.randn(5))
        ligands = [double.randn(4).requires_grad_() for _ in range(COUNT)]
        poses = [torch.cat([encoding, ligand]) for ligand in ligands]
        if chunk_size is None:
            of_both(full_graph(modules.scorer, poses, gradhooks.combinations.Boltzmann())).backward()
        else:
            options: dict[str, Any] = {"chunk_size": chunk_size, "collate": torch.stack}
            scorer = gradhooks.MultiPose(modules.scorer, "boltzmann", accumulator=accumulator, **options)
            of_both(scorer(poses)).backward()
        leaves: dict[str, Tensor] = {**dict(modules.named_parameters()), **{f"{i}": x for i, x in enumerate(ligands)}}
        gradients.append(gradients_of(leaves))
    for found in gradients[1:]:
        assert_same_gradients(found, gradients[0])


# -- inputs and nothing else ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("combination", ["min", "boltzmann"])
def test_a_model_without_parameters(combination: str, accumulator: str, double: Place) -> None:
    class Distance(nn.Module):
        def forward(self, positions: Tensor, centre: Tensor) -> Tensor:
            return (positions - centre).square().sum()

    gradients = []
    for of_group in (True, False):
        torch.manual_seed(7)
        centre = double.randn(3).requires_grad_()
        positions = [double.randn(2, 3).requires_grad_() for _ in range(COUNT)]
        poses = [(each, centre) for each in positions]
        if of_group:
            of_both(gradhooks.MultiPose(Distance(), combination, accumulator=accumulator)(poses)).backward()
        else:
            of_both(full_graph(Distance(), poses, COMBINATIONS[combination]())).backward()
        gradients.append(gradients_of({"centre": centre, **{f"{i}": each for i, each in enumerate(positions)}}))
    assert_same_gradients(*gradients)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_the_same_pose_twice(accumulator: str, double: Place) -> None:
    gradients = []
    for of_group in (True, False):
        torch.manual_seed(7)
        model, leaf = mlp(4, 6, 1).to(double.device, double.dtype), double.randn(4).requires_grad_()
        poses = [leaf, double.randn(4), leaf, leaf[:], leaf * 2]
        if of_group:
            of_both(gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator)(poses)).backward()
        else:
            of_both(full_graph(model, poses, gradhooks.combinations.Boltzmann())).backward()
        gradients.append(gradients_of({**dict(model.named_parameters()), "leaf": leaf}))
    assert_same_gradients(*gradients)


# -- poses that the model marks -------------------------------------------------------------------------------------


def marking(place: Place) -> Specimen:
    torch.manual_seed(7)
    model = EnergyAndForces(_marked_pose).to(place.device, place.dtype)
    poses = [place.randn(2, 3) for _ in range(COUNT)]
    return Specimen(model, lambda count: poses[:count])


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("combination", COMBINED_BY)
def test_poses_that_a_force_model_marks(combination: str, accumulator: str, double: Place) -> None:
    specimen, plain = marking(double), marking(double)
    scorer = gradhooks.MultiPose(specimen.model, COMBINATIONS[combination](), accumulator=accumulator)
    made = COMBINATIONS[combination]()
    for _ in range(3):  # from the second group on, the poses come marked
        of_both(scorer(specimen.make_poses(COUNT))).backward()
        of_both(full_graph(plain.model, plain.make_poses(COUNT), made)).backward()
        found, expected = (dict(module.named_parameters()) for module in (specimen.model, plain.model))
        found |= {"temperature": scorer.combination.log_temperature} if combination != "min" else {}
        expected |= {"temperature": made.log_temperature} if combination != "min" else {}
        assert_same_gradients(gradients_of(found), gradients_of(expected))


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_mark_that_the_model_makes_receives_nothing(accumulator: str, double: Place) -> None:
    specimen = marking(double)
    poses = specimen.make_poses(COUNT)
    of_both(gradhooks.MultiPose(specimen.model, "boltzmann", accumulator=accumulator)(poses)).backward()
    assert [pose.grad for pose in poses] == [None] * COUNT


def test_a_frozen_model_of_forces_predicts(double: Place) -> None:
    specimen = build("forces_by_a_copy_that_the_model_marks", double)
    specimen.model.requires_grad_(False)
    poses = specimen.make_poses(3)
    prediction = gradhooks.MultiPose(specimen.model, call=specimen.call)(poses)
    expected = full_graph(specimen.model, poses, gradhooks.combinations.Mean(), call=specimen.call)
    assert not prediction.combined.requires_grad
    torch.testing.assert_close(prediction.combined, expected.combined.detach())
