"""Models that call autograd in their forward, and hooks that change gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model_zoo.model_case import MOST_POSES, ModelCase, TensorFactory, model_case, rows_of


class EnergyAndForces(nn.Module):
    """Predicts from an energy and its derivative with respect to the positions."""

    def __init__(self, prepare: Callable[[Tensor], Tensor], *, vector: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.prepare = prepare
        self.vector = vector
        self.energy = nn.Sequential(nn.Linear(3, 6), nn.Dropout(dropout), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, positions: Tensor) -> Tensor:
        positions = self.prepare(positions)
        energy = self.energy(positions).sum()
        (gradient,) = torch.autograd.grad(energy, positions, create_graph=True)
        if self.vector:
            return torch.cat([energy.view(1), -gradient.flatten()])
        return energy + gradient.square().sum()


def _unchanged(positions: Tensor) -> Tensor:
    return positions


def _copy_that_requires_grad(positions: Tensor) -> Tensor:
    return positions.detach().requires_grad_()


def set_requires_grad(positions: Tensor) -> Tensor:
    return positions.requires_grad_()


def _scaled(positions: Tensor) -> Tensor:
    return positions * 1.5


def _learnable_positions(model: nn.Module, factory: TensorFactory) -> ModelCase:
    leaves = [factory.randn(2, 3).requires_grad_() for _ in range(MOST_POSES)]
    return ModelCase(
        model, lambda count: leaves[:count], outside={f"positions {i}": leaf for i, leaf in enumerate(leaves)}
    )


@model_case(bit_for_bit=False)
def forces_of_a_pose_that_requires_grad(factory: TensorFactory) -> ModelCase:
    return _learnable_positions(EnergyAndForces(_unchanged), factory)


@model_case(bit_for_bit=False)
def forces_by_a_function_of_the_pose(factory: TensorFactory) -> ModelCase:
    return _learnable_positions(EnergyAndForces(_scaled), factory)


@model_case(bit_for_bit=False)
def forces_as_vector_output(factory: TensorFactory) -> ModelCase:
    return _learnable_positions(EnergyAndForces(_unchanged, vector=True), factory)


@model_case(bit_for_bit=False)
def forces_by_a_copy_of_the_pose(factory: TensorFactory) -> ModelCase:
    return ModelCase(EnergyAndForces(_copy_that_requires_grad), rows_of(factory.randn(MOST_POSES, 2, 3)))


@model_case(bit_for_bit=False)
def forces_with_requires_grad_set_on_the_pose(factory: TensorFactory) -> ModelCase:
    return ModelCase(EnergyAndForces(set_requires_grad), rows_of(factory.randn(MOST_POSES, 2, 3)))


@model_case(bit_for_bit=False, same_in_every_dtype=False)
def forces_with_dropout(factory: TensorFactory) -> ModelCase:
    return ModelCase(EnergyAndForces(_copy_that_requires_grad, dropout=0.5), rows_of(factory.randn(MOST_POSES, 2, 3)))


class InnerStep(nn.Module):
    """Takes a gradient step on its own parameters before it predicts, as in meta-learning."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.rate = nn.Parameter(torch.tensor(0.1))

    def forward(self, pose: Tensor) -> Tensor:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad((self.weight @ pose - 1).square(), self.weight, create_graph=True)
        return (self.weight - self.rate * gradient) @ pose.flip(0)


@model_case(bit_for_bit=False)
def gradient_step_in_forward(factory: TensorFactory) -> ModelCase:
    return ModelCase(InnerStep(), rows_of(factory.randn(MOST_POSES, 4)))


class Hooked(nn.Module):
    """Changes gradients by hooks on a module and on a tensor."""

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


@model_case()
def hooks_in_the_model(factory: TensorFactory) -> ModelCase:
    leaves = [factory.randn(4).requires_grad_() for _ in range(MOST_POSES)]
    return ModelCase(
        Hooked(), lambda count: leaves[:count], outside={f"pose {i}": leaf for i, leaf in enumerate(leaves)}
    )
