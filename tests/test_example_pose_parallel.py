"""Runs examples/pose_parallel.py with torchrun on few conformers."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

for _extra in ("matplotlib", "rdkit", "tqdm"):
    pytest.importorskip(_extra)

EXAMPLE = Path(__file__).parents[1] / "examples" / "pose_parallel.py"


def losses_and_deviation(ranks: int, cache: Path) -> tuple[str, float]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    options = ["--poses", "200", "--steps", "2", "--double", "--cache", str(cache)]
    done = subprocess.run(
        [sys.executable, *launch, str(EXAMPLE), *options], check=True, capture_output=True, text=True, timeout=240
    )
    (losses,) = re.findall(r"loss, \(kcal/mol\)\^2 *\| *(.*?) *\|", done.stdout)
    (deviation,) = re.findall(r"difference from one process *\| *(\S+) relative", done.stdout)
    return losses, float(deviation)


@pytest.mark.skipif(find_spec("torch_geometric") is None, reason="needs torch_geometric")
def test_two_ranks_give_the_losses_and_the_gradient_of_one(tmp_path: Path) -> None:
    of_two, deviation = losses_and_deviation(2, tmp_path)
    of_one, _ = losses_and_deviation(1, tmp_path)
    assert 0 < deviation < 1e-12
    assert of_two == of_one
