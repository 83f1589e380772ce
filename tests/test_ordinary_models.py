"""Ordinary models train as in the full graph, or are refused with the cause and the way out."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from module_contents import contents, seed_everything
from ordinary_models import ORDINARY, Hidden, Ordinary, Parametrized, VectorQuantizer, only_with_grad, vectors
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from training_reference import (
    ACCUMULATORS,
    ACCUMULATORS_AND_PLAIN,
    Gradients,
    assert_same_gradients,
    case_label,
    gradients_of,
    options_of,
)

import gradhooks
from gradhooks.errors import ReplayError, UnregisteredTensorError
from gradhooks.testing import full_graph

Score = Callable[[Any], gradhooks.MultiPosePrediction]
STEPS = 2


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def train(
    ordinary: Ordinary,
    scorer_of: Callable[[nn.Module], Score],
    *,
    batches: int = 1,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[list[Gradients], dict[str, Any]]:
    """Train with several batches in one loss; return the gradients of each step, and what the model holds then."""
    seed_everything(1)
    model = ordinary.make()
    score, gradients = scorer_of(model), []
    for _ in range(STEPS):
        with around():
            predictions = [score(ordinary.poses()) for _ in range(batches)]
            leaves: dict[str, Tensor] = {name: leaf for name, leaf in model.named_parameters() if not is_lazy(leaf)}
            optimizer = torch.optim.SGD(leaves.values(), lr=0.1)
            optimizer.zero_grad()
            sum((one.combined.sum() - 0.3 * number).square() for number, one in enumerate(predictions)).backward()  # type: ignore[union-attr]
        gradients.append(gradients_of(leaves))
        optimizer.step()
    return gradients, contents(model)


def assert_same_as_full_graph(ordinary: Ordinary, combination: str, accumulator: str, **settings: Any) -> None:
    combiner = gradhooks.registry.combinations.create(combination)
    found = train(ordinary, lambda model: gradhooks.MultiPose(model, combiner, **options_of(accumulator)), **settings)
    expected = train(ordinary, lambda model: lambda poses: full_graph(model, poses, combiner), **settings)
    for step, (result, wanted) in enumerate(zip(found[0], expected[0], strict=True)):
        with case_label(f"step {step}"):
            assert_same_gradients(result, wanted)
    held = {name: value for name, value in found[1].items() if " parameter " not in name}
    assert held == {name: value for name, value in expected[1].items() if " parameter " not in name}


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_model_trains_as_the_full_graph(name: str) -> None:
    for combination, batches in (("mean", 1), ("min", 2)):
        for accumulator in ACCUMULATORS_AND_PLAIN:
            with case_label(combination, batches, accumulator):
                assert_same_as_full_graph(ORDINARY[name], combination, accumulator, batches=batches)


@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
def test_cached_parametrizations(accumulator: str) -> None:
    assert_same_as_full_graph(
        Ordinary(Parametrized, vectors), "mean", accumulator, batches=2, around=parametrize.cached
    )
    assert parametrize._cache_enabled == 0
    assert parametrize._cache == {}


def test_cached_parametrizations_with_state_are_refused() -> None:
    model, poses = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 1)), vectors()
    before = contents(model)
    with parametrize.cached(), pytest.raises(ReplayError, match="parametrization of weight changes state"):
        gradhooks.MultiPose(model, memory=0)(poses)
    assert contents(model) == before
    gradhooks.MultiPose(model, memory=0)(poses).combined.sum().backward()


def test_grad_mode_is_remembered_and_other_errors_are_not_taken_for_it() -> None:
    runs, fails_at = 0, -1

    def count(hidden: Tensor) -> None:
        nonlocal runs
        runs += 1
        if runs == fails_at:
            raise RuntimeError("once")
        only_with_grad(hidden)

    scorer = gradhooks.MultiPose(Hidden(count), accumulator="recompute", memory=0)
    scorer(vectors())
    for fails_at in (-1, 3):
        runs = 0
        with nullcontext() if fails_at < 0 else pytest.raises(RuntimeError, match="once"):
            scorer(vectors())
    assert runs == 3


class ReachesCodebook(VectorQuantizer):
    def forward(self, pose: Tensor) -> Tensor:
        self.codebook.requires_grad_()
        return self.decode(self.encode(pose) + self.codebook.mean(0))


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_marked_buffer_that_is_reached_is_refused_by_its_name(accumulator: str) -> None:
    model = ReachesCodebook()
    with pytest.raises(UnregisteredTensorError, match=r"buffer codebook.*\(6, 3\).*memory="):
        gradhooks.MultiPose(model, **options_of(accumulator))(vectors())
    assert not model.codebook.requires_grad
    gradhooks.MultiPose(model)(vectors()).combined.sum().backward()  # native
    assert model.codebook.grad is not None


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.usual, self.head = nn.Linear(4, 1), None

    def forward(self, pose: Tensor) -> Tensor:
        if self.head is None:
            self.head = nn.Linear(4, 1)
        return self.usual(pose) + self.head(pose)


def test_a_module_made_in_the_forward_is_refused_by_name() -> None:
    model = Grows()
    scorer = gradhooks.MultiPose(model, memory=0)
    with pytest.raises(UnregisteredTensorError, match=r"made or unfroze head\.(weight|bias)"):
        scorer(vectors())
    model(vectors()[0])
    scorer(vectors()).combined.sum().backward()
    assert model.head is not None
    assert model.head.weight.grad is not None
