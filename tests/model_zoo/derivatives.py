"""Models that differentiate in their forward, and layers that change gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model_zoo.specimen import MOST_POSES, Place, Specimen, some_of, species


class EnergyAndForces(nn.Module):
    """Predicts from an energy and its derivative by the positions."""

    def __init__(self, prepare: Callable[[Tensor], Tensor], *, vector: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.prepare = prepare
        self.vector = vector
        self.energy = nn.Sequential(nn.Linear(3, 6), nn.Dropout(dropout), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, positions: Tensor) -> Tensor:
        positions = self.prepare(positions)
        energy = self.energy(positions).sum()
        (slope,) = torch.autograd.grad(energy, positions, create_graph=True)
        if self.vector:
            return torch.cat([energy.view(1), -slope.flatten()])
        return energy + slope.square().sum()


def _as_it_comes(positions: Tensor) -> Tensor:
    return positions


def _marked_copy(positions: Tensor) -> Tensor:
    return positions.detach().requires_grad_()


def _marked_pose(positions: Tensor) -> Tensor:
    return positions.requires_grad_()


def _derived(positions: Tensor) -> Tensor:
    return positions * 1.5


def _learnable_positions(model: nn.Module, place: Place) -> Specimen:
    leaves = [place.randn(2, 3).requires_grad_() for _ in range(MOST_POSES)]
    return Specimen(
        model, lambda count: leaves[:count], outside={f"positions {i}": leaf for i, leaf in enumerate(leaves)}
    )


@species(bit_for_bit=False)
def forces_of_a_pose_that_requires_grad(place: Place) -> Specimen:
    return _learnable_positions(EnergyAndForces(_as_it_comes), place)


@species(bit_for_bit=False)
def forces_by_something_derived_of_the_pose(place: Place) -> Specimen:
    return _learnable_positions(EnergyAndForces(_derived), place)


@species(bit_for_bit=False)
def forces_as_vector_output(place: Place) -> Specimen:
    return _learnable_positions(EnergyAndForces(_as_it_comes, vector=True), place)


@species(bit_for_bit=False)
def forces_by_a_copy_that_the_model_marks(place: Place) -> Specimen:
    return Specimen(EnergyAndForces(_marked_copy), some_of(place.randn(MOST_POSES, 2, 3)))


@species(bit_for_bit=False)
def forces_by_the_pose_that_the_model_marks(place: Place) -> Specimen:
    return Specimen(EnergyAndForces(_marked_pose), some_of(place.randn(MOST_POSES, 2, 3)))


@species(bit_for_bit=False, same_in_every_dtype=False)
def forces_with_dropout(place: Place) -> Specimen:
    return Specimen(EnergyAndForces(_marked_copy, dropout=0.5), some_of(place.randn(MOST_POSES, 2, 3)))


class InnerStep(nn.Module):
    """Takes a gradient step on its own parameters before it predicts, as in meta-learning."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.rate = nn.Parameter(torch.tensor(0.1))

    def forward(self, pose: Tensor) -> Tensor:
        with torch.enable_grad():
            (slope,) = torch.autograd.grad((self.weight @ pose - 1).square(), self.weight, create_graph=True)
        return (self.weight - self.rate * slope) @ pose.flip(0)


@species(bit_for_bit=False)
def gradient_step_inside(place: Place) -> Specimen:
    return Specimen(InnerStep(), some_of(place.randn(MOST_POSES, 4)))


class Hooked(nn.Module):
    """Changes gradients on their way, by hooks on a module and on a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 1)
        self.first.register_full_backward_hook(_doubled)
        self.second.register_forward_pre_hook(_shifted)

    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.first(pose).tanh()
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: 3 * gradient)
        return self.second(hidden)


def _doubled(module: nn.Module, inputs: Any, outputs: Any) -> tuple[Tensor | None, ...]:
    del module, outputs
    return tuple(None if gradient is None else 2 * gradient for gradient in inputs)


def _shifted(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    del module
    return (inputs[0] + 1,)


@species()
def hooks_in_the_model(place: Place) -> Specimen:
    leaves = [place.randn(4).requires_grad_() for _ in range(MOST_POSES)]
    return Specimen(
        Hooked(), lambda count: leaves[:count], outside={f"pose {i}": leaf for i, leaf in enumerate(leaves)}
    )
