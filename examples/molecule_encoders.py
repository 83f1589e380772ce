"""Two encoders of a molecule, a graph network on its bonds and SchNet on a conformer, and their contrastive loss."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from conformers import CUTOFF, Pose, collate_molecules, radius_graph
from rdkit import Chem
from torch import Tensor, nn
from torch_geometric.nn import GIN, SchNet, global_add_pool

import gradhooks

EMBEDDING = 32
TEMPERATURE = 0.1
Graph = tuple[Tensor, Tensor]
"""Atomic numbers, shape `(A,)`, and bonds in both directions, shape `(2, E)`."""


def bond_graph(molecule: Chem.Mol, device: torch.device) -> Graph:
    """Return the heavy atoms of a molecule and the bonds between them."""
    molecule = Chem.RemoveHs(molecule)
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()]
    both = torch.tensor([*bonds, *((second, first) for first, second in bonds)], device=device)
    return torch.tensor(numbers, device=device), both.reshape(-1, 2).T


def collate_graphs(graphs: Sequence[Graph]) -> tuple[Tensor, Tensor, Tensor]:
    """Return all atoms, all bonds, and the number of the graph of each atom."""
    sizes = torch.tensor([len(numbers) for numbers, _ in graphs])
    first = (sizes.cumsum(0) - sizes).tolist()
    bonds = torch.cat([bonds + offset for (_, bonds), offset in zip(graphs, first, strict=True)], 1)
    index = torch.arange(len(graphs)).repeat_interleave(sizes).to(bonds.device)
    return torch.cat([numbers for numbers, _ in graphs]), bonds, index


class GraphEncoder(nn.Module):
    """A graph network of PyTorch Geometric and the sum over the atoms."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.atoms = nn.Embedding(100, width)
        self.network = GIN(width, width, num_layers=4, out_channels=EMBEDDING)

    def forward(self, numbers: Tensor, bonds: Tensor, index: Tensor) -> Tensor:
        return global_add_pool(self.network(self.atoms(numbers), bonds), index)


def conformer_encoder(width: int = 32) -> SchNet:
    """Return a SchNet whose last layer gives an embedding instead of an energy."""
    schnet = SchNet(width, width, 2, 25, CUTOFF, radius_graph, readout="add")
    schnet.lin2 = nn.Linear(width // 2, EMBEDDING)
    return schnet


class Molecules(NamedTuple):
    """Molecules, each with its graph and with its conformers."""

    graphs: list[Graph]
    conformers: list[list[Pose]]

    def batch(self, indices: Sequence[int]) -> tuple[list[Graph], gradhooks.Groups]:
        """Return graphs, and conformers in groups."""
        groups: gradhooks.Groups = gradhooks.collate_groups([self.conformers[index] for index in indices])
        return [self.graphs[index] for index in indices], groups


class Encoders(NamedTuple):
    """The two encoders, as scorers."""

    graph: gradhooks.MultiPose[GraphEncoder]
    conformer: gradhooks.MultiPose[nn.Module]

    def parameters(self) -> list[nn.Parameter]:
        return [*self.graph.parameters(), *self.conformer.parameters()]

    def loss(self, graphs: list[Graph], groups: gradhooks.Groups) -> Tensor:
        return info_nce(self.graph(graphs).per_pose, self.conformer(groups).combined)


def make_encoders(seed: int, combination: str, device: torch.device, **options: Any) -> Encoders:
    """Return untrained encoders, the same for the same seed; `options` are those of both scorers."""
    torch.manual_seed(seed)
    graph = gradhooks.MultiPose(GraphEncoder(), None, collate=collate_graphs, **options)
    conformer = gradhooks.MultiPose(conformer_encoder(), combination, collate=collate_molecules, **options)
    return Encoders(graph.to(device), conformer.to(device))


def info_nce(graphs: Tensor, conformers: Tensor) -> Tensor:
    """Return the mean of both directions: which conformers belong to a graph, and which graph to conformers."""
    scores = similarity(graphs, conformers) / TEMPERATURE
    labels = torch.arange(len(scores), device=scores.device)
    return (nn.functional.cross_entropy(scores, labels) + nn.functional.cross_entropy(scores.T, labels)) / 2


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine of each pair of embeddings."""
    return nn.functional.normalize(first, dim=-1) @ nn.functional.normalize(second, dim=-1).T
