"""What every animal of the zoo is made with."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradhooks.options import Call, call_model

MOST_POSES = 8


class Place(NamedTuple):
    """Where and how wide. Numbers are drawn in float32 whatever the width, so that they are the same in each."""

    device: torch.device
    dtype: torch.dtype

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.device, self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape).to(self.device)


@dataclass
class Specimen:
    """A model, how its poses are made, and what else is trained with it.

    Attributes:
        model: The bare model.
        make_poses: Gives a group of so many poses, up to `MOST_POSES`, the same ones each time.
        outside: Leaves that are no parameter of the model, by name: an encoder's parameters, learnable inputs.
        call: How a pose reaches the model.
        plain_call: How it does in the full graph, where that is another way.
    """

    model: nn.Module
    make_poses: Callable[[int], list[Any]]
    outside: dict[str, Tensor] = field(default_factory=dict)
    call: Call = call_model
    plain_call: Call | None = None


@dataclass(frozen=True)
class Species:
    """How a specimen is built, and what may be asked of it.

    Attributes:
        build: The factory.
        bit_for_bit: A pose uses each parameter once, so that recomputing adds up in the order of the full graph; and
            the same kernels run with a graph and without.
        same_in_every_dtype: It draws no random numbers of the dtype it runs in.
    """

    build: Callable[[Place], Specimen]
    bit_for_bit: bool
    same_in_every_dtype: bool


ZOO: dict[str, Species] = {}


def species(
    *, bit_for_bit: bool = True, same_in_every_dtype: bool = True
) -> Callable[[Callable[[Place], Specimen]], Callable[[Place], Specimen]]:
    """Put a factory into the zoo, under its own name."""

    def register(build: Callable[[Place], Specimen]) -> Callable[[Place], Specimen]:
        ZOO[build.__name__] = Species(build, bit_for_bit, same_in_every_dtype)
        return build

    return register


def build(name: str, place: Place, seed: int = 7) -> Specimen:
    """The specimen of that name, always the same one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        specimen = ZOO[name].build(place)
    if any(parameter.is_complex() for parameter in specimen.model.parameters()):
        _move_complex(specimen.model, place)
    else:
        specimen.model.to(place.device, place.dtype)
    return specimen


def _move_complex(model: nn.Module, place: Place) -> None:
    # `Module.to` would turn complex numbers real.
    for tensor in [*model.parameters(), *model.buffers()]:
        dtype = place.dtype.to_complex() if tensor.is_complex() else place.dtype
        tensor.data = tensor.data.to(place.device, dtype)


def some_of(inputs: Tensor) -> Callable[[int], list[Any]]:
    """Poses that are rows of a tensor, fresh ones for every group."""
    return lambda count: [row.clone() for row in inputs[:count]]


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.Tanh()]
    return nn.Sequential(*layers[:-1])
