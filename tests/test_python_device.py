"""The core of the library on a device written in Python, in a process of its own: `python_device` is for good."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import python_device

HERE = Path(__file__).parent
TESTS = ["test_waits.py", "test_device_memory.py"]


def run_tests(*arguments: str) -> None:
    environment = {**os.environ, "GRADHOOKS_TEST_DEVICE": python_device.NAME}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=short", *arguments]
    run = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.skipif(bool(python_device.WHY_MISSING), reason=python_device.WHY_MISSING or "there")
@pytest.mark.skipif("GRADHOOKS_TEST_DEVICE" in os.environ, reason="the tests run on a chosen device already")
def test_the_core_on_the_python_device() -> None:
    run_tests(*(str(HERE / name) for name in TESTS))
