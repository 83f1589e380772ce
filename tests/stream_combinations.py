"""Combinations with declarations for the accumulator "stream", and the warnings about wrong ones."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import gradhooks
from gradhooks import StreamWeights
from gradhooks.accumulators.declaration_warning import forget_warnings
from gradhooks.errors import GradhooksWarning

Declare = Callable[[Tensor], StreamWeights | None]


@contextmanager
def gradhooks_warnings() -> Iterator[list[str]]:
    """Collect the messages of every `GradhooksWarning`, also of known ones; any other warning is an error."""
    forget_warnings()
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages.extend(str(warning.message) for warning in caught if warning.category is GradhooksWarning)
    assert len(messages) == len(caught), [str(warning.message) for warning in caught]


TEMPERATURE = 0.7


class Thermal(gradhooks.Combination):
    """A thermal average, and any declaration for it."""

    def __init__(self, declare: Declare) -> None:
        super().__init__()
        self.declare = declare

    def forward(self, predictions: Tensor) -> Tensor:
        return (torch.softmax(-predictions / TEMPERATURE, 0) * predictions).sum(0)

    def stream_weights(self, predictions: Tensor) -> StreamWeights | None:
        return self.declare(predictions)


def declare_thermal(y: Tensor) -> StreamWeights:
    return StreamWeights(-y / TEMPERATURE, y / TEMPERATURE)


class NoisyOr(gradhooks.Combination):
    """`h = 1 - prod_i (1 - p_i)`, with `dh/dp_i = (1 - h) / (1 - p_i)`."""

    def forward(self, predictions: Tensor) -> Tensor:
        return -torch.expm1(torch.log1p(-predictions).sum(0))

    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        return StreamWeights(-torch.log1p(-predictions))


class LinearSoftmax(gradhooks.Combination):
    """`h = sum_i p_i^2 / sum_i p_i`, with `dh/dp_i = (2 p_i - h) / sum_j p_j`."""

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.square().sum(0) / predictions.sum(0)

    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        return StreamWeights(features=predictions)


class GeneralisedMean(gradhooks.Combination):
    """`h = (mean_i p_i^r)^(1/r)`, with `dh/dp_i = h^(1 - r) p_i^(r - 1) / N`."""

    def __init__(self, power: float = 3.0) -> None:
        super().__init__()
        self.power = power

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.pow(self.power).mean(0).pow(1 / self.power)

    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        return StreamWeights((self.power - 1) * predictions.log())


DECLARED: dict[str, Callable[[], gradhooks.Combination]] = {
    "mean": gradhooks.combinations.Mean,
    "min": gradhooks.combinations.Min,
    "max of scale 1": lambda: gradhooks.combinations.Max(scale=1.0),
    "boltzmann": gradhooks.combinations.Boltzmann,
    "hot boltzmann": lambda: gradhooks.combinations.Boltzmann(50.0),
    "noisy-or": NoisyOr,
    "linear softmax": LinearSoftmax,
    "generalised mean": GeneralisedMean,
    "harmonic mean": lambda: GeneralisedMean(-1.0),
    "thermal": lambda: Thermal(declare_thermal),
}
