"""Random generators other than PyTorch's default: a differing second run is refused; `generators=` makes it equal."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradhooks

TORCH = torch.Generator()
NUMPY = np.random.default_rng(0)
LEGACY = np.random.RandomState(0)
PYTHON = random.Random(0)  # noqa: S311

SOURCES: dict[str, tuple[Callable[[], float], object]] = {
    "torch.Generator": (lambda: torch.rand((), generator=TORCH).item(), TORCH),
    "numpy.random.Generator": (NUMPY.random, NUMPY),
    "numpy.random.RandomState": (LEGACY.random_sample, LEGACY),
    "module numpy.random": (lambda: float(np.random.rand()), np.random),  # noqa: NPY002
    "random.Random": (PYTHON.random, PYTHON),
    "module random": (random.random, random),
}


class Noisy(nn.Module):
    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.draw = draw

    def forward(self, pose: Tensor) -> Tensor:
        return self.linear(pose * (1 + self.draw()))


def poses() -> list[Tensor]:
    return [torch.randn(4) for _ in range(5)]


@pytest.mark.parametrize("source", [source for source in SOURCES if not source.startswith("module")])
def test_a_second_run_that_differs_is_refused(source: str) -> None:
    """These generators are hidden in a function; global ones, and those in attributes, are found."""
    draw, _ = SOURCES[source]
    model = Noisy(draw)
    combined = gradhooks.MultiPose(model, "boltzmann", accumulator="recompute")(poses()).combined
    with pytest.raises(gradhooks.errors.ReplayError, match=r"pose \d of 5: its second run differs.*generators"):
        combined.sum().backward()
    assert model.linear.weight.grad is None


@pytest.mark.parametrize("source", SOURCES)
def test_generators_are_restored_for_the_second_run(source: str) -> None:
    draw, generator = SOURCES[source]
    model = Noisy(draw)
    scorer = gradhooks.MultiPose(model, "mean", accumulator="recompute", generators=[generator])
    seen: list[Tensor] = []
    scorer.call = lambda model, pose: seen.append(pose) or model(pose)  # type: ignore[func-returns-value]
    prediction = scorer(poses())
    prediction.combined.sum().backward()
    after = draw()
    # dy/dw = pose * (1 + noise), so the mean gradient satisfies w . g = mean of y without the bias.
    assert model.linear.weight.grad is not None
    torch.testing.assert_close(
        (model.linear.weight.grad * model.linear.weight).sum(), (prediction.per_pose - model.linear.bias).mean()
    )
    assert len(seen) == 10
    assert after not in [draw() for _ in range(3)]


@pytest.mark.parametrize("accumulator", ["store", "stream"])
def test_accumulators_without_second_run_need_no_generators(accumulator: str) -> None:
    model = Noisy(random.random)
    gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator)(poses()).combined.sum().backward()
    assert model.linear.weight.grad is not None


def test_an_object_that_is_not_a_generator_is_refused() -> None:
    with pytest.raises(TypeError, match="generators takes generators"):
        gradhooks.MultiPose(nn.Linear(4, 1), generators=[3])(poses())
