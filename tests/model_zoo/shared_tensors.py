"""Parameters that are used twice, seldom, or never."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # its usual name

from model_zoo.specimen import MOST_POSES, Place, Specimen, mlp, some_of, species


class Tied(nn.Module):
    """One parameter under two names, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 4)
        self.decode.weight = self.encode.weight
        self.again = self.encode
        self.head = nn.Linear(4, 1)

    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.decode(self.encode(pose).tanh())
        return self.head(self.again(hidden).tanh() @ self.encode.weight.t())


@species(bit_for_bit=False)
def tied_weights(place: Place) -> Specimen:
    return Specimen(Tied(), some_of(place.randn(MOST_POSES, 4)))


@species()
def frozen_parameters(place: Place) -> Specimen:
    model = mlp(4, 6, 6, 1)
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return Specimen(model, some_of(place.randn(MOST_POSES, 4)))


class Branched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.usual = nn.Linear(4, 1)
        self.special = mlp(4, 3, 1)
        self.unused = nn.Linear(4, 1)

    def forward(self, pose: Tensor, special: bool = False, offset: float = 0.0) -> Tensor:
        prediction = self.usual(pose) + offset
        return prediction + self.special(pose) if special else prediction


@species()
def unused_parameters(place: Place) -> Specimen:
    return Specimen(Branched(), some_of(place.randn(MOST_POSES, 4)))


@species()
def used_by_some_poses(place: Place) -> Specimen:
    inputs = place.randn(MOST_POSES, 4)
    return Specimen(Branched(), lambda count: [(row.clone(), i % 3 == 1) for i, row in enumerate(inputs[:count])])


def branched_by_negligible_poses(place: Place, *, special: tuple[int, ...], offset: float) -> Specimen:
    """Poses whose numbers are in `special` use the special branch, and lie `offset` above the rest."""
    inputs = place.randn(MOST_POSES, 4) * 0.1

    def poses(count: int) -> list[Any]:
        chosen = [(row.clone(), i in special) for i, row in enumerate(inputs[:count])]
        return [(row, is_special, offset * is_special) for row, is_special in chosen]

    return Specimen(Branched(), poses)


@species()
def used_by_high_poses_first(place: Place) -> Specimen:
    return branched_by_negligible_poses(place, special=(0,), offset=9.0)


@species()
def used_by_high_poses_last(place: Place) -> Specimen:
    return branched_by_negligible_poses(place, special=(3, 4), offset=9.0)


@species()
def used_by_low_poses_only(place: Place) -> Specimen:
    return branched_by_negligible_poses(place, special=(2,), offset=-9.0)


class ConstantPoses(nn.Module):
    """Some predictions do not depend on any parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.usual = nn.Linear(4, 1)

    def forward(self, pose: Tensor, constant: bool) -> Tensor:
        return pose[:1] if constant else self.usual(pose)


@species()
def constant_predictions_first(place: Place) -> Specimen:
    inputs = place.randn(MOST_POSES, 4)
    return Specimen(
        ConstantPoses(), lambda count: [(row.clone(), i < count // 2) for i, row in enumerate(inputs[:count])]
    )


@species()
def constant_predictions_last(place: Place) -> Specimen:
    inputs = place.randn(MOST_POSES, 4)
    return Specimen(ConstantPoses(), lambda count: [(row.clone(), i > 0) for i, row in enumerate(inputs[:count])])


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])
        self.named = nn.ParameterDict({"gain": nn.Parameter(torch.tensor(1.5)), "shift": nn.Parameter(torch.randn(4))})

    def forward(self, pose: Tensor) -> Tensor:
        for layer in self.layers:
            pose = torch.tanh(layer @ pose)
        return (self.named["gain"] * pose + self.named["shift"]).sum()


@species()
def parameter_containers(place: Place) -> Specimen:
    return Specimen(Listed(), some_of(place.randn(MOST_POSES, 4)))


class Expanded(nn.Module):
    """Its gradients arrive as expanded tensors, which share one number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, pose: Tensor) -> Tensor:
        return self.bias.sum() * pose.sum() + self.weight.expand(5, 3, 4).sum() + F.linear(pose, self.weight).sum()


@species(bit_for_bit=False)
def expanded_gradients(place: Place) -> Specimen:
    return Specimen(Expanded(), some_of(place.randn(MOST_POSES, 4)))


class OneBuffer(torch.autograd.Function):
    """A layer that writes each gradient into the same memory, as some kernels do."""

    memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}  # noqa: RUF012  # an attribute of the class on purpose

    @staticmethod
    def forward(ctx: Any, pose: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(pose)
        return (pose * weight).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        (pose,) = ctx.saved_tensors
        buffer = OneBuffer.memory.setdefault((pose.dtype, pose.device), torch.empty_like(pose))
        return None, buffer.copy_(gradient * pose)


class Reusing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, pose: Tensor) -> Tensor:
        return OneBuffer.apply(pose, self.weight)


# No species: through the full graph such a layer is wrong with more than one pose (the engine adds up lazily).
def reused_gradient_memory(place: Place) -> Specimen:
    return Specimen(Reusing(), some_of(place.randn(MOST_POSES, 4)))
