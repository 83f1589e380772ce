"""Copies of modules, and comparison of their state."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch

import gradhooks


def learnable_boltzmann(temperature: float) -> gradhooks.combinations.Boltzmann:
    return gradhooks.combinations.Boltzmann(temperature, learnable=True)


def assert_same_state(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sorted(result) == sorted(expected)
    for name, value in result.items():
        assert torch.equal(value, expected[name]), name


def save_and_load(value: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),  # noqa: S301  # our own
    "torch.save": lambda value: save_and_load(value, weights_only=False),
}
