"""Fixtures and settings of all tests: device, seed, number of threads."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# pytest shows the values in a failed assertion of these helpers, as it does for tests.
pytest.register_assert_rewrite("training_reference", "model_state", "trainers")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
if sys.platform == "linux":  # gloo otherwise looks up the name of the machine, which can take longer than its timeout
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

from chosen_device import CORE, DEVICE  # noqa: E402
from model_zoo import TensorFactory  # noqa: E402
from seeding import manual_seed  # noqa: E402

hypothesis.settings.register_profile("gradhooks", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("gradhooks")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of processes of `-n auto`: one more than cores, since tests of several ranks wait for them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + 1


def pytest_configure() -> None:
    torch.set_num_threads(1)  # pytest-xdist uses the cores by several processes


def pytest_collection_finish() -> None:
    # The objects that importing PyTorch creates are never garbage: without them, a full collection takes no time.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in CORE:
            item.add_marker("core")
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch.cuda finds none here"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def _on_the_device(device: torch.device) -> Iterator[None]:
    """Make the tensors of a test that names no device on that of the tests."""
    if device.type == "cpu":
        yield
        return
    with device:
        yield


@pytest.fixture
def double(device: torch.device) -> TensorFactory:
    return TensorFactory(device, torch.float64)


@pytest.fixture
def single(device: torch.device) -> TensorFactory:
    return TensorFactory(device, torch.float32)


@pytest.fixture
def _reset_trainer_state() -> Iterator[None]:
    """Restore what Accelerate, also used by transformers, sets for the whole process: precision, environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
