"""Measured ligands from the rdkit wheel, and conformers of them as poses for SchNet."""

import csv
import math
import os
from collections.abc import Callable, Iterable, Iterator
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


class Measured(NamedTuple):
    """A molecule and the free energy with which it binds, in kcal/mol."""

    name: str
    molecule: Chem.Mol
    free_energy: float


class Ligand(NamedTuple):
    """What the training needs of it; a pose is `(atomic numbers, positions)`, of its heavy atoms, in Angstrom."""

    poses: list[Pose]
    free_energy: Tensor


def sulfonamides() -> list[Measured]:
    """1017 sulfonamides of ChEMBL2321810; `dG = -RT ln(10) pIC50`."""
    with _data_file("CHEMBL2321810_act.csv").open() as rows:
        activities = {row["Name"]: float(row["Act"]) for row in csv.DictReader(rows)}
    entries = [line.split() for line in _data_file("CHEMBL2321810.smi").read_text().splitlines()]
    return [
        Measured(name, Chem.MolFromSmiles(smiles), -ROOM_TEMPERATURE * math.log(10) * activities[name])
        for smiles, name in entries
    ]


def cmet() -> list[Measured]:
    """24 ligands of c-Met, posed in its binding site."""
    supplier = Chem.SDMolSupplier(str(_data_file("cmet_ligands.sdf")), removeHs=False)
    return [Measured(f"{place:02}", ligand, ligand.GetDoubleProp("r_exp_dg")) for place, ligand in enumerate(supplier)]


SOURCES: dict[str, Callable[[], list[Measured]]] = {"sulfonamides": sulfonamides, "cmet": cmet}


def _data_file(name: str) -> Path:
    if not (DATA / name).exists():
        raise FileNotFoundError(
            f"{DATA / name} is missing; the rdkit wheel has it: pip install --force-reinstall rdkit"
        )
    return DATA / name


def split(measured: list[Measured], count: int, seed: int) -> tuple[list[Measured], list[Measured]]:
    """Training and held-out molecules: `count` at most, of which every fourth is held out.

    Both span the whole range of free energies: one molecule is drawn from each of `count` ranks, and one of every four
    neighbours is held out, at random.
    """
    random = np.random.default_rng(seed)
    ranked = sorted(measured, key=lambda one: (one.free_energy, one.name))
    drawn = [ranked[random.choice(ranks)] for ranks in np.array_split(np.arange(len(ranked)), min(count, len(ranked)))]
    held_out = {start + int(random.integers(4)) for start in range(0, len(drawn), 4)}
    return (
        [one for place, one in enumerate(drawn) if place not in held_out],
        [one for place, one in enumerate(drawn) if place in held_out],
    )


def ligands(measured: Iterable[Measured], count: int, seed: int, cache: Path, device: torch.device) -> Iterator[Ligand]:
    """Each molecule with `count` poses, from the cache where it has them."""
    for one in measured:
        numbers, positions = _cached(one, count, seed, cache)
        kinds = torch.from_numpy(numbers).to(device)
        poses = [(kinds, torch.from_numpy(place).to(device)) for place in positions]
        yield Ligand(poses, torch.tensor([[one.free_energy]], device=device))


def _cached(one: Measured, count: int, seed: int, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    # Another rdkit may embed differently, so that its version is part of the key.
    path = cache / f"rdkit-{rdkit.__version__}" / f"{one.name}-{count}-poses-seed-{seed}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers, positions = _conformers(one, count, seed)
        unfinished = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(unfinished, numbers=numbers, positions=positions)
        unfinished.replace(path)  # all or nothing, also where the run is interrupted here
    with np.load(path) as stored:
        return stored["numbers"], stored["positions"]


def _conformers(one: Measured, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Atomic numbers `(A,)` and positions `(count, A, 3)`: the coordinates that the data has, if any, come first."""
    given = [conformer.GetPositions() for conformer in one.molecule.GetConformers()]
    numbers = np.array([atom.GetAtomicNum() for atom in one.molecule.GetAtoms()])
    whole = Chem.AddHs(one.molecule)  # appends them, so that the heavy atoms keep their places
    options = rdDistGeom.ETKDGv3()
    options.randomSeed = seed + 1  # conformer i gets i times this, and 0 would make all of them one
    options.numThreads = 0  # all cores; the coordinates do not depend on it
    rdDistGeom.EmbedMultipleConfs(whole, count - len(given), options)
    embedded = [conformer.GetPositions()[: len(numbers)] for conformer in whole.GetConformers()]
    if len(given) + len(embedded) < count:
        raise RuntimeError(
            f"{one.name}: rdkit embedded {len(embedded)} of {count - len(given)} conformers; try another --seed"
        )
    heavy = numbers > 1
    return numbers[heavy], np.stack(given + embedded).astype(np.float32)[:, heavy]
