"""The registry of the zoo: what a model is built with, and the properties that tests depend on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from seeding import manual_seed
from torch import Tensor, nn

from gradhooks.options import Call, call_model

MOST_POSES = 8


class TensorFactory(NamedTuple):
    """Makes tensors of one device and dtype. They are drawn in float32, so that every dtype has the same numbers."""

    device: torch.device
    dtype: torch.dtype

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.device, self.dtype)

    def randint(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape).to(self.device)


@dataclass
class ModelCase:
    """A model, its poses, and the leaves that are trained with it.

    Attributes:
        model: The bare model.
        make_poses: Makes a group of `count` poses, at most `MOST_POSES`, the same ones at each call.
        outside: Leaves that are not parameters of the model, by name: an encoder's parameters, learnable inputs.
        call: Passes a pose to the model.
        plain_call: Passes a pose to the model in the full graph, if that differs from `call`.
    """

    model: nn.Module
    make_poses: Callable[[int], list[Any]]
    outside: dict[str, Tensor] = field(default_factory=dict)
    call: Call = call_model
    plain_call: Call | None = None


Builder = Callable[[TensorFactory], ModelCase]


@dataclass(frozen=True)
class ZooEntry:
    """How a case is built, and what tests may require.

    Attributes:
        build: Builds the case.
        bit_for_bit: Each pose uses each parameter once, so that recompute adds up in the order of the full graph; and
            the same kernels run with and without a graph.
        same_in_every_dtype: The model draws no random numbers, which would depend on its dtype.
    """

    build: Builder
    bit_for_bit: bool
    same_in_every_dtype: bool


ZOO: dict[str, ZooEntry] = {}


def model_case(*, bit_for_bit: bool = True, same_in_every_dtype: bool = True) -> Callable[[Builder], Builder]:
    """Register a builder in the zoo, under the name of the function."""

    def register(build: Builder) -> Builder:
        ZOO[build.__name__] = ZooEntry(build, bit_for_bit, same_in_every_dtype)
        return build

    return register


def build(name: str, factory: TensorFactory, seed: int = 7) -> ModelCase:
    """Build the case of that name, with the same numbers at each call."""
    with torch.random.fork_rng(devices=[]):  # the numbers are drawn on the CPU
        manual_seed(seed)
        case = ZOO[name].build(factory)
    if any(parameter.is_complex() for parameter in case.model.parameters()):
        _move_complex(case.model, factory)
    else:
        case.model.to(factory.device, factory.dtype)
    return case


def _move_complex(model: nn.Module, factory: TensorFactory) -> None:
    # `Module.to` would discard the imaginary parts.
    complex_dtype = factory.dtype.to_complex()
    model._apply(lambda tensor: tensor.to(factory.device, complex_dtype if tensor.is_complex() else factory.dtype))


def rows_of(inputs: Tensor) -> Callable[[int], list[Any]]:
    """Return a `make_poses` whose poses are copies of rows, new ones for every group."""
    return lambda count: [row.clone() for row in inputs[:count]]


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.Tanh()]
    return nn.Sequential(*layers[:-1])
