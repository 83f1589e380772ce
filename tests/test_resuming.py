"""A run under torchrun that is killed and resumed has the weights of one that was not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from resumed_training import MODES

PROGRAM = Path(__file__).with_name("resumed_training.py")


def run_under_torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(PROGRAM), str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.long
@pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 runs on a CPU from torch 2.7 on")
def test_a_killed_run_that_is_resumed_has_the_same_bits(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    killed = run_under_torchrun(stopped, "--kill")
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL)" in killed.stderr, killed.stderr
    for folder in (whole, stopped):
        done = run_under_torchrun(folder)
        assert done.returncode == 0, done.stderr
    for mode in MODES:
        expected, resumed = (torch.load(folder / f"{mode}.pt", weights_only=True) for folder in (whole, stopped))
        assert expected.keys() == resumed.keys()
        assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == [], mode
