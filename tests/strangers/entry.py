"""Models that nobody here wrote, of tiny size and with random weights: they find what no model of our own has.

Built in the default dtype, which the tests set to float64. Nothing is downloaded.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor, nn


@dataclass
class Stranger:
    """A model with its poses.

    Attributes:
        model: The model, in training mode unless that makes no sense.
        poses: Four poses, of unequal size where the model allows it.
        call: As for `MultiPose`.
    """

    model: nn.Module
    poses: list[Any]
    call: Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Entry:
    """How to build a stranger, and what is known of it.

    Attributes:
        build: Returns it.
        package: What it needs.
        quick: Whether it belongs to the short run.
        tolerance: Of its gradients, relative to their size; more than rounding in float64 if it computes in float32,
            whatever its parameters are.
        refusal: What the error says with which its poses are refused where they are intercepted; None if they are not.
    """

    build: Callable[[], Stranger]
    package: str
    quick: bool
    tolerance: float
    refusal: str | None


IN_FLOAT32 = 1e-5  # the tolerance of what computes in float32

STRANGERS: dict[str, Entry] = {}


def stranger(
    package: str, *, quick: bool = False, tolerance: float = 1e-10, refusal: str | None = None
) -> Callable[[Callable[[], Stranger]], Callable[[], Stranger]]:
    """Register a function that builds a stranger, by its name."""

    def register(build: Callable[[], Stranger]) -> Callable[[], Stranger]:
        STRANGERS[build.__name__] = Entry(build, package, quick, tolerance, refusal)
        return build

    return register


def build_stranger(name: str) -> Stranger:
    """Build a stranger; skip the test, with the reason, if its package cannot be used here."""
    entry = STRANGERS[name]
    try:
        importlib.import_module(entry.package)
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError beside another build of torch
        pytest.skip(f"{entry.package} cannot be imported: {str(error).splitlines()[0]}")
    return entry.build()
