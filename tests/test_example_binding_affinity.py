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
TINY = ["--molecules", "8", "--poses", "1", "--epochs", "1", "--repeats", "1"]

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
    example.main(options)
    first = capsys.readouterr()
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "training: 100%" in first.err
    rows = ["training mean", "SchNet, boltzmann", "full graph, batched", "MultiPose, memory=0 (recompute)"]
    assert [row for row in rows if f"\n| {row} " not in first.out] == []
    assert _without_times(first.out) != first.out

    monkeypatch.setattr(sys.modules["conformers"], "_conformers", _fail)
    example.main(options)
    assert _without_times(capsys.readouterr().out) == _without_times(first.out)


@pytest.mark.long
@pytest.mark.usefixtures("example")
def test_from_a_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--molecules", "8", "--poses", "2", "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "\n| MultiPose, memory=0 (recompute) " in done.stdout
    assert (tmp_path / "binding_affinity.png").exists()


def test_a_step_within_little_memory_gives_the_gradient_of_the_full_graph(example: ModuleType) -> None:
    numbers = torch.full((12,), 6)
    poses = [(numbers, 3 * torch.rand(12, 3, generator=torch.Generator().manual_seed(seed))) for seed in range(16)]
    torch.manual_seed(0)
    model = example.SchNet(8, 8, 2, 8, 5.0, example.radius_graph, readout="mean")
    ligands = [example.Ligand(poses[:6], torch.zeros(1)), example.Ligand(poses[6:], torch.ones(1))]
    full, *others = example.step_costs(example.gradhooks.MultiPose(model, "min"), ligands).rows
    assert max(row.gradient_error for row in others) < 1e-5
    default, *_, least = (row for row in others if row.name.startswith("MultiPose"))
    assert (default.plain, least.plain) == (16, 0)
    assert least.peak_bytes < full.peak_bytes / 4
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_of_molecules_has_the_edges_of_each(example: ModuleType) -> None:
    poses = [(torch.full((atoms,), 6), 4 * torch.rand(atoms, 3)) for atoms in (5, 1, 9)]
    numbers, positions, batch = example.collate_molecules(poses)
    edges, lengths = example.radius_graph(positions, batch)
    separate = [example.radius_graph(each, torch.zeros(len(each), dtype=torch.long)) for _, each in poses]
    firsts = (0, 5, 6)
    torch.testing.assert_close(
        edges, torch.cat([part + first for (part, _), first in zip(separate, firsts, strict=True)], 1)
    )
    torch.testing.assert_close(lengths, torch.cat([part for _, part in separate]))
    distances = torch.cdist(poses[2][1], poses[2][1])
    assert separate[2][0].shape[1] == int((distances < example.CUTOFF).sum()) - 9
    assert len(numbers) == 15


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
