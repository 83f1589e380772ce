"""Models that remember or draw."""

import torch
from torch import Tensor, nn

from model_zoo.specimen import MOST_POSES, Place, Specimen, mlp, some_of, species


@species(same_in_every_dtype=False)
def dropout(place: Place) -> Specimen:
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 1))
    return Specimen(model, some_of(place.randn(MOST_POSES, 4)))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)

    def forward(self, pose: Tensor) -> Tensor:
        return self.net(pose + 0.1 * torch.randn_like(pose)) * torch.rand((), device=pose.device, dtype=pose.dtype)


@species(same_in_every_dtype=False)
def random_numbers_of_its_own(place: Place) -> Specimen:
    return Specimen(Noisy(), some_of(place.randn(MOST_POSES, 4)))


class Counting(nn.Module):
    """Reads what it has counted, as a schedule would."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, pose: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.net(pose) / self.calls.item()


@species()
def counting_buffer(place: Place) -> Specimen:
    return Specimen(Counting(), some_of(place.randn(MOST_POSES, 4)))


class MovingAverage(nn.Module):
    """Puts another tensor in its buffer's place at each call, and depends on the poses before."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)
        self.register_buffer("average", torch.zeros(4))

    def forward(self, pose: Tensor) -> Tensor:
        self.average = 0.5 * self.average + 0.5 * pose.detach()
        return self.net(pose - self.average)


@species()
def buffer_that_is_replaced(place: Place) -> Specimen:
    return Specimen(MovingAverage(), some_of(place.randn(MOST_POSES, 4)))


class Standardised(nn.Module):
    """Writes its buffer in place, and reads a copy of it."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, pose: Tensor) -> Tensor:
        self.scale.lerp_(pose.detach().abs(), 0.3)
        return self.net(pose * self.scale.clone())


@species()
def buffer_written_in_place(place: Place) -> Specimen:
    return Specimen(Standardised(), some_of(place.randn(MOST_POSES, 4)))
