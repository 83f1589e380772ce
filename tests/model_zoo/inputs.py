"""Poses that require grad, also nested in containers."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model_zoo.model_case import MOST_POSES, ModelCase, TensorFactory, mlp, model_case, rows_of


class Scorer(nn.Module):
    """Scores a ligand against a pocket."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(8, 6, 1)

    def forward(self, pocket: Tensor, ligand: Tensor) -> Tensor:
        return self.net(torch.cat([pocket, ligand]))


def _encoded(factory: TensorFactory) -> tuple[dict[str, Tensor], Any]:
    """Return the leaves of a pocket encoder outside the model, and a function that encodes the pocket anew."""
    encoder, pocket = mlp(5, 6, 4).to(factory.device, factory.dtype), factory.randn(5)
    outside: dict[str, Tensor] = {f"encoder {name}": leaf for name, leaf in encoder.named_parameters()}
    return outside, lambda: encoder(pocket)


@model_case()
def shared_encoder_output(factory: TensorFactory) -> ModelCase:
    ligands = factory.randn(MOST_POSES, 4)
    outside, encode = _encoded(factory)

    def poses(count: int) -> list[Any]:
        pocket = encode()
        return [(pocket, ligand) for ligand in ligands[:count]]

    return ModelCase(Scorer(), poses, outside)


@model_case()
def shared_encoder_output_and_frozen_model(factory: TensorFactory) -> ModelCase:
    case = shared_encoder_output(factory)
    case.model.requires_grad_(False)
    return case


@model_case()
def encoder_output_per_pose(factory: TensorFactory) -> ModelCase:
    ligands = factory.randn(MOST_POSES, 5)
    encoder = mlp(5, 6, 4).to(factory.device, factory.dtype)
    outside: dict[str, Tensor] = {f"encoder {name}": leaf for name, leaf in encoder.named_parameters()}
    return ModelCase(mlp(4, 6, 1), lambda count: [encoder(ligand) for ligand in ligands[:count]], outside)


@model_case()
def learnable_inputs(factory: TensorFactory) -> ModelCase:
    leaves = [factory.randn(4).requires_grad_() for _ in range(MOST_POSES)]
    outside = {f"pose {i}": leaf for i, leaf in enumerate(leaves)}
    return ModelCase(mlp(4, 6, 1), lambda count: leaves[:count], outside)


@model_case()
def learnable_input_of_some_poses(factory: TensorFactory) -> ModelCase:
    leaf, inputs = factory.randn(4).requires_grad_(), factory.randn(MOST_POSES, 4)
    return ModelCase(
        mlp(4, 6, 1), lambda count: [leaf if i == 1 else row for i, row in enumerate(inputs[:count])], {"pose 1": leaf}
    )


class Unused(nn.Module):
    """Ignores one of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)

    def forward(self, pose: Tensor, ignored: Tensor) -> Tensor:
        del ignored
        return self.net(pose)


@model_case()
def unused_learnable_input(factory: TensorFactory) -> ModelCase:
    leaf, inputs = factory.randn(4).requires_grad_(), factory.randn(MOST_POSES, 4)
    return ModelCase(Unused(), lambda count: [(row, leaf) for row in inputs[:count]], {"ignored": leaf})


class Unpacking(nn.Module):
    """Reads pocket and ligand from nested containers."""

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


@model_case()
def nested_in_dict_tuple_and_namedtuple(factory: TensorFactory) -> ModelCase:
    return _nested(factory, lambda pocket, ligand: {"complex": Pair({"pocket": pocket}, Ligand(ligand, "a"))})


@model_case()
def nested_in_dataclass_and_list(factory: TensorFactory) -> ModelCase:
    def wrap(pocket: Tensor, ligand: Tensor) -> Any:
        return OrderedDict(complex=[{"pocket": pocket, "charge": 1}, LigandRecord(ligand, "a")])

    return _nested(factory, wrap)


def _nested(factory: TensorFactory, wrap: Any) -> ModelCase:
    ligands = [factory.randn(4).requires_grad_() for _ in range(MOST_POSES)]
    outside, encode = _encoded(factory)

    def poses(count: int) -> list[Any]:
        pocket = encode()
        return [wrap(pocket, ligand) for ligand in ligands[:count]]

    outside.update({f"ligand {i}": ligand for i, ligand in enumerate(ligands)})
    return ModelCase(Unpacking(), poses, outside)


class Verbose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)

    def forward(self, pose: Tensor) -> dict[str, Any]:
        return {"logits": self.net(pose), "attention": None}


@model_case()
def output_chosen_by_call(factory: TensorFactory) -> ModelCase:
    return ModelCase(
        Verbose(), rows_of(factory.randn(MOST_POSES, 4)), call=lambda model, pose: model(pose)["logits"].squeeze()
    )
