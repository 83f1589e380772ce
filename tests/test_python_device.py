"""The core of the library on a device written in Python, in processes of their own: `python_device` is for good."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import python_device
from chosen_device import CORE

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(bool(python_device.WHY_MISSING), reason=python_device.WHY_MISSING or "there"),
    pytest.mark.skipif("GRADHOOKS_TEST_DEVICE" in os.environ, reason="the tests run on a chosen device already"),
]

SHORT = {
    "exactness": "test_every_model[batch_norm_in_training-min or test_every_model[lstm-min",
    "state_preserved": "pickles and plain_mlp-auto or autocast_of_the_first and dropout-recompute",
    "model_state": "trains_as_the_full_graph and ScriptedBatch",
    "skipping": "bit_equal",
    "several_groups": "own_report",
    "memory_budget": "every_budget and mean-both-list]",
    "out_of_memory": "memory_halves_until and forward",
    "faults": "second_run_during and auto",
    "leaks": "group_that_fails and auto",
    "plain_poses": "exception_restores and 8000 or side_losses",
}
"""A few tests of each kind, by `-k`."""


def run_tests(*arguments: str) -> str:
    environment = {**os.environ, "GRADHOOKS_TEST_DEVICE": python_device.NAME}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=short", *arguments]
    run = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    return run.stdout


def test_waits_and_memory() -> None:
    run_tests(str(HERE / "test_waits.py"), str(HERE / "test_device_memory.py"))


def test_some_of_the_core() -> None:
    chosen = " or ".join(f"(test_{name}.py and ({tests}))" for name, tests in SHORT.items())
    run_tests("-k", chosen, *(str(HERE / f"test_{name}.py") for name in SHORT))


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(CORE))
def test_the_whole_core(name: str) -> None:
    run_tests("-m", "not long", str(HERE / f"test_{name}.py"))
