"""Load measured ligands from the rdkit wheel, embed conformers as poses, and make batches of them for SchNet."""

import csv
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rdkit
import torch
from rdkit import Chem, RDConfig
from rdkit.Chem import rdDistGeom
from torch import Tensor

from gradhooks.combinations.boltzmann import ROOM_TEMPERATURE

DATA = Path(RDConfig.RDContribDir, "FreeWilson", "data")
Pose = tuple[Tensor, Tensor]
CUTOFF = 5.0  # Angstrom


class Measured(NamedTuple):
    """A molecule and its binding free energy in kcal/mol."""

    name: str
    molecule: Chem.Mol
    free_energy: float


class Ligand(NamedTuple):
    """Training data of a molecule, with a free energy of shape `(1,)`.

    A pose is `(atomic numbers, positions)` of its heavy atoms, in Angstrom.
    """

    poses: list[Pose]
    free_energy: Tensor


def collate_molecules(poses: Sequence[Pose]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the arguments of SchNet for several poses: all atoms, and the number of the pose of each atom."""
    numbers, positions = zip(*poses, strict=True)
    atoms = torch.tensor([len(pose) for pose in numbers], device=numbers[0].device)
    return (
        torch.cat(numbers),
        torch.cat(positions),
        torch.arange(len(poses), device=atoms.device).repeat_interleave(atoms),
    )


def radius_graph(positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return the edges `(2, E)` between atoms of a pose closer than the cutoff, and their lengths `(E,)`."""
    atoms = batch.bincount()
    first = atoms.cumsum(0) - atoms  # the first atom of each pose
    partners = atoms[batch]  # an atom may be close to all atoms of its pose
    row = torch.arange(len(batch), device=batch.device).repeat_interleave(partners)
    first_row = (partners.cumsum(0) - partners)[row]
    column = first[batch][row] + torch.arange(len(row), device=batch.device) - first_row
    lengths = (positions[row] - positions[column]).norm(dim=1)
    near = (lengths < CUTOFF) & (row != column)
    return torch.stack([row[near], column[near]]), lengths[near]


def sulfonamides() -> list[Measured]:
    """Return 1017 sulfonamides of ChEMBL2321810; `dG = -RT ln(10) pIC50`."""
    with _data_file("CHEMBL2321810_act.csv").open() as rows:
        activities = {row["Name"]: float(row["Act"]) for row in csv.DictReader(rows)}
    entries = [line.split() for line in _data_file("CHEMBL2321810.smi").read_text().splitlines()]
    return [
        Measured(name, Chem.MolFromSmiles(smiles), -ROOM_TEMPERATURE * math.log(10) * activities[name])
        for smiles, name in entries
    ]


def cmet() -> list[Measured]:
    """Return 24 ligands of c-Met, posed in its binding site."""
    supplier = Chem.SDMolSupplier(str(_data_file("cmet_ligands.sdf")), removeHs=False)
    return [Measured(f"{index:02}", ligand, ligand.GetDoubleProp("r_exp_dg")) for index, ligand in enumerate(supplier)]


SOURCES: dict[str, Callable[[], list[Measured]]] = {"sulfonamides": sulfonamides, "cmet": cmet}


def _data_file(name: str) -> Path:
    if not (DATA / name).exists():
        raise FileNotFoundError(
            f"{DATA / name} is missing; the rdkit wheel contains it: pip install --force-reinstall rdkit"
        )
    return DATA / name


def split(measured: list[Measured], count: int, seed: int) -> tuple[list[Measured], list[Measured]]:
    """Draw at most `count` molecules and return those for training and every fourth, which is held out.

    Both parts span the whole range of free energies: one molecule is drawn from each of `count` equal ranges of the
    sorted molecules, and one of every four neighbours is held out, at random.
    """
    random = np.random.default_rng(seed)
    ranked = sorted(measured, key=lambda molecule: (molecule.free_energy, molecule.name))
    ranges = np.array_split(np.arange(len(ranked)), min(count, len(ranked)))
    drawn = [ranked[random.choice(indices)] for indices in ranges]
    held_out = {start + int(random.integers(4)) for start in range(0, len(drawn), 4)}
    return (
        [molecule for index, molecule in enumerate(drawn) if index not in held_out],
        [molecule for index, molecule in enumerate(drawn) if index in held_out],
    )


def load_ligands(
    measured: Iterable[Measured], count: int, seed: int, cache: Path, device: torch.device
) -> Iterator[Ligand]:
    """Yield each molecule with `count` poses, which are read from the cache if it has them."""
    for molecule in measured:
        atomic_numbers, positions = _cached(molecule, count, seed, cache)
        numbers = torch.from_numpy(atomic_numbers).to(device)
        poses = [(numbers, torch.from_numpy(coordinates).to(device)) for coordinates in positions]
        yield Ligand(poses, torch.tensor([molecule.free_energy], device=device))


def _cached(measured: Measured, count: int, seed: int, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    # Another version of rdkit may give other coordinates, so the version is part of the key.
    path = cache / f"rdkit-{rdkit.__version__}" / f"{measured.name}-{count}-poses-seed-{seed}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers, positions = _conformers(measured, count, seed)
        unfinished = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(unfinished, numbers=numbers, positions=positions)
        unfinished.replace(path)  # atomic, so that an interrupted run leaves no incomplete file under this name
    with np.load(path) as stored:
        return stored["numbers"], stored["positions"]


def _conformers(measured: Measured, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return atomic numbers `(A,)` and positions `(count, A, 3)`; coordinates from the data set come first."""
    given = [conformer.GetPositions() for conformer in measured.molecule.GetConformers()]
    numbers = np.array([atom.GetAtomicNum() for atom in measured.molecule.GetAtoms()])
    with_hydrogens = Chem.AddHs(measured.molecule)  # appends them, so the heavy atoms keep their indices
    options = rdDistGeom.ETKDGv3()
    options.randomSeed = seed + 1  # conformer i uses i times this number, so 0 would make all of them equal
    options.numThreads = 0  # all cores; the coordinates do not depend on it
    rdDistGeom.EmbedMultipleConfs(with_hydrogens, count - len(given), options)
    embedded = [conformer.GetPositions()[: len(numbers)] for conformer in with_hydrogens.GetConformers()]
    if len(given) + len(embedded) < count:
        raise RuntimeError(
            f"{measured.name}: rdkit embedded {len(embedded)} of {count - len(given)} conformers; try another --seed"
        )
    heavy = numbers > 1
    return numbers[heavy], np.stack(given + embedded).astype(np.float32)[:, heavy]
