"""Runs examples/binding_affinity.py on few molecules."""

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
import torch

for _extra in ("matplotlib", "rdkit", "tqdm"):
    pytest.importorskip(_extra)

EXAMPLE = Path(__file__).parents[1] / "examples" / "binding_affinity.py"
TINY = ["--molecules", "8", "--poses", "2", "--epochs", "1"]

# Importing torch_geometric calls torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    pytest.importorskip("torch_geometric")
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield importlib.import_module("binding_affinity")
    torch.set_num_threads(threads)


def _without_times(text: str) -> str:
    """Remove times and their ratios, and the padding that depends on their widths."""
    text = re.sub(r"[\d.]+ *\| *[\d.]+ [numµ]?s *\|", "", text)
    return re.sub(r" +", " ", re.sub(r"-{2,}", "-", text))


def _fail(*_: object) -> NoReturn:
    raise AssertionError("conformers were embedded again, although they are in the cache")


def test_a_second_run_reads_the_cache_and_prints_the_same_numbers(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.png"
    options = [*TINY, "--cache", str(tmp_path / "cache"), "--output", str(plot)]
    command = [sys.executable, str(EXAMPLE), *options]
    first = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "training: 100%" in first.stderr
    rows = ["training mean", "SchNet, boltzmann", "full graph", "checkpoint per pose", "auto (stream)"]
    assert [row for row in rows if f"\n| {row} " not in first.stdout] == []
    assert _without_times(first.stdout) != first.stdout

    monkeypatch.setattr(sys.modules["conformers"], "_conformers", _fail)
    example.main(options)
    assert _without_times(capsys.readouterr().out) == _without_times(first.stdout)


def test_a_step_needs_the_memory_of_one_pose_and_gives_the_full_gradient(example: ModuleType) -> None:
    numbers = torch.full((12,), 6)
    poses = [(numbers, 3 * torch.rand(12, 3, generator=torch.Generator().manual_seed(seed))) for seed in range(16)]
    torch.manual_seed(0)
    scorer = example.gradhooks.MultiPose(example.SchNet(8, 8, 2, 8, 5.0, example.radius_graph, readout="mean"), "min")
    full, checkpointed, scored = example.step_costs(scorer, poses, torch.zeros(1, 1)).rows
    assert full.gradient_error == 0
    assert max(checkpointed.gradient_error, scored.gradient_error) < 1e-5
    assert max(checkpointed.peak_bytes, scored.peak_bytes) < full.peak_bytes / 4
    assert min(full.seconds, checkpointed.seconds, scored.seconds) > 0
    assert all(parameter.grad is None for parameter in scorer.parameters())


def test_the_split_is_by_molecule_and_depends_on_the_seed_only(example: ModuleType) -> None:
    measured = example.SOURCES["sulfonamides"]()
    training, held_out = example.split(measured, 40, seed=3)
    assert (len(measured), len(training), len(held_out)) == (1017, 30, 10)
    assert len({molecule.name for molecule in training + held_out}) == 40
    again = example.split(measured, 40, seed=3)
    assert [molecule.name for molecule in training] == [molecule.name for molecule in again[0]]
    other, _ = example.split(measured, 40, seed=4)
    assert {molecule.name for molecule in training} != {molecule.name for molecule in other}


def test_the_first_pose_of_cmet_ligands_is_the_given_one(example: ModuleType, tmp_path: Path) -> None:
    measured = example.SOURCES["cmet"]()[:1]
    (ligand,) = example.load_ligands(measured, 3, 0, tmp_path, torch.device("cpu"))
    (numbers, posed), (_, embedded), _ = ligand.poses
    assert ligand.free_energy.item() == pytest.approx(-9.13905)
    assert 1 not in numbers
    molecule = measured[0].molecule
    heavy = [atom.GetIdx() for atom in molecule.GetAtoms() if atom.GetAtomicNum() > 1]
    given = torch.tensor(molecule.GetConformer().GetPositions()[heavy], dtype=torch.float32)
    torch.testing.assert_close(posed, given, rtol=0, atol=0)
    bonds = [
        (heavy.index(bond.GetBeginAtomIdx()), heavy.index(bond.GetEndAtomIdx()))
        for bond in molecule.GetBonds()
        if {bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()} <= set(heavy)
    ]
    lengths = torch.stack([(embedded[i] - embedded[j]).norm() for i, j in bonds])
    assert lengths.max() < 2  # the embedded atoms are in the order of the given ones


def test_invalid_options_are_refused(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.parse_arguments(["--poses", "0"])
    assert "--poses must be at least 1" in capsys.readouterr().err
