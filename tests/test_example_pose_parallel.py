"""Runs examples/pose_parallel.py on few conformers, with torchrun and in this process."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for _extra in ("matplotlib", "rdkit", "tqdm"):
    pytest.importorskip(_extra)

EXAMPLE = Path(__file__).parents[1] / "examples" / "pose_parallel.py"


def losses_and_deviation(printed: str) -> tuple[str, float]:
    (losses,) = re.findall(r"loss, \(kcal/mol\)\^2 *\| *(.*?) *\|", printed)
    (deviation,) = re.findall(r"difference from one process *\| *(\S+) relative", printed)
    return losses, float(deviation)


# Importing torch_geometric calls torch.jit.script.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_two_ranks_give_the_losses_and_the_gradient_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    pytest.importorskip("torch_geometric")
    options = ["--poses", "60", "--steps", "2", "--double", "--cache", str(tmp_path)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [sys.executable, *launch, str(EXAMPLE), *options], check=True, capture_output=True, text=True, timeout=240
    )
    of_two, deviation = losses_and_deviation(finished.stdout)
    assert 0 < deviation < 1e-12

    threads = torch.get_num_threads()
    importlib.import_module("pose_parallel").main(options)
    torch.set_num_threads(threads)
    of_one, _ = losses_and_deviation(capsys.readouterr().out)
    assert of_two == of_one
