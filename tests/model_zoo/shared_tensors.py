"""Parameters that are used several times, by some poses only, or never."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # its usual name

from model_zoo.model_case import MOST_POSES, ModelCase, TensorFactory, mlp, model_case, rows_of


class Tied(nn.Module):
    """Has one parameter under two names, and one module under two names."""

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


@model_case(bit_for_bit=False)
def tied_weights(factory: TensorFactory) -> ModelCase:
    return ModelCase(Tied(), rows_of(factory.randn(MOST_POSES, 4)))


@model_case()
def frozen_parameters(factory: TensorFactory) -> ModelCase:
    model = mlp(4, 6, 6, 1)
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return ModelCase(model, rows_of(factory.randn(MOST_POSES, 4)))


class Branched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.usual = nn.Linear(4, 1)
        self.special = mlp(4, 3, 1)
        self.unused = nn.Linear(4, 1)

    def forward(self, pose: Tensor, special: bool = False, offset: float = 0.0) -> Tensor:
        prediction = self.usual(pose) + offset
        return prediction + self.special(pose) if special else prediction


@model_case()
def unused_parameters(factory: TensorFactory) -> ModelCase:
    return ModelCase(Branched(), rows_of(factory.randn(MOST_POSES, 4)))


@model_case()
def used_by_some_poses(factory: TensorFactory) -> ModelCase:
    inputs = factory.randn(MOST_POSES, 4)
    return ModelCase(Branched(), lambda count: [(row.clone(), i % 3 == 1) for i, row in enumerate(inputs[:count])])


def branch_for_some_poses(factory: TensorFactory, *, special: tuple[int, ...], offset: float) -> ModelCase:
    """Build poses of which those with an index in `special` use another branch and are `offset` higher."""
    inputs = factory.randn(MOST_POSES, 4) * 0.1

    def poses(count: int) -> list[Any]:
        chosen = [(row.clone(), i in special) for i, row in enumerate(inputs[:count])]
        return [(row, is_special, offset * is_special) for row, is_special in chosen]

    return ModelCase(Branched(), poses)


@model_case()
def used_by_high_poses_first(factory: TensorFactory) -> ModelCase:
    return branch_for_some_poses(factory, special=(0,), offset=9.0)


@model_case()
def used_by_high_poses_last(factory: TensorFactory) -> ModelCase:
    return branch_for_some_poses(factory, special=(3, 4), offset=9.0)


@model_case()
def used_by_low_poses_only(factory: TensorFactory) -> ModelCase:
    return branch_for_some_poses(factory, special=(2,), offset=-9.0)


class ConstantPoses(nn.Module):
    """Returns some predictions that depend on no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.usual = nn.Linear(4, 1)

    def forward(self, pose: Tensor, constant: bool) -> Tensor:
        return pose[:1] if constant else self.usual(pose)


@model_case()
def constant_predictions_first(factory: TensorFactory) -> ModelCase:
    inputs = factory.randn(MOST_POSES, 4)
    return ModelCase(
        ConstantPoses(), lambda count: [(row.clone(), i < count // 2) for i, row in enumerate(inputs[:count])]
    )


@model_case()
def constant_predictions_last(factory: TensorFactory) -> ModelCase:
    inputs = factory.randn(MOST_POSES, 4)
    return ModelCase(ConstantPoses(), lambda count: [(row.clone(), i > 0) for i, row in enumerate(inputs[:count])])


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])
        self.named = nn.ParameterDict({"gain": nn.Parameter(torch.tensor(1.5)), "shift": nn.Parameter(torch.randn(4))})

    def forward(self, pose: Tensor) -> Tensor:
        for layer in self.layers:
            pose = torch.tanh(layer @ pose)
        return (self.named["gain"] * pose + self.named["shift"]).sum()


@model_case()
def parameter_containers(factory: TensorFactory) -> ModelCase:
    return ModelCase(Listed(), rows_of(factory.randn(MOST_POSES, 4)))


class Expanded(nn.Module):
    """Its gradients are expanded tensors, whose elements share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, pose: Tensor) -> Tensor:
        return self.bias.sum() * pose.sum() + self.weight.expand(5, 3, 4).sum() + F.linear(pose, self.weight).sum()


@model_case(bit_for_bit=False)
def expanded_gradients(factory: TensorFactory) -> ModelCase:
    return ModelCase(Expanded(), rows_of(factory.randn(MOST_POSES, 4)))


class ReusedBuffer(torch.autograd.Function):
    """Writes each gradient into the same memory, as some kernels do."""

    memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}  # noqa: RUF012  # shared by all calls on purpose

    @staticmethod
    def forward(ctx: Any, pose: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(pose)
        return (pose * weight).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        (pose,) = ctx.saved_tensors
        buffer = ReusedBuffer.memory.setdefault((pose.dtype, pose.device), torch.empty_like(pose))
        return None, buffer.copy_(gradient * pose)


class Reusing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, pose: Tensor) -> Tensor:
        return ReusedBuffer.apply(pose, self.weight)


# Not in ZOO: with several poses the full graph itself is wrong, because autograd adds the gradients up later.
def reused_gradient_memory(factory: TensorFactory) -> ModelCase:
    return ModelCase(Reusing(), rows_of(factory.randn(MOST_POSES, 4)))
