"""Lightning, the Trainer of transformers and Accelerate give the same weights as with the full graph."""

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from trainers import (
    ADAMW,
    OF_TRAINERS,
    SGD,
    FullGraph,
    Group,
    MakeOptimizer,
    in_accelerate,
    in_lightning,
    in_transformers,
)

import gradhooks

ACCUMULATORS = ["store", "stream", "recompute", "auto"]

pytestmark = OF_TRAINERS


class Network(nn.Module):
    """A model of poses with any number of atoms, with dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.2))
        self.readout = nn.Linear(8, 1)

    def forward(self, atoms: Tensor) -> Tensor:
        prediction: Tensor = self.readout(self.hidden(atoms)).mean(0)
        return prediction


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Network().to(dtype)


def combination() -> gradhooks.Combination:
    return gradhooks.combinations.Boltzmann(0.9, learnable=True)


def groups_of(count: int, dtype: torch.dtype) -> list[Group]:
    random = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    return [([draw(3 + pose % 3, 6) for pose in range(2 + group % 4)], draw(1)) for group in range(count)]


class Case(NamedTuple):
    """Settings of a training.

    Attributes:
        train: The trainer.
        dtype: The type of the model and the groups that the trainer receives.
        optimizer: Makes the optimizer from the parameters.
        tolerance: Allowed difference of the weights from those of the full graph, relative to the change by training.
        options: Options of the trainer.
        groups: Number of groups; with few groups, training has several epochs.
    """

    train: Callable[..., None]
    dtype: torch.dtype
    optimizer: MakeOptimizer
    tolerance: float
    options: dict[str, Any]
    groups: int = 12


DOUBLE: dict[str, Any] = {"dtype": torch.float64, "optimizer": ADAMW, "tolerance": 1e-12}
SINGLE: dict[str, Any] = {"dtype": torch.float32, "optimizer": SGD, "tolerance": 1e-5}
# In mixed precision, autocast keeps one bfloat16 copy of each weight. The full graph sums the gradients of that copy in
# bfloat16, that is to 8 bits; gradhooks sums them in float32. (With `cache_enabled=False` the two agree.)
MIXED: dict[str, Any] = {**SINGLE, "tolerance": 5e-2}

CASES: dict[str, Case] = {
    "lightning, 64-true, accumulated, clipped": Case(
        in_lightning,
        **{**DOUBLE, "dtype": torch.float32},
        options={"precision": "64-true", "accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    ),
    "lightning, clipped by value, several groups a step, several epochs": Case(
        in_lightning,
        **SINGLE,
        options={"size": 2, "gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        groups=4,
    ),
    "lightning, bf16-mixed, accumulated": Case(
        in_lightning, **MIXED, options={"precision": "bf16-mixed", "accumulate_grad_batches": 2}
    ),
    "transformers, float64, accumulated, clipped": Case(
        in_transformers, **DOUBLE, options={"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
    ),
    "transformers, several groups a step, several epochs": Case(
        in_transformers, **SINGLE, options={"per_device_train_batch_size": 2, "max_grad_norm": 0.0}, groups=4
    ),
    "transformers, bf16, accumulated": Case(
        in_transformers, **MIXED, options={"bf16": True, "gradient_accumulation_steps": 2}
    ),
    "accelerate, float64, accumulated, clipped": Case(
        in_accelerate, **DOUBLE, options={"gradient_accumulation_steps": 2, "clip": 0.1}
    ),
    "accelerate, several groups a step, several epochs": Case(in_accelerate, **SINGLE, options={"size": 2}, groups=4),
    "accelerate, bf16, accumulated, clipped": Case(
        in_accelerate, **MIXED, options={"mixed_precision": "bf16", "gradient_accumulation_steps": 2, "clip": 0.1}
    ),
}

State = dict[str, Tensor]


def trained(case: Case, scorer: Any) -> State:
    """Return weights and running statistics after a few steps."""
    with tempfile.TemporaryDirectory() as folder:
        case.train(
            scorer, groups_of(case.groups, case.dtype), Path(folder), case.optimizer, **copy.deepcopy(case.options)
        )
    return state_of(scorer)


def state_of(scorer: Any) -> State:
    return {**scorer.model.state_dict(), **scorer.combination.state_dict()}


@functools.cache
def by_full_graph(name: str) -> tuple[State, State]:
    """Return the expected state, and the state before training."""
    case = CASES[name]
    scorer = FullGraph(network(case.dtype), combination())
    before = copy.deepcopy(state_of(scorer))
    return trained(case, scorer), before


def assert_same_weights(actual: State, expected: State, before: State, tolerance: float) -> None:
    """Assert that the weights agree, relative to the change by training."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        change = (value - before[name]).double().norm().item()
        assert change > 0, f"training has not changed {name}"
        assert actual[name].dtype == value.dtype
        assert (actual[name] - value).double().norm().item() <= tolerance * change, name


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", CASES)
def test_a_trainer_gives_the_weights_of_the_full_graph(name: str, accumulator: str) -> None:
    expected, before = by_full_graph(name)
    case = CASES[name]
    scorer = gradhooks.MultiPose(network(case.dtype), combination(), accumulator=accumulator)
    assert_same_weights(trained(case, scorer), expected, before, case.tolerance)


class BoltzmannWithoutLastGradient(gradhooks.combinations.Boltzmann):
    """A wrong combination: the last pose of every group receives no gradient through it."""

    def forward(self, predictions: Tensor, *_: Any, **arguments: Any) -> Tensor:
        return super().forward(torch.cat([predictions[:-1], predictions[-1:].detach()]), **arguments)


@pytest.mark.parametrize("name", CASES)
def test_the_comparison_finds_a_missing_gradient(name: str) -> None:
    expected, before = by_full_graph(name)
    wrong = BoltzmannWithoutLastGradient(0.9, learnable=True)
    actual = trained(CASES[name], FullGraph(network(CASES[name].dtype), wrong))
    with pytest.raises(AssertionError, match=r"^(hidden|readout|log_temperature)\b"):
        assert_same_weights(actual, expected, before, CASES[name].tolerance)
