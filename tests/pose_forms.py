"""A group in all the forms that MultiPose takes, and the gradients that each must give."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from model_zoo import TensorFactory, mlp
from seeding import manual_seed
from torch import Tensor, nn
from training_reference import COMBINATIONS, Gradients, assert_same_gradients, gradients_of, loss_on_both

from gradhooks.testing import full_graph

COUNT = 5


class ShiftedMlp(nn.Module):
    """Takes its inputs by position or by keyword, one pose or a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)

    def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return self.net(x + shift)


@dataclass
class Pose:
    x: Tensor
    shift: Tensor


class PlainDataset:
    """Has the methods of a `torch.utils.data.Dataset`, and is neither a sequence nor an iterator."""

    def __init__(self, poses: list[Any]) -> None:
        self.poses = poses

    def __getitem__(self, index: int) -> Any:
        return self.poses[index]

    def __len__(self) -> int:
        return len(self.poses)


class StackDataset(torch.utils.data.Dataset[Any]):
    """A dataset of PyTorch, which ends with the IndexError of the tensor that it indexes."""

    def __init__(self, stack: Tensor) -> None:
        self.stack = stack

    def __getitem__(self, index: int) -> Tensor:
        return self.stack[index]

    def __len__(self) -> int:
        return len(self.stack)


def generate(rows: Tensor) -> Iterator[Tensor]:
    yield from rows


# Make a group from rows x and their shifts s, both of shape (COUNT, 4).
FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "list of tensors": lambda x, s: list(x + s),
    "tuple of tensors": lambda x, s: tuple(x + s),
    "list of tuples": lambda x, s: list(zip(x, s, strict=True)),
    "list of tuples of one": lambda x, s: [(pose,) for pose in x + s],
    "list of mappings": lambda x, s: [{"x": a, "shift": b} for a, b in zip(x, s, strict=True)],
    "list of read-only mappings": lambda x, s: [
        MappingProxyType({"x": a, "shift": b}) for a, b in zip(x, s, strict=True)
    ],
    "list of ordered mappings": lambda x, s: [OrderedDict(shift=b, x=a) for a, b in zip(x, s, strict=True)],
    "list of tuples, mappings and tensors": lambda x, s: [(x[0], s[0]), {"x": x[1], "shift": s[1]}, *(x + s)[2:]],
    "generator": lambda x, s: generate(x + s),
    "map": lambda x, s: map(torch.add, x, s),
    "zip": lambda x, s: zip(x, s, strict=True),
    "dataset": lambda x, s: PlainDataset(list(x + s)),
    "dataset of tuples": lambda x, s: PlainDataset(list(zip(x, s, strict=True))),
    "dataset of PyTorch": lambda x, s: StackDataset(x + s),
    "data loader": lambda x, s: torch.utils.data.DataLoader(StackDataset(x + s), batch_size=None),
    "values of a mapping": lambda x, s: dict(enumerate(x + s)).values(),
    "stacked tensor": lambda x, s: x + s,
    "mapping of stacked tensors": lambda x, s: {"x": x, "shift": s},
    "ordered mapping of stacked tensors": lambda x, s: OrderedDict(shift=s, x=x),
}


def random_rows(factory: TensorFactory, count: int = COUNT) -> tuple[Tensor, Tensor]:
    manual_seed(5)
    return factory.randn(count, 4), factory.randn(count, 4)


def make_model(factory: TensorFactory) -> nn.Module:
    manual_seed(7)
    return ShiftedMlp().to(factory.device, factory.dtype)


@functools.cache
def full_graph_gradients(factory: TensorFactory) -> Gradients:
    model = make_model(factory)
    loss_on_both(full_graph(model, torch.add(*random_rows(factory)), COMBINATIONS["boltzmann"]())).backward()
    return gradients_of(dict(model.named_parameters()))


def assert_gradients_of_full_graph(model: nn.Module, factory: TensorFactory) -> None:
    assert_same_gradients(gradients_of(dict(model.named_parameters())), full_graph_gradients(factory))
