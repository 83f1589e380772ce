"""The same seed and options give the same bits in every process: no decision depends on a clock."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradhooks

SCRIPT = """
import hashlib, sys, warnings
import torch
warnings.simplefilter("ignore")
from torch_geometric.nn.models import SchNet
import gradhooks

torch.set_num_threads(1)
torch.manual_seed(0)

def neighbours(positions, batch):
    distances = torch.cdist(positions, positions)
    edges = ((distances < 5) & (distances > 0)).nonzero().T
    return edges, distances[edges[0], edges[1]]

model = SchNet(16, 16, num_interactions=2, num_gaussians=8, cutoff=5.0, interaction_graph=neighbours)
scorer = gradhooks.MultiPose(model, "boltzmann", accumulator="auto")
optimizer = torch.optim.Adam(scorer.parameters(), lr=1e-2)
chosen = []
for step in range(20):
    numbers = torch.randint(1, 10, (12,))
    poses = [(numbers, 4 * torch.rand(12, 3)) for _ in range(6)]
    optimizer.zero_grad()
    (scorer(poses).combined - 1).square().sum().backward()
    optimizer.step()
    chosen.append(scorer.report.accumulator)
weights = b"".join(parameter.detach().numpy().tobytes() for parameter in scorer.parameters())
print(hashlib.sha256(weights).hexdigest(), sorted(set(chosen)))
"""


def test_two_processes_train_to_the_same_bits() -> None:
    pytest.importorskip("torch_geometric")
    started = [subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=120)[0] for process in started)
    assert all(process.returncode == 0 for process in started)
    assert first == second
    assert "'stream'" in first


def test_no_module_that_decides_imports_a_clock() -> None:
    package = Path(gradhooks.__file__).parent
    for path in package.rglob("*.py"):
        if "profiling" in path.parts:
            continue
        imported = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
        }
        assert not imported & {"time", "timeit", "datetime"}, path
