"""Models with buffers that change, or random numbers."""

import torch
from torch import Tensor, nn

from model_zoo.model_case import MOST_POSES, ModelCase, TensorFactory, mlp, model_case, rows_of


@model_case(same_in_every_dtype=False)
def dropout(factory: TensorFactory) -> ModelCase:
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 1))
    return ModelCase(model, rows_of(factory.randn(MOST_POSES, 4)))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)

    def forward(self, pose: Tensor) -> Tensor:
        return self.net(pose + 0.1 * torch.randn_like(pose)) * torch.rand((), device=pose.device, dtype=pose.dtype)


@model_case(same_in_every_dtype=False)
def random_numbers_in_forward(factory: TensorFactory) -> ModelCase:
    return ModelCase(Noisy(), rows_of(factory.randn(MOST_POSES, 4)))


class Counting(nn.Module):
    """Depends on the number of its forwards, as a schedule would."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, pose: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.net(pose) / self.calls.item()


@model_case()
def counting_buffer(factory: TensorFactory) -> ModelCase:
    return ModelCase(Counting(), rows_of(factory.randn(MOST_POSES, 4)))


class MovingAverage(nn.Module):
    """Replaces its buffer at each call, and depends on the poses before."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)
        self.register_buffer("average", torch.zeros(4))

    def forward(self, pose: Tensor) -> Tensor:
        self.average = 0.5 * self.average + 0.5 * pose.detach()
        return self.net(pose - self.average)


@model_case()
def buffer_that_is_replaced(factory: TensorFactory) -> ModelCase:
    return ModelCase(MovingAverage(), rows_of(factory.randn(MOST_POSES, 4)))


class Standardised(nn.Module):
    """Changes its buffer in place, and reads a copy of it."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, pose: Tensor) -> Tensor:
        self.scale.lerp_(pose.detach().abs(), 0.3)
        return self.net(pose * self.scale.clone())


@model_case()
def buffer_written_in_place(factory: TensorFactory) -> ModelCase:
    return ModelCase(Standardised(), rows_of(factory.randn(MOST_POSES, 4)))
