"""Poses that carry gradients, in whatever wrapping."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model_zoo.specimen import MOST_POSES, Place, Specimen, mlp, some_of, species


class Scorer(nn.Module):
    """Scores a ligand against a pocket."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(8, 6, 1)

    def forward(self, pocket: Tensor, ligand: Tensor) -> Tensor:
        return self.net(torch.cat([pocket, ligand]))


def _encoded(place: Place) -> tuple[dict[str, Tensor], Any]:
    """A pocket encoder outside the model, and what encodes a fresh pocket."""
    encoder, pocket = mlp(5, 6, 4).to(place.device, place.dtype), place.randn(5)
    outside: dict[str, Tensor] = {f"encoder {name}": leaf for name, leaf in encoder.named_parameters()}
    return outside, lambda: encoder(pocket)


@species()
def shared_encoder_output(place: Place) -> Specimen:
    ligands = place.randn(MOST_POSES, 4)
    outside, encode = _encoded(place)

    def poses(count: int) -> list[Any]:
        pocket = encode()
        return [(pocket, ligand) for ligand in ligands[:count]]

    return Specimen(Scorer(), poses, outside)


@species()
def shared_encoder_output_and_frozen_model(place: Place) -> Specimen:
    specimen = shared_encoder_output(place)
    specimen.model.requires_grad_(False)
    return specimen


@species()
def own_encoder_output(place: Place) -> Specimen:
    ligands = place.randn(MOST_POSES, 5)
    encoder = mlp(5, 6, 4).to(place.device, place.dtype)
    outside: dict[str, Tensor] = {f"encoder {name}": leaf for name, leaf in encoder.named_parameters()}
    return Specimen(mlp(4, 6, 1), lambda count: [encoder(ligand) for ligand in ligands[:count]], outside)


@species()
def learnable_inputs(place: Place) -> Specimen:
    leaves = [place.randn(4).requires_grad_() for _ in range(MOST_POSES)]
    outside = {f"pose {i}": leaf for i, leaf in enumerate(leaves)}
    return Specimen(mlp(4, 6, 1), lambda count: leaves[:count], outside)


@species()
def learnable_input_of_some_poses(place: Place) -> Specimen:
    leaf, inputs = place.randn(4).requires_grad_(), place.randn(MOST_POSES, 4)
    return Specimen(
        mlp(4, 6, 1), lambda count: [leaf if i == 1 else row for i, row in enumerate(inputs[:count])], {"pose 1": leaf}
    )


class Unused(nn.Module):
    """Takes an input that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)

    def forward(self, pose: Tensor, ignored: Tensor) -> Tensor:
        del ignored
        return self.net(pose)


@species()
def unused_learnable_input(place: Place) -> Specimen:
    leaf, inputs = place.randn(4).requires_grad_(), place.randn(MOST_POSES, 4)
    return Specimen(Unused(), lambda count: [(row, leaf) for row in inputs[:count]], {"ignored": leaf})


class Unpacking(nn.Module):
    """Finds pocket and ligand wherever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.score = Scorer()

    def forward(self, **parts: Any) -> Tensor:
        return self.score(parts["complex"][0]["pocket"], parts["complex"][1].ligand)


class Ligand(NamedTuple):
    ligand: Tensor
    name: str


@dataclass(frozen=True)
class LigandRecord:
    ligand: Tensor
    name: str


Pair = namedtuple("Pair", ["left", "right"])  # noqa: PYI024  # users have them too


@species()
def nested_in_dict_tuple_and_namedtuple(place: Place) -> Specimen:
    return _nested(place, lambda pocket, ligand: {"complex": Pair({"pocket": pocket}, Ligand(ligand, "a"))})


@species()
def nested_in_dataclass_and_list(place: Place) -> Specimen:
    def wrap(pocket: Tensor, ligand: Tensor) -> Any:
        return OrderedDict(complex=[{"pocket": pocket, "charge": 1}, LigandRecord(ligand, "a")])

    return _nested(place, wrap)


def _nested(place: Place, wrap: Any) -> Specimen:
    ligands = [place.randn(4).requires_grad_() for _ in range(MOST_POSES)]
    outside, encode = _encoded(place)

    def poses(count: int) -> list[Any]:
        pocket = encode()
        return [wrap(pocket, ligand) for ligand in ligands[:count]]

    outside.update({f"ligand {i}": ligand for i, ligand in enumerate(ligands)})
    return Specimen(Unpacking(), poses, outside)


class Verbose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)

    def forward(self, pose: Tensor) -> dict[str, Any]:
        return {"logits": self.net(pose), "attention": None}


@species()
def output_chosen_by_call(place: Place) -> Specimen:
    return Specimen(
        Verbose(), some_of(place.randn(MOST_POSES, 4)), call=lambda model, pose: model(pose)["logits"].squeeze()
    )
