"""The same seed and options give the same bits in every process: no decision depends on a clock."""

import ast
import hashlib
import subprocess
import sys
from pathlib import Path

import torch
from model_zoo.graphs import import_torch_geometric
from seeding import manual_seed
from torch import Tensor

import gradhooks


def _neighbours(positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    del batch
    distances = torch.cdist(positions, positions)
    edges = ((distances < 5) & (distances > 0)).nonzero().T
    return edges, distances[edges[0], edges[1]]


def train() -> str:
    """Train a SchNet for 20 steps, and return a hash of its weights and the accumulators that were chosen."""
    _, layers = import_torch_geometric()
    manual_seed(0)
    model = layers.SchNet(16, 16, num_interactions=2, num_gaussians=8, cutoff=5.0, interaction_graph=_neighbours)
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator="auto", memory=0)
    optimizer = torch.optim.Adam(scorer.parameters(), lr=1e-2)
    chosen = set()
    for _ in range(20):
        elements = torch.randint(1, 10, (12,))
        poses = [(elements, 4 * torch.rand(12, 3)) for _ in range(6)]
        optimizer.zero_grad()
        (scorer(poses).combined - 1).square().sum().backward()
        optimizer.step()
        chosen.add(scorer.report.accumulator)
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in scorer.parameters())
    return f"{hashlib.sha256(weights).hexdigest()} {sorted(chosen)}"


def test_two_processes_train_to_the_same_bits() -> None:
    import_torch_geometric()  # skips the test if it is not installed
    program = "import torch, test_reproducible; torch.set_num_threads(1); print(test_reproducible.train())"
    other = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    result = train()
    assert result == other.stdout.strip()
    assert "'stream'" in result


def test_only_profiling_imports_a_clock() -> None:
    """And what waits for other ranks, until they are taken for lost."""
    package = Path(gradhooks.__file__).parent
    for path in package.rglob("*.py"):
        if "profiling" in path.parts or path.name in ("lost_ranks.py", "plugin_check.py"):
            continue
        imported = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
        }
        assert not imported & {"time", "timeit", "datetime"}, path
