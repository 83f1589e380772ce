"""In Lightning, in the Trainer of transformers and in Accelerate a group is trained as its full graph would be."""

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
    """Of poses of any number of atoms; draws dropout masks and keeps running statistics."""

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
    """A training.

    Attributes:
        train: In which trainer.
        dtype: Of the model and the groups as they are handed over.
        optimizer: From parameters.
        tolerance: How far the weights may be from those of the full graph, relative to how far they have moved.
        options: Of the trainer.
        groups: How many there are; few make several epochs.
    """

    train: Callable[..., None]
    dtype: torch.dtype
    optimizer: MakeOptimizer
    tolerance: float
    options: dict[str, Any]
    groups: int = 12


DOUBLE: dict[str, Any] = {"dtype": torch.float64, "optimizer": ADAMW, "tolerance": 1e-12}
SINGLE: dict[str, Any] = {"dtype": torch.float32, "optimizer": SGD, "tolerance": 1e-5}
# In mixed precision autocast keeps one bfloat16 copy of each weight, whose gradients the full graph sums in bfloat16,
# that is to 8 bits; gradhooks sums in float32. (With `cache_enabled=False` the two would agree.)
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
    """Weights and statistics after some steps."""
    with tempfile.TemporaryDirectory() as folder:
        case.train(
            scorer, groups_of(case.groups, case.dtype), Path(folder), case.optimizer, **copy.deepcopy(case.options)
        )
    return state_of(scorer)


def state_of(scorer: Any) -> State:
    return {**scorer.model.state_dict(), **scorer.combination.state_dict()}


@functools.cache
def by_full_graph(name: str) -> tuple[State, State]:
    """What is to be had, and what it was before."""
    case = CASES[name]
    scorer = FullGraph(network(case.dtype), combination())
    before = copy.deepcopy(state_of(scorer))
    return trained(case, scorer), before


def assert_same_weights(found: State, expected: State, before: State, tolerance: float) -> None:
    """Equal, relative to how far training has moved each."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        moved = (value - before[name]).double().norm().item()
        assert moved > 0, f"{name} has not moved"
        assert found[name].dtype == value.dtype
        assert (found[name] - value).double().norm().item() <= tolerance * moved, name


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", CASES)
def test_a_trainer_leaves_the_weights_of_the_full_graph(name: str, accumulator: str) -> None:
    expected, before = by_full_graph(name)
    case = CASES[name]
    scorer = gradhooks.MultiPose(network(case.dtype), combination(), accumulator=accumulator)
    assert_same_weights(trained(case, scorer), expected, before, case.tolerance)


class LosingOne(gradhooks.combinations.Boltzmann):
    """The last pose of every group gets no gradient through it."""

    def forward(self, predictions: Tensor, *_: Any, **arguments: Any) -> Tensor:
        return super().forward(torch.cat([predictions[:-1], predictions[-1:].detach()]), **arguments)


@pytest.mark.parametrize("name", CASES)
def test_the_comparison_tells_when_a_pose_is_lost(name: str) -> None:
    expected, before = by_full_graph(name)
    found = trained(CASES[name], FullGraph(network(CASES[name].dtype), LosingOne(0.9, learnable=True)))
    with pytest.raises(AssertionError):
        assert_same_weights(found, expected, before, CASES[name].tolerance)
