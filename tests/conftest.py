"""Where the suite runs, and from which seed.

GRADHOOKS_TEST_DEVICE chooses the device (`cpu` by default, `cuda`, `cuda:1` ...).
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# Assertions of helpers are explained as those of the tests are.
pytest.register_assert_rewrite("training_reference", "model_state", "trainers")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from model_zoo import TensorFactory  # noqa: E402

hypothesis.settings.register_profile("gradhooks", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("gradhooks")

DEVICE = torch.device(os.environ.get("GRADHOOKS_TEST_DEVICE", "cpu"))


def pytest_configure() -> None:
    torch.set_num_threads(1)  # pytest-xdist has a process for each core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch.cuda finds none here"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def double(device: torch.device) -> TensorFactory:
    return TensorFactory(device, torch.float64)


@pytest.fixture
def single(device: torch.device) -> TensorFactory:
    return TensorFactory(device, torch.float32)


@pytest.fixture
def _reset_trainer_state() -> Iterator[None]:
    """Accelerate, and transformers by it, settles its precision once for a process, partly in environment variables."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
